"""One stretch of memory, lent in pieces and lent again.

Weights that come and go are of many sizes. Memory taken from the system for each would be cleared by it each
time, which costs a core more than reading does; ranges of one stretch are only written over.
"""

from __future__ import annotations

import mmap

import torch

from hookcore.memory.host_memory import private_pages
from hookcore.memory.planning.free_list import FreeList

_use_count = torch._C._storage_Use_Count
_ALIGNMENT = mmap.PAGESIZE


class PageRange:
    """Page-aligned memory.

    Args:
        memory: What it is a part of.
        start: Its first byte there.
        nbytes: Its length, whole pages.

    Attributes:
        start: As given.
        nbytes: As given.
        memoryview: Its bytes.
        tensor: The same, uint8, `(nbytes,)`, on a storage of its own.
    """

    def __init__(self, memory: mmap.mmap, start: int, nbytes: int) -> None:
        self.start = start
        self.nbytes = nbytes
        self._memory = memory
        self.memoryview = memoryview(memory)[start : start + nbytes]
        with torch.inference_mode(False):  # it is used again outside of the mode
            self.tensor = torch.frombuffer(self.memoryview, dtype=torch.uint8)
        self._unused = _use_count(self.tensor.untyped_storage()._cdata)

    @property
    def in_use(self) -> bool:
        """Whether anybody else still looks at it: autograd, or an output that is a view of a weight."""
        return _use_count(self.tensor.untyped_storage()._cdata) > self._unused

    def forget(self) -> None:
        """Let the system have what the range of pages held; it is zeros again, and takes no memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, self.start, self.nbytes)


class PageArena:
    """Lends ranges of one stretch of memory, the first that fits.

    It takes as much memory as was ever written to, and no piece is lent while anybody still looks at it.
    Not for several threads at once.

    Args:
        nbytes: Its length; rounded up to whole pages.

    Attributes:
        nbytes: As given, rounded up.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = size = rounded(max(nbytes, 1))
        self._memory = private_pages(size)
        self._ranges = FreeList(size)
        self._looked_at: list[PageRange] = []

    def take(self, nbytes: int) -> PageRange | None:
        """Lend a range of pages of at least this size; None if there is no room for it."""
        self._return_what_nobody_looks_at()
        size = rounded(max(nbytes, 1))
        start = self._ranges.take(size)
        return None if start is None else PageRange(self._memory, start, size)

    def give_back(self, pages: PageRange) -> None:
        """Take a range of pages back, as soon as nobody looks at it."""
        self._looked_at.append(pages)
        self._return_what_nobody_looks_at()

    def lent(self) -> int:
        """Bytes that are not free."""
        self._return_what_nobody_looks_at()
        return self._ranges.lent

    def _return_what_nobody_looks_at(self) -> None:
        still = [pages for pages in self._looked_at if pages.in_use]
        for pages in self._looked_at:
            if pages not in still and pages._memory is self._memory:  # others were made beside the arena
                self._ranges.give_back(pages.start, pages.nbytes)
        self._looked_at = still


def separate_pages(nbytes: int) -> PageRange:
    """Memory of its own, for when an arena has no room for what has to be there."""
    size = rounded(max(nbytes, 1))
    return PageRange(private_pages(size), 0, size)


def rounded(nbytes: int) -> int:
    """Whole pages."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
