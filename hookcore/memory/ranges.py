"""Ranges of one stretch of something, lent and given back: numbers only."""

from __future__ import annotations

import bisect


class Ranges:
    """Lends ranges of `[0, size)`, the first that fits.

    Args:
        size: How long the stretch is.
    """

    __slots__ = ("_free", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [(0, size)] if size else []  # start and stop, sorted, no two touching

    @property
    def lent(self) -> int:
        """How much of it is not free."""
        return self.size - sum(stop - start for start, stop in self._free)

    def take(self, size: int) -> int | None:
        """Lends a range, and returns where it starts; None where no free one is long enough."""
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[index : index + 1] = [(start + size, stop)] if start + size < stop else []
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        """Takes a range back that was lent."""
        stop = start + size
        index = bisect.bisect(self._free, (start, stop))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
            index -= 1
        self._free.insert(index, (start, stop))
