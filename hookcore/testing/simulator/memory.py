"""Blocks of memory, and counts of bytes."""

from __future__ import annotations

import itertools
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attrs import define, field

from hookcore.testing.simulator.ordering import History

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hookcore.testing.simulator.caching import Chunk
    from hookcore.testing.simulator.ordering import StreamKey

_numbers = itertools.count(1)


@define(eq=False)
class Block:
    """One allocation, on a device or page-locked on the host.

    Attributes:
        device: Index of the device; None on the host.
        nbytes: Its size.
        host_address: Where its bytes really are.
        keeper: Keeps these bytes from being freed by Python.
        stream: The stream that it was allocated on, to which its memory returns.
        made_by: The operation that allocated it.
        history: Who touched it.
        recorded: Streams that `record_stream` named.
        sources: For ranges of bytes, the address of the host memory that was last copied there.
        copies: Of page-locked memory, the copies from and to it that are on their way.
        number: Counts allocations.
        address: Where a program sees them: on a device, a number of the device's own.
        chunk: Its place in the device's caching allocator, if there is one.
    """

    device: int | None
    nbytes: int
    host_address: int
    keeper: Any
    stream: StreamKey
    made_by: str
    history: History = field(factory=History)
    recorded: frozenset[StreamKey] = frozenset()
    sources: Mapping[tuple[int, int], int] = MappingProxyType({})
    copies: tuple[Any, ...] = ()
    number: int = field(factory=_numbers.__next__)
    address: int = field(init=False)
    chunk: Chunk | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.address = self.host_address

    @property
    def taken(self) -> int:
        """Bytes that it takes of the device's memory, where a caching allocator rounds sizes up."""
        return self.nbytes if self.chunk is None else self.chunk.size

    def fill(self, start: int, stop: int, source: int) -> None:
        """Note from where a range of bytes was filled."""
        kept = {(low, high): it for (low, high), it in self.sources.items() if high <= start or stop <= low}
        self.sources = kept | {(start, stop): source}

    def __str__(self) -> str:
        where = "pinned host memory" if self.device is None else f"sim:{self.device}"
        return f"block {self.number} of {self.nbytes} B on {where}, made by {self.made_by}"


@define(eq=False)
class ByteCount:
    """Counts bytes.

    Attributes:
        allocated: Bytes in use.
        peak: The most bytes that were in use at once.
    """

    allocated: int = 0
    peak: int = 0

    def take(self, nbytes: int) -> None:
        """Count an allocation."""
        self.allocated += nbytes
        if self.allocated > self.peak:  # noqa: PLR1730 -- max() takes three times as long, at each allocation
            self.peak = self.allocated

    def give_back(self, nbytes: int) -> None:
        """Count a free."""
        self.allocated -= nbytes

    def reset_peak(self) -> None:
        """Begin a new peak from what is in use."""
        self.peak = self.allocated
