"""Device memory in which groups of weights come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import define, field, frozen

from hookcore.memory.packed import ALIGNMENT
from hookcore.memory.ranges import Quota, Ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """

    is_shared: ClassVar[bool] = False
    """Whether others may have had the memory of a place before."""

    device: torch.device
    size: int
    large: int | None = None
    ranges: Ranges = field(init=False)
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
        start = self.ranges.take(packed.nbytes)
        if start is None:
            return None
        known = self._places.setdefault(packed, {})
        found = known.get(start)
        if found is None:
            if len(known) == _PLACES_KEPT:
                known.clear()
            found = known[start] = _make_place(packed, start, self._memory[start : start + packed.nbytes])
        return found

    def give_back(self, place: Place) -> None:
        """Has others lie where a group lay."""
        self.ranges.give_back(place.start, place.memory.nbytes)

    def forget(self, packed: Packed) -> None:
        """Forgets the places of a group that is packed anew."""
        self._places.pop(packed, None)


@define(eq=False)
class Pieces:
    """Device memory that is allocated for one group at a time, up to a size.

    Where there is hardly room for two groups, a slab would have gaps that are too short for either, and keep
    memory from the activations while only a small group is there.

    Attributes:
        device: Where it is.
        size: Bytes of all groups together, at most.
    """

    is_shared: ClassVar[bool] = True

    device: torch.device
    size: int
    _quota: Quota = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._quota = Quota(self.size)

    @property
    def allocated(self) -> int:
        """Bytes of memory that it has now."""
        return self._quota.lent

    def take(self, packed: Packed) -> Place | None:
        """Allocates memory for a group; None if that would be too much."""
        if self._quota.take(packed.nbytes) is None:
            return None
        return _make_place(packed, 0, _allocate(packed.nbytes, self.device))

    def give_back(self, place: Place) -> None:
        """Counts a group's memory no more; it is freed with its place."""
        self._quota.give_back(0, place.memory.nbytes)

    def forget(self, packed: Packed) -> None:
        """Does nothing: no places are kept."""


@torch.inference_mode(False)  # what is made here outlives the mode
def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


@torch.inference_mode(False)
def _make_place(packed: Packed, start: int, memory: torch.Tensor) -> Place:
    views = packed.views(memory)
    return Place(start, memory, views, [view.data_ptr() for view in views])
