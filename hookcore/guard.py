"""Keeps calls that swap weights right under threads and autograd."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from hookcore.errors import ConcurrentCallError
from hookcore.hook import Hook

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class CallLock:
    """Lets one thread at a time call into modules whose weights move or change dtype during a call.

    Attributes:
        depth: How many hooked calls are under way.
        is_mine: Says whether this thread is in such a call.
    """

    __slots__ = ("_lock", "depth", "is_mine")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.depth = 0
        self.is_mine: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]

    def enter(self) -> bool:
        """Takes the lock, unless another thread holds it; to wait for that would only hide the mistake."""
        if not self._lock.acquire(blocking=False):
            return False
        self.depth += 1
        return True

    def leave(self) -> None:
        """Gives the lock back."""
        self.depth -= 1
        self._lock.release()


class WeightGuard(Hook):
    """Stands outside the hooks that swap weights; one serves all entries that share a lock.

    Besides holding the lock it makes autograd save weights as tensors of their own: autograd saves a
    parameter itself, by reference, and would find in it after the call whatever the hooks left there.
    """

    def __init__(self, lock: CallLock) -> None:
        self._lock = lock
        self._saving: list[saved_tensors_hooks | None] = []

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes the lock."""
        if not self._lock.enter():
            raise ConcurrentCallError(
                f"called {type(module).__name__} while another thread is calling the same model. Its weights "
                "are moved or cast during a call, so one call at a time is possible: put a lock round "
                "the calls, or give each thread a model of its own (copy.deepcopy)"
            )
        try:
            self._saving.append(_save_apart() if torch.is_grad_enabled() else None)
        except BaseException:  # torch.func forbids hooks for saved tensors; without, gradients would be wrong
            self._lock.leave()
            raise

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """Releases it."""
        saving = self._saving.pop()
        if saving is not None:
            saving.__exit__()
        self._lock.leave()

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """Releases it."""
        self.post_forward(module, None)


class _PackApart:
    """Gives a tensor that autograd saves a life of its own, then does what the user's own hook would."""

    def __init__(self, pack: Callable[[torch.Tensor], Any]) -> None:
        self._pack = pack

    def __call__(self, tensor: torch.Tensor) -> Any:
        return self._pack(tensor.detach())


def _save_apart() -> saved_tensors_hooks | None:
    """Starts to save tensors apart, unless an outer call has; torch asks the latest hooks only."""
    pack, unpack = _top_saved_tensors_hooks(True) or (_same, _same)
    if isinstance(pack, _PackApart):
        return None
    saving = saved_tensors_hooks(_PackApart(pack), unpack)
    saving.__enter__()
    return saving


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
