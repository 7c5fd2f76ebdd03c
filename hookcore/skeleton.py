"""A copy of a model that has no data, to follow what a call does without computing anything."""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")


def skeleton_of(module: nn.Module) -> nn.Module:
    """Copy a module tree without hooks onto the meta device; floating-point tensors become float32.

    The copy shares no module, tensor or container with the original, so that whatever a call writes into
    its modules stays there, and no hook of torch's sees it. Tensors of one dtype need no casting hooks to fit
    each other.
    """
    copied = _Copier().of(module)
    assert isinstance(copied, nn.Module)  # noqa: S101 -- what is copied is of the same class
    return copied


class _Copier:
    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}  # of modules and tensors, which may be met more than once

    def of(self, value: Any) -> Any:
        if isinstance(value, nn.Module | Tensor):
            if id(value) not in self._copies:
                self._copies[id(value)] = (
                    self._module(value) if isinstance(value, nn.Module) else _without_data(value)
                )
            return self._copies[id(value)]
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.of(value.__self__))
        if type(value) in (list, tuple, set):
            return type(value)(map(self.of, value))
        if type(value) in (dict, OrderedDict):
            return type(value)((name, self.of(item)) for name, item in value.items())
        return value

    def _module(self, module: nn.Module) -> nn.Module:
        # The protocol of copying leaves out what techniques put on an instance and do to its class.
        reduced: Any = module.__reduce_ex__(4)
        make, arguments, state, *_ = reduced
        made = make(*arguments)
        self._copies[id(module)] = made  # before its attributes, which may refer to it
        others = ((name, item) for name, item in state.items() if name not in (*_HOOKS, *_TENSORS))
        made.__dict__.update((name, self.of(item)) for name, item in others)
        made.__dict__.update((name, OrderedDict()) for name in _HOOKS)
        for name in _TENSORS:  # what stands in for the dict converts what is read through it
            tensors = dict.items(state[name])
            made.__dict__[name] = {key: self.of(tensor) for key, tensor in tensors}
        return made  # type: ignore[no-any-return]


def _without_data(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    made = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
