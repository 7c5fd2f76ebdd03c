"""Device memory allocated once, in which groups of weights come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import define, field, frozen

from hookcore.memory.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookcore.memory.packed import Packed

_PLACES_KEPT = 16
"""Of one group; in a pass like the last one it comes to a place that it knows."""


@frozen(eq=False)
class Place:
    """Where a group can lie in the slab.

    Attributes:
        start: Its first byte.
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
    """One stretch of device memory, and who lies where in it.

    Attributes:
        memory: uint8, `(nbytes,)`.
        ranges: Its ranges, lent and free.
    """

    memory: torch.Tensor
    ranges: Ranges = field(init=False)
    _places: dict[Packed, dict[int, Place]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.ranges = Ranges(self.memory.nbytes)

    def place(self, packed: Packed, start: int) -> Place:
        """Where a group lies that begins at a byte."""
        known = self._places.setdefault(packed, {})
        found = known.get(start)
        if found is None:
            if len(known) == _PLACES_KEPT:
                known.clear()
            found = known[start] = self._make_place(packed, start)
        return found

    @torch.inference_mode(False)  # what is made here outlives the mode
    def _make_place(self, packed: Packed, start: int) -> Place:
        memory = self.memory[start : start + packed.nbytes]
        views = packed.views(memory)
        return Place(start, memory, views, [view.data_ptr() for view in views])

    def forget(self, packed: Packed) -> None:
        """Forgets the places of a group that is packed anew."""
        self._places.pop(packed, None)
