"""Reads of tensors that hold something else between calls than what calls compute with.

A layer whose weights are cast has them converted for its own call. Other modules read them too: a model asks
a layer for the dtype of its weight, or computes with a weight of a child that it never calls. Within a call
they get what that layer's own call would, in a tensor made for this one read; outside of calls, and where a
model is converted or looked through, everybody sees what is stored. A state dict, loading one, and copies see
the true value, which may be what is stored as it is.
"""

from __future__ import annotations

import sys
from threading import get_ident
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from hookcore.hook import Hook
from hookcore.memory.copies import PlacedTensors, SeenItems, SeenValues
from hookcore.target import own_tensors, tensor_slots

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import CodeType, FrameType
    from typing import Any

_CALL = nn.Module._call_impl.__code__
_SAVE = nn.Module._save_to_state_dict.__code__
_LOAD = nn.Module._load_from_state_dict.__code__
_LOOKING: frozenset[CodeType] = frozenset(
    function.__code__
    for function in (
        nn.Module._apply,
        nn.Module.requires_grad_,
        nn.Module.zero_grad,
        own_tensors,
        tensor_slots,
    )
)
"""What goes through a module's tensors themselves, also within a call: to change or count them."""

_AROUND = frozenset({"pre_forward", "post_forward", "on_error"})
"""Methods of hooks, which see what is stored: they stand around the call and are not in it."""


class Conversion(Protocol):
    """What a tensor holds between calls, and what calls find.

    Attributes:
        thread: The thread in whose call the tensor itself holds what calls find; None between calls.
    """

    thread: int | None

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or while it is converted for a call another one that holds what is stored."""

    def computed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor that holds what calls find."""

    def saved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what a state dict holds for the tensor."""

    def loaded(self, tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return what torch is to write into the tensor for a value of a state dict."""


class ConvertedTensors(PlacedTensors):
    """Stands in for a module's `_parameters` or `_buffers`, and converts a tensor for who reads it in a call.

    Args:
        original: What it stands in for; up to date again after `give_back`.
        entries: Names of methods that count as calls when a module runs them, besides calling it.
    """

    __slots__ = ("_entries", "conversions")

    def __init__(self, original: dict[str, torch.Tensor | None], entries: frozenset[str]) -> None:
        super().__init__(original)
        self._entries = entries
        self.conversions: dict[str, Conversion] = {}

    def __getitem__(self, name: str) -> torch.Tensor | None:
        tensor = dict.__getitem__(self, name)
        conversion = None if is_dynamo_compiling() else self.conversions.get(name)
        if conversion is None or conversion.thread == get_ident():
            return tensor if self._inner is None else self._inner.seen(name, tensor)
        return self.seen(name, tensor)

    def seen(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Return what a reader of this name is given."""
        # What a compiled call needs is converted for the whole of it, and must not be traced here.
        if is_dynamo_compiling():
            return tensor
        conversion = self.conversions.get(name)
        if conversion is not None and tensor is not None and conversion.thread != get_ident():
            frame = _deciding_frame(sys._getframe(1), self._entries)
            code = None if frame is None else frame.f_code
            if code is None or code in _LOOKING:
                tensor = conversion.stored(tensor)
            elif code is _SAVE:
                tensor = conversion.saved(tensor)
            elif frame is not None and code is _LOAD:
                _convert_loaded(frame.f_locals, name, tensor, conversion)
                tensor = conversion.stored(tensor)
            else:
                tensor = conversion.computed(tensor)
        return super().seen(name, tensor)

    def items(self) -> Any:
        """As `dict.items`."""
        return SeenItems(self)

    def values(self) -> Any:
        """As `dict.values`."""
        return SeenValues(self)

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`."""
        return self[name] if name in self else default  # noqa: SIM401 - that would be this method again


def convert_reads(
    owners: Iterable[tuple[nn.Module, str]], conversion: Conversion, entries: Iterable[str]
) -> None:
    """Convert reads of a tensor through its modules.

    Args:
        owners: The modules that hold it, each with the attribute's name.
        conversion: What it holds, and what calls find.
        entries: Names of methods through which the model is called, besides calling it.
    """
    for module, name in owners:
        kind = "_parameters" if name in module._parameters else "_buffers"
        tensors = module.__dict__[kind]
        if not isinstance(tensors, ConvertedTensors):
            tensors = module.__dict__[kind] = ConvertedTensors(tensors, frozenset(entries))
        tensors.conversions[name] = conversion


def stop_converting_reads(owners: Iterable[tuple[nn.Module, str]], conversion: Conversion) -> None:
    """End what `convert_reads` began."""
    for module, name in owners:
        for kind in ("_parameters", "_buffers"):
            tensors = module.__dict__[kind]
            if isinstance(tensors, ConvertedTensors):
                if tensors.conversions.get(name) is conversion:
                    del tensors.conversions[name]
                if not tensors.conversions:
                    module.__dict__[kind] = tensors.give_back()


def read_as(tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """A parameter for one read, with other data; autograd takes it for the tensor itself where it records.

    Gradients then have the dtype of the data, as where the tensor itself holds it for a call.
    """
    if not tensor.requires_grad or not torch.is_grad_enabled():
        return nn.Parameter(data, tensor.requires_grad)
    before = tensor.data
    try:
        tensor.data = data
        read = tensor.view_as(tensor)
    finally:
        tensor.data = before
    read._is_param = True  # what torch goes by in isinstance
    return read


def _convert_loaded(
    arguments: Mapping[str, Any], name: str, tensor: torch.Tensor, conversion: Conversion
) -> None:
    """Convert the value that torch is about to write into a tensor, in the dict that torch made for it."""
    if arguments["local_metadata"].get("assign_to_params_buffers", False):
        return  # what is assigned is a new tensor
    state, key = arguments["state_dict"], arguments["prefix"] + name
    value = state.get(key)
    if isinstance(value, torch.Tensor) and value.shape == tensor.shape:  # or torch itself refuses it
        state[key] = conversion.loaded(tensor, value)


def _deciding_frame(frame: FrameType | None, entries: frozenset[str]) -> FrameType | None:
    """The innermost frame on this thread that calls a module, or goes through its tensors; None for neither.

    Hooks stand around a call and are not in it, so for them, too, it is None.
    """
    while frame is not None:
        code = frame.f_code
        if code is _CALL or code is _SAVE or code is _LOAD or code in _LOOKING:
            return frame
        name = code.co_name
        if name in entries and isinstance(frame.f_locals.get("self"), nn.Module):
            return frame
        if name in _AROUND and isinstance(frame.f_locals.get("self"), Hook):
            return None
        frame = frame.f_back
    return None
