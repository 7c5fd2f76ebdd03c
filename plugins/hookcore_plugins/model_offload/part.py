"""Weights that go to the device and from it together: a component's own, or those that some of them share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from hookcore.memory import (
    FlatGroup,
    Group,
    SynchronousMover,
    copy_to,
    current_tensors,
    flat_nbytes,
    go_back,
    memory_seen_elsewhere,
    move_apart,
    move_gradient,
    planned_nbytes,
    stop_copying_to,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookcore import TensorSlot
    from hookcore_plugins.model_offload.link import Link, Transfer

_CPU = torch.device("cpu")
_LARGE = 2**10
"""Bytes from which a buffer moves like a weight: quantized layers hold weights and scales as buffers."""


class Part:
    """Weights that lie side by side in locked host memory, which is kept while they are on the device.

    So going off costs nothing but what was changed: what torch counts as changed, and what was read between
    two calls, since `weight.data` can be changed uncounted. Small buffers, which calls change, stay on the
    device.

    Args:
        name: Of the components that have it, for people.
        slots: The weights and buffers. Nothing is changed before `attach`.
        device: Where they are used.
        link: The way there.

    Attributes:
        wanted_by: Names of the components that want it on the device.
        is_on: Whether its tensors show the device's memory.
    """

    def __init__(self, name: str, slots: Sequence[TensorSlot], device: torch.device, link: Link) -> None:
        self._name = name
        self.wanted_by: set[str] = set()
        self.is_on = False
        self._device = device
        self._link = link
        staying = tuple(slot for slot in slots if slot.is_buffer and slot.nbytes < _LARGE)
        self._slots = [slot for slot in slots if slot not in staying]
        self._moving_buffers = [slot for slot in self._slots if slot.is_buffer]
        self._buffers = Group("buffers", staying, ())
        self._attached = 0  # by how many components
        self._mover = SynchronousMover(device, _CPU)
        self._homes: dict[TensorSlot, torch.device] = {}
        self._left: list[tuple[torch.Tensor, torch.Tensor]] = []  # memory that others see, too
        self._uncounted: list[TensorSlot] = []  # made in inference mode; always copied back
        self._packed = FlatGroup(())
        self._load: Transfer | None = None
        self._copied: Any = None  # the event after the last copy that reads host memory
        self._stale: set[int] = set()  # positions of tensors that may have been changed where they show
        self._versions: list[int] = []
        self._position: dict[int, int] = {}

    def __del__(self) -> None:
        # A model that goes away with its hooks on: the last copy may still read memory that goes with it.
        if not sys.is_finalizing() and getattr(self, "_copied", None) is not None:
            self._wait()

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the buffers that stay."""
        return self._packed.nbytes + sum(slot.nbytes for slot in self._uncounted)

    @property
    def size(self) -> int:
        """What `nbytes` will be when it is attached."""
        uncounted = [slot for slot in self._slots if any(it.is_inference() for it in current_tensors(slot))]
        flat = [slot for slot in self._slots if slot not in uncounted]
        return flat_nbytes(flat) + planned_nbytes(uncounted)

    @property
    def staying(self) -> int:
        """Bytes of what stays on the device."""
        return planned_nbytes(self._buffers.slots)

    @property
    def locked(self) -> int:
        """Bytes of host memory that are page-locked for it."""
        return self._packed.nbytes if self._packed.is_locked else 0

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory on the device, or will when its copy is there."""
        return self._load is not None

    @property
    def is_locked(self) -> bool:
        """Whether the device copies it without the host's waiting."""
        return self._packed.is_locked

    def attach(self) -> None:
        """Move parameters to locked host memory and buffers to the device, unless that has been done."""
        if not self._attached:
            came_from = [(tensor, tensor.device) for tensor in self._tensors]
            self._mover.attach(self._buffers, resident=True)
            now = {slot: tensors for slot in self._slots if (tensors := current_tensors(slot))}
            self._homes = {slot: tensors[0].device for slot, tensors in now.items()}
            self._uncounted = [slot for slot in now if any(it.is_inference() for it in now[slot])]
            self._left = memory_seen_elsewhere(slot for slot in now if slot not in self._uncounted)
            try:
                move_apart(dict.fromkeys(self._uncounted, _CPU))
                self._pack()
            except BaseException:
                move_apart({slot: self._homes[slot] for slot in self._uncounted})
                self._mover.detach(self._buffers)
                raise
            for tensor, device in came_from:
                copy_to(tensor, device)
        self._attached += 1

    def detach(self) -> None:
        """Move all to where it came from, into memory of its own, unless another component needs it."""
        if self._attached == 1:
            self.turn_off()
            try:
                self._wait()
                self._mover.detach(self._buffers)
                move_apart(self._homes)
                go_back(self._left)
                self._left = []
                self._release()
            except BaseException:
                self._mover.attach(self._buffers, resident=True)
                raise
            for tensor in self._tensors:
                stop_copying_to(tensor)
        self._attached -= 1

    def begin_copy(self) -> None:
        """Begin to copy it to the device; until it is turned on, its tensors show host memory.

        Raises:
            torch.OutOfMemoryError: The device has no room for it.
        """
        if not self._packed.is_home:  # somebody gave a tensor other data, as `weight.data = ...` does
            self._release()
            self._pack()
        self._load = self._link.copy(self._packed)
        self._copied = self._load.ready
        self._note()

    def turn_on(self) -> bool:
        """Show the device's memory in its tensors, for what is computed from now on.

        Returns:
            Whether it had to be copied.

        Raises:
            torch.OutOfMemoryError: The device has no room for it; it is off then.
        """
        if self.is_on:
            if not self._was_given_data():
                self._link.use(self._loaded)
                return False
            self.turn_off()
        elif self.is_loaded and not self._packed.is_home:
            self._drop()
        copies = not self.is_loaded
        if copies:
            self.begin_copy()
        transfer, changed = self._loaded, self._changed()
        self._link.use(transfer)
        try:
            move_apart(dict.fromkeys(self._uncounted, self._device))
        except BaseException:
            self._drop()
            raise
        self._packed.show(transfer.views)
        self._copy(changed, self._packed.views(self._packed.host) if changed else (), transfer.views)
        self._note()
        self.is_on = True
        self._move_gradients()
        return copies

    def turn_off(self) -> None:
        """Show host memory in its tensors again, with all changes, and free the device's."""
        if not self.is_loaded:
            return
        if self.is_on:
            transfer, changed = self._loaded, self._changed()
            self._link.use(transfer)
            given = self._packed.replaced([view.data_ptr() for view in transfer.views])
            self._packed.show_host()
            self._copy(changed, transfer.views, self._packed.views(self._packed.host) if changed else ())
            for tensor, data in given:
                tensor.data = data.to(_CPU)
            move_apart(dict.fromkeys(self._uncounted, _CPU))
            self._packed.move_given_buffers(_CPU)
            self.is_on = False
            self._move_gradients()
        self._drop()

    def invalidate(self, tensors: Sequence[torch.Tensor]) -> None:
        """Invalidate copies of tensors that somebody reads, and may change, between calls."""
        self._stale.update(at for it in tensors if (at := self._position.get(id(it))) is not None)
        if not self.is_on:
            self._wait()

    # How it is done

    @property
    def _loaded(self) -> Transfer:
        if self._load is None:
            raise RuntimeError("these weights have no memory on the device")
        return self._load

    @property
    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for slot in (*self._slots, *self._buffers.slots) for tensor in slot.tensors]

    def _move_gradients(self) -> None:
        for tensor in self._packed.tensors:
            move_gradient(tensor)

    def _pack(self) -> None:
        self._packed.move_given_buffers(_CPU)
        self._uncounted = [
            slot for slot in self._homes if any(it.is_inference() for it in current_tensors(slot))
        ]
        counted = [slot for slot in self._homes if slot not in self._uncounted]
        self._packed = FlatGroup(counted, self._name)
        self._link.host.pack(self._packed)
        self._position = {id(tensor): at for at, tensor in enumerate(self._packed.tensors)}

    def _release(self) -> None:
        """Unlock host memory that no tensor shows, when no copy reads it any more."""
        self._wait()
        self._link.host.release(self._packed.let_go())

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def _drop(self) -> None:
        self._load = None
        self._stale.clear()

    def _note(self) -> None:
        self._stale.clear()
        self._versions = [tensor._version for tensor in self._packed.tensors]

    def _changed(self) -> set[int]:
        """Positions of the tensors that may differ, where they show, from the other side of the copy."""
        counted = zip(self._packed.tensors, self._versions, strict=True)
        changed = self._stale.union(at for at, (it, version) in enumerate(counted) if it._version != version)
        for slot in self._moving_buffers:  # what BatchNorm changes in them torch does not count
            if any(module.training for module, _ in slot.owners):
                changed.update(at for it in slot.tensors if (at := self._position.get(id(it))) is not None)
        return changed

    def _was_given_data(self) -> bool:
        both = ((self._packed.tensors[at], self._loaded.views[at]) for at in self._stale)
        # What is empty is at no address, wherever it is.
        return any(it.data_ptr() != view.data_ptr() or it.device != view.device for it, view in both)

    @staticmethod
    def _copy(positions: set[int], source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
        for at in positions:
            target[at].copy_(source[at])
