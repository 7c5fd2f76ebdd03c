"""Copies and pickles of tensors that techniques convert or move.

A copied module has no hooks, so its tensors have to hold the values that calls compute with, on the device
that the original came from. One technique may say the values, another one the device. `copy.deepcopy` and
pickle look up how to copy on the tensor object itself, so that ties between modules hold.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import ItemsView, ValuesView
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.multiprocessing.reductions import reduce_tensor

from hookcore.target import has_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hookcore.target import TensorSlot

_DEEPCOPY, _REDUCE = "__deepcopy__", "__reduce_ex__"


class _CopyRule:
    """How one tensor is copied.

    Attributes:
        values: Functions that turn the tensor's data into the values to copy, in the order to apply them.
        device: The device of the copies; None for the one that the values are on.
    """

    __slots__ = ("_reference", "device", "values")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._reference = weakref.ref(tensor)  # a tensor is freed without the garbage collector
        self.values: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
        self.device: torch.device | None = None

    @staticmethod
    def of(tensor: torch.Tensor) -> _CopyRule | None:
        """The rule that a tensor has."""
        found = getattr(tensor.__dict__.get(_DEEPCOPY), "__self__", None)
        return found if isinstance(found, _CopyRule) else None

    @staticmethod
    def make(tensor: torch.Tensor) -> _CopyRule:
        """The rule that a tensor has, or a new one."""
        rule = _CopyRule.of(tensor)
        if rule is None:
            rule = _CopyRule(tensor)
            tensor.__dict__[_DEEPCOPY] = rule.deepcopy
            tensor.__dict__[_REDUCE] = rule.reduce
        return rule

    def drop_if_empty(self) -> None:
        """Leave the tensor to its class where there is nothing to say about its copies."""
        tensor = self._reference()
        if tensor is not None and not self.values and self.device is None:
            del tensor.__dict__[_DEEPCOPY], tensor.__dict__[_REDUCE]

    def deepcopy(self, _memo: dict[int, Any]) -> torch.Tensor:
        """As `__deepcopy__`; `copy.deepcopy` itself notes the result in the memo."""
        return self.copy()[0]

    def reduce(self, protocol: int) -> Any:
        """As `__reduce_ex__`."""
        copied, attributes = self.copy()
        copied.__dict__.update(attributes)
        return copied.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def copy(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return an ordinary tensor in memory of its own, and the attributes that the original was given."""
        tensor = self._reference()
        if tensor is None:
            raise ReferenceError("the tensor this method was made for is gone; copy tensors as a whole")
        data = tensor.data
        for value in self.values:
            data = value(data)
        data = data.to(self.device or data.device)
        if data.data_ptr() == tensor.data_ptr():
            data = data.clone()
        attributes = {name: it for name, it in vars(tensor).items() if name not in (_DEEPCOPY, _REDUCE)}
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(data, tensor.requires_grad), attributes
        return data.requires_grad_(tensor.requires_grad), attributes


def copy_as(tensor: torch.Tensor, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make copies and pickles of a tensor ordinary tensors with other values.

    A function given later is applied before those given earlier: techniques are attached from inside out.

    Args:
        tensor: The tensor.
        value: Given the tensor's data, returns what a copy holds.
    """
    rule = _CopyRule.make(tensor)
    rule.values = (value, *rule.values)


def stop_copying_as(tensor: torch.Tensor, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """End what `copy_as` with these arguments began."""
    rule = _CopyRule.of(tensor)
    if rule is not None:
        rule.values = tuple(it for it in rule.values if it != value)
        rule.drop_if_empty()


def copy_to(tensor: torch.Tensor, device: torch.device) -> None:
    """Make copies and pickles of a tensor lie on the device that it came from, wherever it is.

    Args:
        tensor: The tensor; left alone if it is of a kind that is never moved.
        device: The device; if it is the meta device, which holds no values, copies are where the tensor is.
    """
    if has_memory(tensor) and device.type != "meta":
        _CopyRule.make(tensor).device = device


def stop_copying_to(tensor: torch.Tensor) -> None:
    """End what `copy_to` began."""
    rule = _CopyRule.of(tensor)
    if rule is not None:
        rule.device = None
        rule.drop_if_empty()


class PlacedTensors(dict[str, torch.Tensor | None]):
    """Stands in for a module's `_parameters` or `_buffers` while their tensors are elsewhere.

    A copy or a pickle of it is a plain dict. Tensors that a call put in the place of others are on the device
    of calls, and are copied to the device that the others came from.

    Args:
        original: The dict; up to date again after `give_back`.
    """

    __slots__ = ("_inner", "_original")

    def __init__(self, original: dict[str, torch.Tensor | None]) -> None:
        super().__init__(original)
        self._original = original
        self._inner = original if isinstance(original, PlacedTensors) else None

    def seen(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """What a reader of this name is given for the tensor that is there; a subclass may convert it."""
        return tensor if self._inner is None else self._inner.seen(name, tensor)

    def items(self) -> Any:
        """As `dict.items`."""
        return super().items() if self._inner is None else SeenItems(self)

    def values(self) -> Any:
        """As `dict.values`."""
        return super().values() if self._inner is None else SeenValues(self)

    def give_back(self) -> dict[str, torch.Tensor | None]:
        """Return the original dict, with the tensors that there are now."""
        self._original.clear()
        self._original.update(self)
        return self._original

    def __reduce_ex__(self, _protocol: Any) -> Any:
        rules = (rule for it in dict.values(self._original) if it is not None and (rule := _CopyRule.of(it)))
        home = next((rule.device for rule in rules if rule.device is not None), None)
        return dict, ({name: _moved_home(tensor, home) for name, tensor in dict.items(self)},)


class SeenItems(ItemsView[str, "torch.Tensor | None"]):
    """The items of a `PlacedTensors` as readers see them, each converted when it is come to."""

    _mapping: PlacedTensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, tensor in dict.items(self._mapping):
            yield name, self._mapping.seen(name, tensor)


class SeenValues(ValuesView["torch.Tensor | None"]):
    """The values, likewise."""

    _mapping: PlacedTensors

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        for name, tensor in dict.items(self._mapping):
            yield self._mapping.seen(name, tensor)


def _moved_home(tensor: torch.Tensor | None, home: torch.device | None) -> torch.Tensor | None:
    """Move a tensor that a call put in the place of another one; all others have rules of their own."""
    if tensor is None or home is None or tensor.device == home or _CopyRule.of(tensor):
        return tensor
    moved = tensor.detach().to(home)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def stand_in(slots: Iterable[TensorSlot], places: list[tuple[nn.Module, str]]) -> None:
    """Put `PlacedTensors` in the place of the dicts that hold these tensors, where none stands yet.

    Args:
        slots: The tensors.
        places: Where to note each module and the name of its dict, for `step_back`.
    """
    for module, name in (owner for slot in slots for owner in slot.owners):
        for kind in ("_parameters", "_buffers"):
            original = module.__dict__[kind]
            if name in original and not isinstance(original, PlacedTensors):
                places.append((module, kind))
                module.__dict__[kind] = PlacedTensors(original)


def step_back(places: list[tuple[nn.Module, str]]) -> None:
    """End what `stand_in` began."""
    for module, kind in places:
        tensors = module.__dict__[kind]
        if type(tensors) is PlacedTensors:
            module.__dict__[kind] = tensors.give_back()
    places.clear()


def _reduce_for_process(tensor: torch.Tensor) -> Any:
    """Reduce a tensor for another process: that way of pickling asks by class, and not the object."""
    rule = _CopyRule.of(tensor)
    if rule is None:
        return reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    return operator.getitem, ((rule.copy()[0],), 0)  # whatever loads it need not know of hookcore


for _kind in (torch.Tensor, nn.Parameter):
    ForkingPickler.register(_kind, _reduce_for_process)
