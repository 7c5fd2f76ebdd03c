"""Groups copied from one device to another when they are needed, each copy waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import define
from torch import nn

from hookcore.memory.mover import GroupMover
from hookcore.memory.planning.residency import largest_held
from hookcore.memory.tensor_memory import (
    by_memory,
    copy_memory,
    current_tensors,
    is_on,
    move_to_copies,
    moved_as_made,
    tensor_at,
    tensors_left,
    version_of,
)
from hookcore.storage import planned_nbytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hookcore.memory.grouping import Group
    from hookcore.memory.mover import ComponentGroups
    from hookcore.target import TensorSlot


@define(eq=False)
class _Brought:
    """Tensors on one piece of memory, which for now hold a copy of it.

    Attributes:
        slot: What they are.
        tensors: The distinct objects that modules hold.
        sources: What the data of each was before.
        addresses: Where the data of each is now.
        versions: How often torch had counted a change of each.
        original: All of the memory, flat.
        copy: Its copy, flat.
    """

    slot: TensorSlot
    tensors: list[torch.Tensor]
    sources: list[torch.Tensor]
    addresses: list[int]
    versions: list[int | None]
    original: torch.Tensor
    copy: torch.Tensor


class SynchronousMover(GroupMover):
    """Copies groups from an offload device to an onload device, and waits for each copy.

    What is copied is what the tensors hold when the copy begins, so every change between two calls counts.
    The offloaded memory is kept meanwhile and the copy thrown away at the end. What a call changed in
    place is copied back first: torch counts such changes, except those that BatchNorm and
    `buffer.data` make, so buffers of modules in training mode are always copied back.

    Args:
        onload_device: Where groups are brought.
        offload_device: Where they lie between calls.
    """

    def __init__(self, onload_device: torch.device, offload_device: torch.device) -> None:
        self._onload_device = onload_device
        self._offload_device = offload_device
        self._homes: dict[TensorSlot, torch.device] = {}
        self._brought: dict[Group, list[_Brought]] = {}
        self._expected: dict[str, ComponentGroups] = {}

    def attach(self, group: Group, *, resident: bool) -> None:
        """Move a group to where it lies between calls, as far as it isn't there."""
        device = self._onload_device if resident else self._offload_device
        found = {slot: tensors for slot in group.slots if (tensors := current_tensors(slot))}
        for slot, tensors in found.items():
            self._homes.setdefault(slot, tensors[0].device)
        _move((tensors, device) for tensors in found.values())

    def detach(self, group: Group) -> None:
        """Move a group back to the device that it came from, as far as it isn't there."""
        homes = {slot: self._homes[slot] for slot in group.slots if slot in self._homes}
        _move((tensors_left(slot, self._onload_device), device) for slot, device in homes.items())
        for slot in homes:
            del self._homes[slot]

    def onload(self, group: Group) -> None:
        """Give the group's tensors a copy of their memory; a real one even on the same device."""
        brought: list[_Brought] = []
        views: list[torch.Tensor] = []
        for slot in group.slots:
            for tensors in by_memory(current_tensors(slot)):
                original, copy, new = copy_memory(tensors, self._onload_device)
                views += new
                brought.append(
                    _Brought(
                        slot=slot,
                        tensors=tensors,
                        sources=[tensor.data for tensor in tensors],
                        addresses=[view.data_ptr() for view in new],
                        versions=[version_of(tensor) for tensor in tensors],
                        original=original,
                        copy=copy,
                    )
                )
        # Only now that all memory could be had is anything rebound.
        self._brought[group] = brought
        for tensor, view in zip((it for one in brought for it in one.tensors), views, strict=True):
            tensor.data = view

    def offload(self, group: Group) -> None:
        """Give the group's tensors their own memory back, with what a call changed in place."""
        if group not in self._brought:
            return
        for one in self._brought[group]:
            if self._is_changed(one):
                with torch.inference_mode(one.original.is_inference()):
                    one.original.copy_(one.copy)
            self._rebind(one)
        for slot in group.slots:
            self._keep_new_tensors(slot)
        del self._brought[group]

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """All of its bytes, under where they lie."""
        where = f"resident on {self._onload_device}" if resident else f"offloaded on {self._offload_device}"
        return {where: group.nbytes}

    def expect(self, needed: ComponentGroups) -> None:
        """Record what a component needs."""
        self._expected[needed.component] = needed

    def needs(self) -> dict[str, int]:
        """Return what stays, and the most that calls nested in each other hold at once."""
        most = nbytes = 0
        for needed in self._expected.values():
            sizes = {group: planned_nbytes(group.slots) for group in needed.groups}
            nbytes += sum(planned_nbytes(group.slots) for group in needed.resident)
            if self._onload_device == self._offload_device:  # of which it holds copies
                nbytes += sum(sizes.values())
            aliases = {group: planned_nbytes(home.slots) for group, home in needed.aliases.items()}
            held, _ = largest_held(sizes | aliases)
            most = max(most, held)
        return {str(self._onload_device): nbytes + most}

    @staticmethod
    def _is_changed(brought: _Brought) -> bool:
        """Return whether a call may have changed the copy in place."""
        of_each = zip(brought.tensors, brought.addresses, brought.versions, strict=True)
        there = [(tensor, version) for tensor, at, version in of_each if tensor.data_ptr() == at]
        if brought.slot.is_buffer and any(module.training for module, _ in brought.slot.owners):
            return True
        # Where there is no count: a parameter that its own forward changes is unheard of.
        return any(
            brought.slot.is_buffer if version is None else version != tensor._version
            for tensor, version in there
        )

    def _rebind(self, brought: _Brought) -> None:
        """Give tensors their own memory back."""
        of_each = zip(brought.tensors, brought.sources, brought.addresses, strict=True)
        for tensor, source, address in of_each:
            if tensor.data_ptr() == address:
                tensor.data = source
            elif not is_on(tensor, self._offload_device):  # given other data, as `weight.data = ...` does
                tensor.data = moved_as_made(tensor.data, self._offload_device)

    def _keep_new_tensors(self, slot: TensorSlot) -> None:
        """Move tensors that a call put in the place of the slot's own to the offload device."""
        for module, name in slot.owners:
            tensor = tensor_at(module, name)
            if tensor is None or is_on(tensor, self._offload_device):
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = moved_as_made(tensor.data, self._offload_device)
            else:
                # The call may have returned this very tensor: it must stay where it is.
                module._buffers[name] = moved_as_made(tensor, self._offload_device)


def _move(devices: Iterable[tuple[list[torch.Tensor], torch.device]]) -> None:
    """Move the tensors of slots that are elsewhere to a device; all of them or, if it raises, none."""
    move_to_copies(([it for it in of_slot if not is_on(it, device)], device) for of_slot, device in devices)
