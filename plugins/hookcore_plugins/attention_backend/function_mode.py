"""Sends calls of torch's attention function to another one, in the calls of some modules and nowhere else.

torch lets a mode, which belongs to one thread, stand in for its functions however they were imported. The
mode is on while a hooked module is called. There is one at a time, at the outermost of hooked modules inside
each other; whose attention it is, the innermost says.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from hookcore_plugins.attention_backend.compiled import with_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    Attend = Callable[..., Tensor]

_ATTENTION = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward


class _Scope(threading.local):
    """What attention goes to in this thread; outside of hooked calls, torch's own function."""

    attend: Attend = _ATTENTION  # never None: before torch 2.13, torch.compile stumbles over that


_SCOPE = _Scope()


class _Redirecting(TorchFunctionMode):
    """Stands in for torch's attention function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Goes on to the function that was called, unless it is one of those."""
        if func is _ATTENTION:
            func = _SCOPE.attend
        elif func is _MULTI_HEAD:
            func = with_attention(_SCOPE.attend)
        return func(*args, **kwargs) if kwargs else func(*args)


_MODE = _Redirecting()


def redirected(attend: Attend, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls something, with `attend` in the place of torch's attention function.

    Args:
        attend: Called with what torch's function would be called with, while no mode of this module is on.
        call: What to call.
        *args: With what.
        **kwargs: Likewise.

    Returns:
        What the call returns.
    """
    outer = _SCOPE.attend
    _SCOPE.attend = attend
    try:
        if outer is not _ATTENTION:
            return call(*args, **kwargs)
        with _MODE:
            return call(*args, **kwargs)
    finally:
        _SCOPE.attend = outer


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """A `with` block in which no mode of this module is on in this thread, for code that is compiled."""
    outer = _SCOPE.attend
    if outer is _ATTENTION or _get_current_function_mode() is not _MODE:  # type: ignore[no-untyped-call]
        yield
        return
    _SCOPE.attend = _ATTENTION
    try:
        with _pop_mode_temporarily():
            yield
    finally:
        _SCOPE.attend = outer
