"""Keeps calls that swap weights right under threads and autograd."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from hookcore.errors import ConcurrentCallError
from hookcore.hook import Hook

if TYPE_CHECKING:
    from torch import nn

_top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class CallLock:
    """Lets one thread at a time call into modules whose weights move or change dtype during a call.

    Attributes:
        depth: How many hooked calls are under way.
    """

    __slots__ = ("_lock", "depth")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.depth = 0

    def enter(self, what: str, module: nn.Module) -> None:
        """Takes the lock, or fails at once: waiting would only hide the mistake.

        Raises:
            ConcurrentCallError: Another thread holds it.
        """
        if not self._lock.acquire(blocking=False):
            raise ConcurrentCallError(
                f"{what} {type(module).__name__} while another thread is calling the same model. Its weights "
                "are moved or cast during a call, so one call at a time is possible: put a lock round "
                "the calls, or give each thread a model of its own (copy.deepcopy)"
            )
        self.depth += 1

    def leave(self) -> None:
        """Gives the lock back."""
        self.depth -= 1
        self._lock.release()


class WeightGuard(Hook):
    """Stands outside the hooks that swap weights at one entry.

    Besides holding the lock it makes autograd save weights as tensors of their own: autograd saves a
    parameter itself, by reference, and would find in it after the call whatever the hooks left there.
    Hooks for saved tensors do that, and if the user has set some of his own, they already do.
    """

    def __init__(self, lock: CallLock) -> None:
        self._lock = lock
        self._saving: list[saved_tensors_hooks | None] = []

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes the lock."""
        self._lock.enter("called", module)
        saving = None
        if torch.is_grad_enabled() and _top_saved_tensors_hooks(True) is None:
            saving = saved_tensors_hooks(_same, _same)
            try:
                saving.__enter__()
            except BaseException:  # torch.func forbids such hooks, and without them gradients would be wrong
                self._lock.leave()
                raise
        self._saving.append(saving)

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """Releases it."""
        saving = self._saving.pop()
        if saving is not None:
            saving.__exit__()
        self._lock.leave()

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """Releases it."""
        self.post_forward(module, None)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
