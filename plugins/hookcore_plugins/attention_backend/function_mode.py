"""Sends calls of torch's attention function to another one, only in calls of hooked modules.

A mode of torch belongs to one thread and intercepts torch's functions however they were imported. One mode is
on during the call of the outermost hooked module; the innermost hooked module decides where attention goes.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from hookcore_plugins.attention_backend.compiled import multi_head_attention_with

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    Attend = Callable[..., Tensor]

_ATTENTION = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward


class _Scope(threading.local):
    """Where attention goes in this thread; outside of hooked calls, to torch's own function."""

    attend: Attend = _ATTENTION  # never None: before torch 2.13, torch.compile stumbles over that


_SCOPE = _Scope()


class _AttentionMode(TorchFunctionMode):
    """Intercepts torch's attention function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function that was asked for, unless it computes attention."""
        if func is _ATTENTION:
            func = _SCOPE.attend
        elif func is _MULTI_HEAD:
            func = multi_head_attention_with(_SCOPE.attend)
        return func(*args, **kwargs) if kwargs else func(*args)


_MODE = _AttentionMode()


def redirected(attend: Attend, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a call in which `attend` replaces torch's attention function.

    Args:
        attend: Takes the arguments of torch's function; no mode of this module is on while it runs.
        call: The call to run.
        *args: Its arguments.
        **kwargs: Likewise.

    Returns:
        What the call returns.
    """
    outer = _SCOPE.attend
    try:
        _SCOPE.attend = attend
        if outer is not _ATTENTION:
            return call(*args, **kwargs)
        with _MODE:
            return call(*args, **kwargs)
    finally:
        _SCOPE.attend = outer


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Turn the mode off in this thread within a `with` block, for calls of compiled code."""
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
