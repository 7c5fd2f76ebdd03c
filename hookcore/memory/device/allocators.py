"""Device memory in which groups of weights come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import define, field, frozen

from hookcore.memory.device.flat_group import ALIGNMENT
from hookcore.memory.planning.free_list import ByteQuota, FreeList

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from hookcore.memory.device.flat_group import FlatGroup

_PLACES_KEPT = 16
"""Of one group; in a pass like the last one it comes to a place that it knows."""


@frozen(eq=False)
class DeviceRange:
    """Where a group can lie on the device.

    Attributes:
        start: Its first byte in the arena.
        memory: Its bytes, uint8.
        views: What the group's tensors are there.
        addresses: Of the views.
    """

    start: int
    memory: torch.Tensor
    views: Sequence[torch.Tensor]
    addresses: Sequence[int]


@define(eq=False)
class Allocator:
    """Device memory that is lent to groups, of which some have room of their own.

    Attributes:
        device: Where it is.
        size: Bytes.
        kept: Groups that have room of their own, the one that had it first first, and where that starts.
        left: The room of groups that went away with their model, to be collected.
        lender: Its room, lent and free.
    """

    is_shared: ClassVar[bool]
    """Whether others may have had the memory of a place before."""

    device: torch.device
    size: int
    kept: dict[FlatGroup, int] = field(factory=dict, init=False)
    left: list[tuple[int, int]] = field(factory=list, init=False)
    lender: FreeList | ByteQuota = field(init=False)

    def give_back(self, flat: FlatGroup, place: DeviceRange) -> None:
        """Free the place of a group, unless it is reserved for the group."""
        if flat not in self.kept:
            self.lender.give_back(place.start, flat.nbytes)

    def drop(self, flat: FlatGroup) -> None:
        """Keep no room for a group any more, of which nothing is there."""
        self.lender.give_back(self.kept.pop(flat), flat.nbytes)

    def forget(self, flat: FlatGroup) -> None:
        """Forget a group that is packed anew, and of which nothing is on the device."""
        if flat in self.kept:
            self.drop(flat)

    def leave(self, flat: FlatGroup, place: DeviceRange | None) -> None:
        """Queue the place of a group for `collect`: it goes away, at whatever moment, with its model."""
        start = self.kept.pop(flat, None if place is None else place.start)
        if start is not None:
            self.left.append((start, flat.nbytes))

    def collect(self) -> None:
        """Free the places of groups that went away."""
        while self.left:
            self.lender.give_back(*self.left.pop())


@define(eq=False)
class ArenaAllocator(Allocator):
    """One stretch of device memory, allocated once, and who lies where in it.

    Groups with a range of their own have it at the end, the one that had it first last.

    Attributes:
        large: Bytes from which other groups lie at the end of what is left; None for all at its beginning.
    """

    is_shared: ClassVar[bool] = False

    large: int | None = None
    lender: FreeList = field(init=False)
    _memory: torch.Tensor = field(init=False)
    _places: dict[FlatGroup, dict[int, DeviceRange]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.size = self.size // ALIGNMENT * ALIGNMENT
        self.lender = FreeList(self.size, self.large)
        self._memory = _allocate(self.size, self.device)

    @property
    def allocated(self) -> int:
        """Bytes of memory that it has now."""
        return self.size

    def take(self, flat: FlatGroup) -> DeviceRange | None:
        """Find room for a group; None if there is none."""
        start = self.kept.get(flat)
        if start is None:
            start = self.lender.take(flat.nbytes)
        if start is None:
            return None
        known = self._places.get(flat)
        if known is None:
            known = self._places[flat] = {}
        found = known.get(start)
        if found is None:
            if len(known) == _PLACES_KEPT:
                known.clear()
            found = known[start] = _make_place(flat, start, self._memory[start : start + flat.nbytes])
        return found

    def unkept(self, wanted: Collection[FlatGroup]) -> list[FlatGroup]:
        """Which groups would lose their range if only these had one: none lies beyond another that does."""
        end = self.size
        for at, (flat, start) in enumerate(self.kept.items()):
            if flat not in wanted or start + flat.nbytes != end:
                return list(self.kept)[at:]
            end = start
        return []

    def keep(self, wanted: Iterable[FlatGroup], large: int | None = None) -> None:
        """Give groups ranges of their own, and no others; nothing else may be lent.

        Args:
            wanted: The groups, which have room together.
            large: Bytes from which others lie at the end of what is left; None for all at its beginning.
        """
        for flat in self.unkept(wanted := dict.fromkeys(wanted)):
            self.drop(flat)
        end = min(self.kept.values(), default=self.size)
        for flat in wanted:
            if flat not in self.kept:
                end -= flat.nbytes
                self.lender.take_from(end)
                self.kept[flat] = end
        self.lender.large = self.size + 1 if large is None else large

    def forget(self, flat: FlatGroup) -> None:
        """Forget a group that is packed anew, with its places; nothing of it is on the device."""
        super().forget(flat)
        self._places.pop(flat, None)

    def leave(self, flat: FlatGroup, place: DeviceRange | None) -> None:
        """Queue the place of a group for `collect`: it goes away, at whatever moment, with its model."""
        super().leave(flat, place)
        self._places.pop(flat, None)


@define(eq=False)
class PerGroupAllocator(Allocator):
    """Device memory that is allocated for one group at a time, up to a size.

    Where there is hardly room for two groups, a slab would have gaps that are too short for either, and keep
    memory from the activations while only a small group is there.
    """

    is_shared: ClassVar[bool] = True

    lender: ByteQuota = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.lender = ByteQuota(self.size)

    @property
    def allocated(self) -> int:
        """Bytes of memory that it has now."""
        return self.lender.lent

    def take(self, flat: FlatGroup) -> DeviceRange | None:
        """Allocate memory for a group; None if that would be too much, or the device has no more."""
        if flat not in self.kept and flat.nbytes > self.lender.free:
            return None
        try:
            place = _make_place(flat, 0, _allocate(flat.nbytes, self.device))
        except torch.OutOfMemoryError:
            return None
        if flat not in self.kept:
            self.lender.take(flat.nbytes)
        return place

    def unkept(self, wanted: Collection[FlatGroup]) -> list[FlatGroup]:
        """Return which groups would lose their room if only these had some of their own."""
        return [flat for flat in self.kept if flat not in wanted]

    def keep(self, wanted: Iterable[FlatGroup], _large: int | None = None) -> None:
        """Keep room for groups, and no others; nothing else may be lent."""
        for flat in self.unkept(wanted := dict.fromkeys(wanted)):
            self.drop(flat)
        for flat in wanted:
            if flat not in self.kept:
                self.lender.take(flat.nbytes)
                self.kept[flat] = 0


@torch.inference_mode(False)  # what is made here outlives the mode
def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _make_place(flat: FlatGroup, start: int, memory: torch.Tensor) -> DeviceRange:
    views = flat.views(memory)
    return DeviceRange(start, memory, views, [view.data_ptr() for view in views])
