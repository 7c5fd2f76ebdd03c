"""Methods whose attention goes to a backend, and which torch.compile can trace as it traces any other."""

from __future__ import annotations

import functools
from types import FunctionType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import nn
from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.overrides import TorchFunctionMode

from hookcore_plugins.attention_backend.counts import CompiledTally

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hookcore_plugins.attention_backend.dispatch import Choice

_ATTENTION = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward


_FUSING = frozenset(
    kind.forward for kind in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
)


def _never(_tensors: object) -> bool:
    return False


def _always(_tensors: object) -> bool:
    return True


class Traceable:
    """Makes such methods, one function for each function that they stand for.

    So blocks that share compiled code go on to share it: torch.compile holds code for functions, not for
    modules.

    Args:
        choice: What the user chose.
    """

    def __init__(self, choice: Choice) -> None:
        self._choice = evolve(choice, tally=CompiledTally(choice.tally))
        self._made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def method(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a method of a module.

        Args:
            module: The module.
            entry: Its method, without hooks.
        """
        if isinstance(entry, MethodType) and entry.__self__ is module:
            return MethodType(self._function(entry.__func__), module)
        return self._function(entry)  # what somebody has put on the instance

    def _function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._made:
            label = getattr(function, "__qualname__", type(function).__qualname__)
            attend = functools.partial(self._choice.attend, label)
            self._made[function] = _redirecting(_unfused(function), attend)
        return self._made[function]


def _redirecting(function: Callable[..., Any], compute: Callable[..., Tensor]) -> Callable[..., Any]:
    def attend(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C.DisableTorchFunction():  # that of a module around this one, too
            return compute(*args, **kwargs)

    multi_head = with_attention(attend)

    def redirecting(*args: Any, **kwargs: Any) -> Any:
        with _Redirecting(attend, multi_head):
            return function(*args, **kwargs)

    return redirecting


def with_attention(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """`torch.nn.functional.multi_head_attention_forward`, but with another attention function.

    While a mode handles a function of torch's that is written in Python, it doesn't see what that calls. So
    the same code is run with other names: that of the attention function, and that by which torch would ask
    the mode again.
    """
    names = {"has_torch_function": _never, "scaled_dot_product_attention": attend}
    return _with_names(_MULTI_HEAD, names)


def _unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that may call one fused kernel, but told that there is a mode, with which torch calls none.

    torch.compile does not tell of modes.
    """
    return _with_names(function, {"torch": _TorchWithMode()}) if function in _FUSING else function


class _TorchWithMode:
    """torch, with the answer that it gives to its modules while there is a mode."""

    overrides = SimpleNamespace(has_torch_function=_always)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _with_names(function: Any, names: dict[str, Any]) -> Callable[..., Any]:
    """A function with other things under the names that its code uses."""
    known = {**function.__globals__, **names}
    del known["__name__"]  # by which torch.compile would find torch's own names again
    return FunctionType(function.__code__, known, function.__name__, function.__defaults__)


class _Redirecting(TorchFunctionMode):
    """Sends calls of torch's attention function to another one; it is on in traced code only."""

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
        """Goes on to the function that was called, unless it is one of those."""
        if func is _ATTENTION:
            func = self._attend
        elif func is _MULTI_HEAD:
            func = self._multi_head
        elif func is torch.Tensor.unflatten:  # which torch.compile cannot trace here
            func = torch.unflatten
        return func(*args, **kwargs) if kwargs else func(*args)
