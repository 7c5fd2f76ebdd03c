"""Keeps calls that swap weights right under threads, interrupts and autograd."""

from __future__ import annotations

import threading
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from hookcore.errors import ConcurrentCallError
from hookcore.hook import Hook

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Turn:
    """The right of one thread to call into modules, or to change their hooks, while no other thread does.

    Attributes:
        thread: Ident of the thread; None once the turn is over. One assignment ends it for all locks that
            were taken for it, so that no interrupt leaves one of them taken.
    """

    __slots__ = ("thread",)

    def __init__(self, thread: int | None) -> None:
        self.thread = thread


class _Turns(threading.local):
    current: Turn | None = None


_turns = _Turns()


def current_turn() -> Turn | None:
    """The turn of this thread's innermost call that took a lock; None outside of all.

    What a hook notes for the length of an outermost call is out of date once that turn is over, also if an
    interrupt kept the hook from being told of the end.
    """
    return _turns.current


class CallLock:
    """Lets one thread at a time call into modules whose weights move or change dtype during a call.

    Attributes:
        turn: For whom it was taken last.
    """

    __slots__ = ("_taking", "turn")

    def __init__(self) -> None:
        self._taking = threading.Lock()
        self.turn = Turn(None)

    @property
    def is_taken(self) -> bool:
        """Whether a call or a change is under way, in whichever thread."""
        return self.turn.thread is not None

    @property
    def is_ours(self) -> bool:
        """Whether this thread has taken it."""
        return self.turn.thread == get_ident()

    def take(self, turn: Turn) -> bool:
        """Take the lock until the turn is over.

        Returns:
            Whether it was free; to wait until it is would only hide the mistake.
        """
        with self._taking:
            if self.turn.thread is None:
                self.turn = turn
        return self.turn is turn


class WeightGuard(Hook):
    """Stands outside the hooks that swap weights; one serves all entries that share a lock.

    Besides holding the lock it makes autograd save weights as tensors of their own: autograd saves a
    parameter itself, by reference, and would find in it after the call whatever the hooks left there.
    """

    def __init__(self, lock: CallLock) -> None:
        self._lock = lock

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call while no other thread does."""
        thread = get_ident()
        if self._lock.turn.thread == thread:  # a call within a call
            return call(*args, **kwargs) if _saves_apart() else _call_saving_apart(call, args, kwargs)
        turn, outer = Turn(thread), _turns.current
        try:
            if not self._lock.take(turn):
                raise ConcurrentCallError(
                    f"called {type(module).__name__} while another thread is calling the same model. Its "
                    "weights are moved or cast during a call, so one call at a time is possible: put a lock "
                    "round the calls, or give each thread a model of its own (copy.deepcopy)"
                )
            _turns.current = turn
            return call(*args, **kwargs) if _saves_apart() else _call_saving_apart(call, args, kwargs)
        finally:
            turn.thread = None
            _turns.current = outer


class _PackApart:
    """Gives a tensor that autograd saves a life of its own, then does what the user's own hook would."""

    def __init__(self, pack: Callable[[torch.Tensor], Any]) -> None:
        self._pack = pack

    def __call__(self, tensor: torch.Tensor) -> Any:
        return self._pack(tensor.detach())


def _saves_apart() -> bool:
    """Return whether autograd saves nothing, or saves it apart because an outer call has it do so."""
    if not torch.is_grad_enabled():
        return True
    top = _top_saved_tensors_hooks(True)  # torch asks the latest hooks only
    return top is not None and isinstance(top[0], _PackApart)


def _call_saving_apart(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # torch.func forbids hooks for saved tensors and raises here; without, gradients would be wrong.
    pack, unpack = _top_saved_tensors_hooks(True) or (_same, _same)
    with saved_tensors_hooks(_PackApart(pack), unpack):
        return call(*args, **kwargs)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
