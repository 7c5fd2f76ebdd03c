"""Device memory in which groups of weights come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import define, field, frozen

from hookcore.memory.packed import ALIGNMENT
from hookcore.memory.ranges import Quota, Ranges

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from hookcore.memory.packed import Packed

_PLACES_KEPT = 16
"""Of one group; in a pass like the last one it comes to a place that it knows."""


@frozen(eq=False)
class Place:
    """Where a group can lie on the device.

    Attributes:
        start: Its first byte in the slab.
        memory: Its bytes, uint8.
        views: What the group's tensors are there.
        addresses: Of the views.
    """

    start: int
    memory: torch.Tensor
    views: Sequence[torch.Tensor]
    addresses: Sequence[int]


@define(eq=False)
class Slab:
    """One stretch of device memory, allocated once, and who lies where in it.

    Attributes:
        device: Where it is.
        size: Bytes.
        large: Bytes from which groups lie at its end; None for all at its beginning.
        ranges: Its ranges, lent and free.
        kept: Groups that have a range of their own at its end, the last one first, and where that starts.
        left: Ranges of groups that went away with their model, to be collected.
    """

    is_shared: ClassVar[bool] = False
    """Whether others may have had the memory of a place before."""

    device: torch.device
    size: int
    large: int | None = None
    ranges: Ranges = field(init=False)
    kept: dict[Packed, int] = field(factory=dict, init=False)
    left: list[tuple[int, int]] = field(factory=list, init=False)
    _memory: torch.Tensor = field(init=False)
    _places: dict[Packed, dict[int, Place]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.size = self.size // ALIGNMENT * ALIGNMENT
        self.ranges = Ranges(self.size, self.large)
        self._memory = _allocate(self.size, self.device)

    @property
    def allocated(self) -> int:
        """Bytes of memory that it has now."""
        return self.size

    def take(self, packed: Packed) -> Place | None:
        """Finds room for a group; None if there is none."""
        start = self.kept.get(packed)
        if start is None:
            start = self.ranges.take(packed.nbytes)
        if start is None:
            return None
        known = self._places.get(packed)
        if known is None:
            known = self._places[packed] = {}
        found = known.get(start)
        if found is None:
            if len(known) == _PLACES_KEPT:
                known.clear()
            found = known[start] = _make_place(packed, start, self._memory[start : start + packed.nbytes])
        return found

    def give_back(self, packed: Packed, place: Place) -> None:
        """Has others lie where a group lay, unless the range is its own."""
        if packed not in self.kept:
            self.ranges.give_back(place.start, place.memory.nbytes)

    def unkept(self, wanted: Collection[Packed]) -> list[Packed]:
        """Which groups would lose their range if only these had one: none lies beyond another that does."""
        end = self.size
        for at, (packed, start) in enumerate(self.kept.items()):
            if packed not in wanted or start + packed.nbytes != end:
                return list(self.kept)[at:]
            end = start
        return []

    def keep(self, wanted: Iterable[Packed], large: int | None = None) -> None:
        """Gives groups ranges of their own, and no others; nothing else may be lent.

        Args:
            wanted: The groups, which have room together.
            large: Bytes from which others lie at the end of what is left; None for all at its beginning.
        """
        for packed in self.unkept(wanted := dict.fromkeys(wanted)):
            self.drop(packed)
        end = min(self.kept.values(), default=self.size)
        for packed in wanted:
            if packed not in self.kept:
                end -= packed.nbytes
                self.ranges.take_from(end)
                self.kept[packed] = end
        self.ranges.large = self.size + 1 if large is None else large

    def drop(self, packed: Packed) -> None:
        """Has others lie in a group's own range, in which nothing is any more."""
        self.ranges.give_back(self.kept.pop(packed), packed.nbytes)

    def forget(self, packed: Packed) -> None:
        """Forgets the places of a group that is packed anew, and of which nothing is on the device."""
        self._places.pop(packed, None)
        if packed in self.kept:
            self.drop(packed)

    def leave(self, packed: Packed, place: Place | None) -> None:
        """Has what a group took be collected later: it goes away, at whatever moment, with its model."""
        start = self.kept.pop(packed, None if place is None else place.start)
        if start is not None:
            self.left.append((start, packed.nbytes))
        self._places.pop(packed, None)

    def collect(self) -> None:
        """Has others lie where groups lay that went away."""
        while self.left:
            self.ranges.give_back(*self.left.pop())


@define(eq=False)
class Pieces:
    """Device memory that is allocated for one group at a time, up to a size.

    Where there is hardly room for two groups, a slab would have gaps that are too short for either, and keep
    memory from the activations while only a small group is there.

    Attributes:
        device: Where it is.
        size: Bytes of all groups together, at most.
        kept: Groups that have room of their own, the one that had it first first.
        left: The room of groups that went away with their model, to be collected.
    """

    is_shared: ClassVar[bool] = True

    device: torch.device
    size: int
    kept: dict[Packed, int] = field(factory=dict, init=False)
    left: list[tuple[int, int]] = field(factory=list, init=False)
    _quota: Quota = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._quota = Quota(self.size)

    @property
    def allocated(self) -> int:
        """Bytes of memory that it has now."""
        return self._quota.lent

    def take(self, packed: Packed) -> Place | None:
        """Allocates memory for a group; None if that would be too much."""
        if packed not in self.kept and self._quota.take(packed.nbytes) is None:
            return None
        return _make_place(packed, 0, _allocate(packed.nbytes, self.device))

    def give_back(self, packed: Packed, place: Place) -> None:
        """Counts a group's memory no more, unless room is kept for it; it is freed with its place."""
        if packed not in self.kept:
            self._quota.give_back(0, place.memory.nbytes)

    def unkept(self, wanted: Collection[Packed]) -> list[Packed]:
        """Which groups would lose their room if only these had some of their own."""
        return [packed for packed in self.kept if packed not in wanted]

    def keep(self, wanted: Iterable[Packed], _large: int | None = None) -> None:
        """Keeps room for groups, and no others; nothing else may be lent."""
        for packed in self.unkept(wanted := dict.fromkeys(wanted)):
            self.drop(packed)
        for packed in wanted:
            if packed not in self.kept:
                self._quota.take(packed.nbytes)
                self.kept[packed] = 0

    def drop(self, packed: Packed) -> None:
        """Keeps no room for a group any more."""
        self._quota.give_back(self.kept.pop(packed), packed.nbytes)

    def forget(self, packed: Packed) -> None:
        """Keeps no room for a group that is packed anew, and of which nothing is on the device."""
        if packed in self.kept:
            self.drop(packed)

    def leave(self, packed: Packed, place: Place | None) -> None:
        """Has what a group took be collected later: it goes away, at whatever moment, with its model."""
        start = self.kept.pop(packed, None if place is None else place.start)
        if start is not None:
            self.left.append((start, packed.nbytes))

    def collect(self) -> None:
        """Has others lie where groups lay that went away."""
        while self.left:
            self._quota.give_back(*self.left.pop())


@torch.inference_mode(False)  # what is made here outlives the mode
def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _make_place(packed: Packed, start: int, memory: torch.Tensor) -> Place:
    views = packed.views(memory)
    return Place(start, memory, views, [view.data_ptr() for view in views])
