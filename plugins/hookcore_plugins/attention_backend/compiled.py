"""Redirects attention in compiled code, by methods that torch.compile can trace."""

from __future__ import annotations

import functools
from types import FunctionType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import nn
from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.overrides import TorchFunctionMode

from hookcore_plugins.attention_backend.counts import CompiledCounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hookcore_plugins.attention_backend.dispatch import AttentionDispatch

_ATTENTION = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward
_FUSING = frozenset(
    kind.forward for kind in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
)


class TraceableMethods:
    """Makes methods whose attention goes to a backend, one function for each function that they replace.

    torch.compile keeps code by function, so blocks that share compiled code go on to share it.

    Args:
        dispatch: Computes the attentions.
    """

    def __init__(self, dispatch: AttentionDispatch) -> None:
        self._dispatch = evolve(dispatch, counts=CompiledCounts(dispatch.counts))
        self._made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def method(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method that replaces another one in compiled code.

        Args:
            module: The module.
            entry: Its method, without hooks.
        """
        if isinstance(entry, MethodType) and entry.__self__ is module:
            return MethodType(self._function(entry.__func__), module)
        return self._function(entry)  # somebody has put it on the instance

    def _function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._made:
            label = getattr(function, "__qualname__", type(function).__qualname__)
            attend = functools.partial(self._dispatch.attend, label)
            self._made[function] = _redirecting(_unfused(function), attend)
        return self._made[function]


def _redirecting(function: Callable[..., Any], compute: Callable[..., Tensor]) -> Callable[..., Any]:
    def attend(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C.DisableTorchFunction():  # also the mode of a module around this one
            return compute(*args, **kwargs)

    multi_head = multi_head_attention_with(attend)

    def redirecting(*args: Any, **kwargs: Any) -> Any:
        with _TracedAttentionMode(attend, multi_head):
            return function(*args, **kwargs)

    return redirecting


def multi_head_attention_with(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return `torch.nn.functional.multi_head_attention_forward` with another attention function.

    While a mode handles a function of torch's that is written in Python, it doesn't see what that calls. So
    the same code runs with other names: of the attention function, and of the function by which torch would
    ask the mode again.
    """
    names = {"has_torch_function": lambda _tensors: False, "scaled_dot_product_attention": attend}
    return _with_names(_MULTI_HEAD, names)


def _unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tell a method that may call one fused kernel that a mode is on, so that it calls none.

    torch.compile does not tell of modes.
    """
    return _with_names(function, {"torch": _TorchWithMode()}) if function in _FUSING else function


class _TorchWithMode:
    """torch, with the answer that it gives to its modules while a mode is on."""

    overrides = SimpleNamespace(has_torch_function=lambda _tensors: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _with_names(function: Any, names: dict[str, Any]) -> Callable[..., Any]:
    """Copy a function and replaces some of the global names that its code uses."""
    known = {**function.__globals__, **names}
    del known["__name__"]  # by which torch.compile would find torch's own names again
    return FunctionType(function.__code__, known, function.__name__, function.__defaults__)


class _TracedAttentionMode(TorchFunctionMode):
    """Intercepts torch's attention function in traced code only."""

    def __init__(self, attend: Callable[..., Tensor], multi_head: Callable[..., Any]) -> None:
        super().__init__()
        self._attend = attend
        self._multi_head = multi_head

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function that was asked for, unless it computes attention."""
        if func is _ATTENTION:
            func = self._attend
        elif func is _MULTI_HEAD:
            func = self._multi_head
        elif func is torch.Tensor.unflatten:  # torch.compile cannot trace the method here
            func = torch.unflatten
        return func(*args, **kwargs) if kwargs else func(*args)
