"""Tensors whose true value a hook says: what they hold between calls is not what calls compute with."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING

import torch

from hookcore.memory.converted_reads import convert_reads, read_as, stop_converting_reads
from hookcore.memory.copies import copy_as, stop_copying_as

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from hookcore.hook import Hook
    from hookcore.target import TensorSlot


class TrueValue:
    """Asks a hook for the values of a slot's tensors in reads within calls, state dicts and copies.

    Args:
        hook: The hook; it overrides `true_value`.
        module: The module that it stands at.
        slot: The tensors.
        entries: Names of methods through which the model is called, besides calling it.
    """

    def __init__(self, hook: Hook, module: nn.Module, slot: TensorSlot, entries: Iterable[str]) -> None:
        self._hook = hook
        self._module = module
        self._slot = slot
        self._entries = entries
        self.thread: int | None = None
        # Tensors are freed without the garbage collector, so what lies on them must not refer back to them.
        own = weakref.ref(self)
        self._copied = [partial(_value_in_copy, own, weakref.ref(tensor)) for tensor in slot.tensors]

    def begin(self) -> None:
        """Start asking; begun before, it does nothing."""
        self.end()
        for tensor, value in zip(self._slot.tensors, self._copied, strict=True):
            copy_as(tensor, value)
        convert_reads(self._slot.owners, self, self._entries)

    def end(self) -> None:
        """Stop asking; over before, it does nothing."""
        stop_converting_reads(self._slot.owners, self)
        for tensor, value in zip(self._slot.tensors, self._copied, strict=True):
            stop_copying_as(tensor, value)

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        return tensor

    def computed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with the true value; the tensor itself while that is what it holds."""
        data = tensor.data
        value = self.value(tensor, data)
        return tensor if value is data else read_as(tensor, value)

    def value(self, tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """The true value of a tensor that holds this data."""
        return self._hook.true_value(self._module, tensor, data)

    def saved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Likewise."""
        with torch.no_grad():
            return self.computed(tensor)

    def loaded(self, tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return what the hook stores for the value."""
        return self._hook.stored_value(self._module, tensor, value)


def _value_in_copy(
    true_value: weakref.ref[TrueValue], tensor: weakref.ref[torch.Tensor], data: torch.Tensor
) -> torch.Tensor:
    """Return what a copy holds of a tensor whose data this is."""
    own, original = true_value(), tensor()
    return data if own is None or original is None else own.value(original, data)
