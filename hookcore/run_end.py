"""Call functions at the end of each run of a target, such as a pipeline."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hookcore.hook import Hook
from hookcore.stack import HookStack

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    from torch import nn


def call_after(
    reference: weakref.ref[Any], method: str, function: Callable[[], object]
) -> Callable[[], None]:
    """Call a function whenever a method of an object has returned.

    The method is hooked as a module's entry is: copies of the object have it plain, and nothing is left of it
    when the last function is taken away.

    Args:
        reference: The object, weakly. If it is gone, there is nothing to do.
        method: The method's name.
        function: What is called.

    Returns:
        What undoes it.
    """
    hook = _After(function)
    _change(reference, method, lambda hooks: (*hooks, hook))
    return partial(_change, reference, method, lambda hooks: tuple(it for it in hooks if it is not hook))


def _change(
    reference: weakref.ref[Any], method: str, changed: Callable[[tuple[Hook, ...]], tuple[Hook, ...]]
) -> None:
    target = reference()
    if target is not None:
        stack = HookStack.at(target, method)
        HookStack.set(target, method, changed(stack.hooks if stack else ()))


class _After(Hook):
    """Calls a function when the call has returned."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def post_forward(self, module: nn.Module, output: Any) -> None:
        self._function()
