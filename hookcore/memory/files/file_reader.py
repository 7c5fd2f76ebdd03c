"""Reads a group's weights from files to where they are wanted, in threads of its own.

What the system has cached is read through its cache, other bytes past it (see `direct`), and what was edited
in memory comes from there.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from attrs import frozen

from hookcore.memory.files.direct_reader import ALIGNMENT
from hookcore.memory.files.file_range import FileRange, are_aligned, is_cached, was_written
from hookcore.memory.files.page_arena import PageRange, separate_pages
from hookcore.memory.files.reader_threads import WORKERS, ReaderThreads, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from hookcore.memory.files.origin import Origin

_CHUNK_BYTES = 8 * 2**20
_CACHED_CHUNK_BYTES = 2**20  # is still in the processor's cache when it is copied on


@frozen(eq=False)
class Target:
    """Where one tensor's values are wanted, in memory for a whole group.

    Attributes:
        home: The values: mapped from the file, or in memory.
        origin: Where in a file they lie; None if they are in memory only.
        start: Where their first byte is wanted.
        dtype: In which dtype.
    """

    home: torch.Tensor
    origin: Origin | None
    start: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """How many bytes are wanted."""
        return self.home.numel() * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor in such memory (uint8)."""
        return memory[self.start : self.start + self.nbytes].view(self.dtype).view(self.home.shape)


class FileReader:
    """Reads groups of weights. Files are held open until `close`."""

    def __init__(self) -> None:
        self._workers = ReaderThreads("hookcore-files")
        self._local = threading.local()

    def submit(
        self, targets: Sequence[Target], ranges: Sequence[FileRange], memory: torch.Tensor
    ) -> Task[tuple[bool, float]]:
        """Call `read` in a worker thread; return its task."""
        return self._workers.submit(self.read, targets, ranges, memory)

    def read(
        self, targets: Sequence[Target], ranges: Sequence[FileRange], memory: torch.Tensor
    ) -> tuple[bool, float]:
        """Bring all values to their places, in the dtypes wanted. Blocks, mostly without the GIL.

        Args:
            targets: What is wanted where.
            ranges: The bytes of files that hold it.
            memory: Host memory, uint8.

        Returns:
            Whether they come from files (if not, all edits in memory are among them), and how many seconds it
            takes if all threads read.

        Raises:
            CheckpointError: A file is shorter than it was, or the disk failed.
        """
        begin = time.perf_counter()
        in_files = [it for it in targets if it.origin is not None]
        origins = [it.origin for it in in_files if it.origin is not None]
        # Elements of a file of an old writer may lie across blocks; converting these is left to the mapping.
        converts = any(it.home.dtype != it.dtype for it in in_files)
        from_file = not was_written(ranges) and (are_aligned(origins) or not converts)
        if from_file:
            cached = is_cached(ranges)
            for it in ranges:
                self._read_range(it, in_files, memory, cached=cached)
        else:
            for it in ranges:
                it.mapping.populate(it.start, it.nbytes)
        for target in targets:
            if target.origin is None or not from_file:
                target.view(memory).copy_(target.home)
        return from_file, (time.perf_counter() - begin) / WORKERS

    def _read_range(
        self, wanted: FileRange, targets: Sequence[Target], memory: torch.Tensor, *, cached: bool
    ) -> None:
        """Read a range of a file piece by piece, and scatters each."""
        reader = self._workers.reader(wanted.mapping.path, cached=cached)
        inside = [
            (it, it.origin.entry)
            for it in targets
            if it.origin is not None
            and it.origin.mapping is wanted.mapping
            and wanted.start <= it.origin.entry.offset < wanted.stop
        ]
        buffer = self._buffer()
        size = _CACHED_CHUNK_BYTES if cached else _CHUNK_BYTES
        begin = wanted.start
        while begin < wanted.stop:
            end = min(begin - begin % ALIGNMENT + size, wanted.stop)
            position = reader.read_range(buffer, begin, end)
            for target, entry in inside:
                start, stop = max(begin, entry.offset), min(end, entry.offset + entry.nbytes)
                if start >= stop:
                    continue
                pages = buffer.tensor[position + start - begin : position + stop - begin]
                first = target.start + (start - entry.offset) * target.dtype.itemsize // entry.dtype.itemsize
                if target.dtype != entry.dtype:
                    pages = pages.view(entry.dtype)
                last = first + pages.numel() * (1 if target.dtype == entry.dtype else target.dtype.itemsize)
                place = memory[first:last]
                (place if target.dtype == entry.dtype else place.view(target.dtype)).copy_(pages)
            begin = end

    def _buffer(self) -> PageRange:
        """A range of pages of memory of this thread's own."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = separate_pages(_CHUNK_BYTES)
        buffer: PageRange = self._local.buffer
        return buffer

    def close(self) -> None:
        """Wait for what is being read, and close files; reading again opens them again."""
        self._workers.close()
