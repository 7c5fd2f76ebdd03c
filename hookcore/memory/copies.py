"""Copies and pickles of a parameter that, between calls, does not hold what calls compute with.

A copied module has no hooks, so its parameters must hold what they are computed with. `copy.deepcopy` and
pickle look for the methods that say so on the object itself.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_METHODS = ("__deepcopy__", "__reduce_ex__")


def copy_as(tensor: torch.Tensor, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Has copies and pickles of a parameter be ordinary parameters that hold another value.

    Args:
        tensor: The parameter. It is referred to weakly, so that it can be freed at once.
        value: Given the parameter, returns what a copy is to hold, in memory of its own.
    """
    reference = weakref.ref(tensor)
    vars(tensor)["__deepcopy__"] = partial(_deepcopy, reference, value)
    vars(tensor)["__reduce_ex__"] = partial(_reduce, reference, value)


def copy_as_is(tensor: torch.Tensor) -> None:
    """Has a parameter be copied as any other."""
    for method in _METHODS:
        vars(tensor).pop(method, None)


def is_copied_as_is(tensor: torch.Tensor) -> bool:
    """Whether nothing is said of how a tensor is copied."""
    return _METHODS[0] not in vars(tensor)


def _deepcopy(
    reference: weakref.ref[torch.Tensor],
    value: Callable[[torch.Tensor], torch.Tensor],
    _memo: dict[int, Any],  # copy.deepcopy itself notes the result there
) -> nn.Parameter:
    tensor = _given(reference)
    return nn.Parameter(value(tensor), tensor.requires_grad)


def _reduce(
    reference: weakref.ref[torch.Tensor], value: Callable[[torch.Tensor], torch.Tensor], protocol: int
) -> Any:
    tensor = _given(reference)
    copied = nn.Parameter(value(tensor), tensor.requires_grad)
    vars(copied).update({name: it for name, it in vars(tensor).items() if name not in _METHODS})
    return copied.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _given(reference: weakref.ref[torch.Tensor]) -> torch.Tensor:
    tensor = reference()
    if tensor is None:
        raise ReferenceError("the parameter this method was made for is gone; copy parameters as a whole")
    return tensor
