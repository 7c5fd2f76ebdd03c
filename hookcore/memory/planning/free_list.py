"""Ranges of one stretch of something, lent and given back: numbers only."""

from __future__ import annotations

import bisect


class FreeList:
    """Lends ranges of `[0, size)`: small ones the first that fits, large ones the end of the last that fits.

    Apart from each other they leave fewer gaps that are too short for a large one.

    Args:
        size: How long the stretch is.
        large: From which size on a range is lent at the end; None for never.

    Attributes:
        size: As given.
        large: Likewise, as a number.
        free: How much of it is not lent.
    """

    __slots__ = ("_free", "free", "large", "size")

    def __init__(self, size: int, large: int | None = None) -> None:
        self.size = self.free = size
        self.large = size + 1 if large is None else large
        self._free = [(0, size)] if size else []  # start and stop, sorted, no two touching

    @property
    def lent(self) -> int:
        """How much of it is not free."""
        return self.size - self.free

    def take(self, size: int) -> int | None:
        """Lend a range, and return where it starts; None where no free one is long enough."""
        free = self._free
        if size >= self.large:
            for index in range(len(free) - 1, -1, -1):
                start, stop = free[index]
                if stop - start >= size:
                    free[index : index + 1] = [(start, stop - size)] if start + size < stop else []
                    self.free -= size
                    return stop - size
            return None
        for index, (start, stop) in enumerate(free):
            if stop - start >= size:
                free[index : index + 1] = [(start + size, stop)] if start + size < stop else []
                self.free -= size
                return start
        return None

    def take_from(self, start: int) -> None:
        """Lend what is free from somewhere on, up to where something else is lent."""
        index = bisect.bisect(self._free, (start, self.size)) - 1
        first, stop = self._free[index]
        self.free -= stop - start
        self._free[index : index + 1] = [(first, start)] if first < start else []

    def give_back(self, start: int, size: int) -> None:
        """Take a range back that was lent."""
        self.free += size
        stop = start + size
        index = bisect.bisect(self._free, (start, stop))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
            index -= 1
        self._free.insert(index, (start, stop))


class ByteQuota:
    """Lends so much of something in all, wherever it is: `FreeList` that have no gaps.

    Args:
        size: How much there is.

    Attributes:
        size: As given.
        free: How much of it is not lent.
    """

    __slots__ = ("free", "size")

    def __init__(self, size: int) -> None:
        self.size = self.free = size

    @property
    def lent(self) -> int:
        """How much of it is not free."""
        return self.size - self.free

    def take(self, size: int) -> int | None:
        """Lend so much, and return 0; None where less is left."""
        if size > self.free:
            return None
        self.free -= size
        return 0

    def give_back(self, _start: int, size: int) -> None:
        """Take back what was lent."""
        self.free += size
