"""Where streamed weights lie between calls, and how their bytes get from there to the device.

`StreamMover` decides what is copied when, and what stays; it leaves all else to a store. There are two:
`PinnedStore`, which keeps weights in page-locked host memory, and `FileStore`, which leaves them in the files
that they came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from attrs import define

from hookcore.memory.device.copy_engine import CopyEngine
from hookcore.memory.device.flat_group import FlatGroup, flat_nbytes
from hookcore.memory.device.pinned_memory import PinnedMemory, Staging
from hookcore.memory.device.synchronous_mover import SynchronousMover
from hookcore.memory.grouping import is_weight
from hookcore.memory.tensor_memory import (
    current_tensors,
    go_back,
    memory_seen_elsewhere,
    move_apart,
    move_to_copies,
    tensors_left,
)
from hookcore.storage import planned_nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hookcore.memory.grouping import Group
    from hookcore.target import TensorSlot

_CPU = torch.device("cpu")
_STAGED = 3  # of the largest group: one is filled while others are copied


class Store(Protocol):
    """Keeps groups of weights. Each method does all of it or, if it raises, nothing.

    But what interrupts `give_back` or `drop` leaves all values right, and these can be called again.
    """

    def moves(self, slot: TensorSlot) -> bool:
        """Return whether a tensor is kept here between calls, and not on the device."""

    def nbytes(self, group: Group, *, stays: bool = False) -> int:
        """Bytes of the device that a group takes when it comes, or if it stays, before it is taken over."""

    def take(self, group: Group) -> FlatGroup:
        """Take a group's parameters over from wherever they are."""

    def take_again(self, flat: FlatGroup) -> FlatGroup:
        """Take over anew what was given other data, or stayed on the device; no copy reads it any more."""

    def give_back(self, flat: FlatGroup) -> None:
        """Put parameters back where `take` found them, with the values that they have now."""

    def check_readable(self, flat: FlatGroup) -> None:
        """Raise if what parameters show between calls cannot be read."""
        return

    def finalize(self, group: Group) -> None:
        """Finalize a group that was given back for good."""
        return

    def keep_on(self, flat: FlatGroup, device: torch.device) -> None:
        """Keep parameters on the device from now on, in memory of their own."""

    def bring(self, flat: FlatGroup, device: torch.device) -> None:
        """Show in parameters a copy on the device, in memory of its own."""

    def drop(self, flat: FlatGroup) -> None:
        """End that; what was changed in it is kept."""

    def make_engine(
        self, device: torch.device, nbytes: int, sources: Sequence[FlatGroup], *, per_group: bool
    ) -> CopyEngine:
        """Make what copies from here.

        Args:
            device: Where to.
            nbytes: Bytes of memory there.
            sources: What will be copied.
            per_group: Whether memory is allocated for each copy, and not now and once.
        """

    def report(self, flat: FlatGroup, on_device: str | None) -> Mapping[str, int]:
        """Return where bytes lie between calls.

        Args:
            flat: The parameters.
            on_device: Of those that stay on the device, its label.
        """

    @property
    def locked(self) -> int:
        """Bytes of host memory that are page-locked, without what the engine copies through."""
        return 0

    @property
    def is_outdated(self) -> bool:
        """Whether what was taken over has other sizes by now."""
        return False

    def verify(self) -> None:
        """Verify, before and after each call, that all is as it was; raise if not."""
        return


@define(eq=False)
class _Taken:
    """What was known of a group before it was taken over.

    Attributes:
        group: The group.
        homes: The device that each parameter came from.
        left: Memory that parameters came from and that others see, too.
    """

    group: Group
    homes: dict[TensorSlot, torch.device]
    left: list[tuple[torch.Tensor, torch.Tensor]]


class PinnedStore(Store):
    """Keeps weights in host memory, page-locked as far as that is wise, each group side by side.

    Args:
        device: The device that copies from it.
        lock_limit: Bytes of host memory that may be locked; None for a share of what is free.
    """

    def __init__(self, device: torch.device, lock_limit: int | None = None) -> None:
        self._device = device
        self._host = PinnedMemory(device, lock_limit)
        self._plain = SynchronousMover(device, _CPU)
        self._taken: dict[FlatGroup, _Taken] = {}

    @property
    def locked(self) -> int:
        """Bytes that are page-locked."""
        return self._host.locked

    def moves(self, slot: TensorSlot) -> bool:
        """Weights, also those that are buffers."""
        return is_weight(slot)

    def nbytes(self, group: Group, *, stays: bool = False) -> int:
        """Return what stays is side by side no more."""
        return planned_nbytes(group.slots) if stays else flat_nbytes(group.slots)

    def take(self, group: Group) -> FlatGroup:
        """Move parameters to locked host memory."""
        homes = {slot: found[0].device for slot in group.slots if (found := current_tensors(slot))}
        return self._pack(_Taken(group, homes, memory_seen_elsewhere(group.slots)))

    def _pack(self, taken: _Taken) -> FlatGroup:
        flat = FlatGroup(taken.group.slots, taken.group.name)
        self._taken[flat] = taken
        try:
            self._host.pack(flat)
        except BaseException:
            del self._taken[flat]
            raise
        return flat

    def take_again(self, flat: FlatGroup) -> FlatGroup:
        """Take the data and the buffers that modules were given into host memory of the group's own."""
        flat.move_given_buffers(_CPU)
        self._unlock(flat)
        again = self._pack(self._taken[flat])
        del self._taken[flat]
        return again

    def give_back(self, flat: FlatGroup) -> None:
        """Move parameters back to the device that they came from, into memory of their own."""
        taken = self._taken.get(flat)
        if taken is not None:
            self._unlock(flat)
            homes = taken.homes.items()
            move_to_copies((tensors_left(slot, self._device), device) for slot, device in homes)
            go_back(taken.left)
            del self._taken[flat]

    def _unlock(self, flat: FlatGroup) -> None:
        """Unlock a group's memory, which no copy reads any more."""
        if flat.is_locked:
            flat.is_locked = False
            self._host.release(flat.host)

    def keep_on(self, flat: FlatGroup, device: torch.device) -> None:
        """Move parameters to the device: a view of shared memory is copied whole."""
        move_apart(dict.fromkeys(self._taken[flat].homes, device))
        self._unlock(flat)
        flat.let_go()

    def bring(self, flat: FlatGroup, device: torch.device) -> None:
        """Copy each parameter, and wait."""
        self._plain.onload(self._taken[flat].group)

    def drop(self, flat: FlatGroup) -> None:
        """End that; what was changed is copied back."""
        if flat.copied is not None:  # a copy that was begun ahead and given up may still read
            flat.copied.synchronize()
        self._plain.offload(self._taken[flat].group)

    def make_engine(
        self, device: torch.device, nbytes: int, sources: Sequence[FlatGroup], *, per_group: bool
    ) -> CopyEngine:
        """Make what copies from locked memory, and through a little of it what is not locked."""
        engine = CopyEngine(device, nbytes, per_group=per_group)
        unlocked = [flat.nbytes for flat in sources if not flat.is_locked]
        if unlocked:
            engine.staging = Staging(device, _STAGED * max(unlocked))
        return engine

    def report(self, flat: FlatGroup, on_device: str | None) -> dict[str, int]:
        """All bytes, without the gaps between weights."""
        return {on_device or f"offloaded on {_CPU}": self._taken[flat].group.nbytes}
