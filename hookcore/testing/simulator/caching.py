"""torch's caching allocator: sizes are rounded, segments are split, and freed memory stays with its stream.

The rules and sizes are those of c10/cuda/CUDACachingAllocator.cpp, as it is by default.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict

from attrs import define

from hookcore.testing.simulator.addresses import ADDRESSES, ALIGNMENT

_MIB = 1 << 20
ROUNDING = ALIGNMENT
"""Bytes to a multiple of which each allocation is rounded up."""
SMALL = _MIB
"""The largest allocation that lies in a small segment."""
SMALL_SEGMENT = 2 * _MIB
LARGE_SEGMENT = 20 * _MIB
OWN_SEGMENT = 10 * _MIB
"""The smallest allocation that gets a segment of its own, rounded up to 2 MiB."""

_Pool = tuple[int, bool]  # the stream, and whether allocations are small


def rounded(nbytes: int) -> int:
    """The bytes that an allocation takes at least."""
    return max(1, -(-nbytes // ROUNDING)) * ROUNDING


def segment_size(size: int) -> int:
    """The size of the segment that is made for an allocation.

    Args:
        size: The rounded size of the allocation.
    """
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT


@define(eq=False)
class Chunk:
    """A part of a segment, in use or free.

    Attributes:
        pool: What it belongs to: a stream, and allocations of a kind.
        address: That of its first byte.
        size: Bytes.
        allocator: Whose segment it is.
        is_free: Whether nobody uses it.
        before: The part of the segment that lies before it; None at the beginning.
        after: The part that lies after it; None at the end.
    """

    pool: _Pool
    address: int
    size: int
    allocator: CachingAllocator
    is_free: bool = True
    before: Chunk | None = None
    after: Chunk | None = None

    def free(self) -> None:
        """Give it back to its stream, joined with the free chunks beside it."""
        self.allocator.free(self)


class CachingAllocator:
    """The segments of one device.

    Attributes:
        reserved: Bytes of each stream's segments.
        allocated: Bytes of them that are in use.
    """

    def __init__(self) -> None:
        self.reserved: Counter[int] = Counter()
        self.allocated = 0
        self._free: defaultdict[_Pool, list[tuple[int, int, Chunk]]] = defaultdict(list)

    def missing(self, stream: int, nbytes: int) -> int:
        """Bytes of the segment that an allocation needs; 0 if the stream's free memory serves it."""
        size = rounded(nbytes)
        return 0 if self._fitting(stream, size) is not None else segment_size(size)

    def allocate(self, stream: int, nbytes: int) -> Chunk:
        """Take the smallest free chunk that fits, or a part of it, or of a new segment."""
        size = rounded(nbytes)
        pool = (stream, size <= SMALL)
        index = self._fitting(stream, size)
        chunk = (
            self._new_segment(pool, segment_size(size)) if index is None else self._free[pool].pop(index)[2]
        )
        rest = chunk.size - size
        if rest >= (ROUNDING if size <= SMALL else SMALL + 1):
            chunk.size = size
            after = chunk.after
            chunk.after = Chunk(pool, chunk.address + size, rest, self, before=chunk, after=after)
            if after is not None:
                after.before = chunk.after
            self._add_free(chunk.after)
        chunk.is_free = False
        self.allocated += chunk.size
        return chunk

    def free(self, chunk: Chunk) -> None:
        """Give a chunk back to its stream, joined with the free ones beside it."""
        chunk.is_free = True
        self.allocated -= chunk.size
        if chunk.before is not None and chunk.before.is_free:
            chunk = self._join(chunk.before, chunk, free=chunk.before)
        if chunk.after is not None and chunk.after.is_free:
            chunk = self._join(chunk, chunk.after, free=chunk.after)
        self._add_free(chunk)

    def _join(self, first: Chunk, second: Chunk, *, free: Chunk) -> Chunk:
        kept = self._free[free.pool]
        del kept[bisect.bisect_left(kept, (free.size, free.address))]
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    def release(self) -> None:
        """Give the segments that nobody uses back to the device."""
        for (stream, _), free in self._free.items():
            whole = [it for *_, it in free if it.before is None and it.after is None]
            free[:] = [it for it in free if it[2].before is not None or it[2].after is not None]
            self.reserved[stream] -= sum(chunk.size for chunk in whole)

    def _fitting(self, stream: int, size: int) -> int | None:
        free = self._free[stream, size <= SMALL]
        index = bisect.bisect_left(free, (size,))
        return index if index < len(free) else None

    def _new_segment(self, pool: _Pool, size: int) -> Chunk:
        self.reserved[pool[0]] += size
        return Chunk(pool, ADDRESSES.take(size), size, self)

    def _add_free(self, chunk: Chunk) -> None:
        bisect.insort(self._free[chunk.pool], (chunk.size, chunk.address, chunk))
