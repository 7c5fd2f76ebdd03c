"""Reads file ranges past the page cache, into aligned memory that is used again and again.

A model that is streamed from disk does not fit in RAM, so caching what was read only pushes out what is
needed next, and copying it out of the cache costs a core that computes. Direct reads (O_DIRECT) leave both
out. Prefer a mapping where the file is cached already, and on Windows, which has none of these calls.
"""

from __future__ import annotations

import errno
import os
import weakref
from typing import TYPE_CHECKING, Self

from hookcore.errors import CheckpointError
from hookcore.memory.files.page_arena import PageRange, separate_pages
from hookcore.memory.files.regular_file import open_regular, unreadable

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

ALIGNMENT = 4096
"""Bytes: direct reads want offset, length and address to be multiples of the disk's block, at most this."""

_CHUNK_BYTES = 8 * 2**20


def aligned_span(start: int, stop: int) -> int:
    """Tell how many bytes of buffer reading the file's bytes [start, stop) takes: whole blocks around it."""
    return -(-stop // ALIGNMENT) * ALIGNMENT - start // ALIGNMENT * ALIGNMENT


class DirectReader:
    """Reads ranges of one file; several threads may read through one reader at once.

    Where the file system cannot read past its cache, reads are ordinary ones that ask the system to forget
    the range afterwards.

    Args:
        path: The file, held open until `close`, or until nobody refers to the reader.
        cached: Whether to read through the system's cache, and to leave that as it is.

    Attributes:
        path: The file.
        direct: Whether reads go past the page cache.

    Raises:
        CheckpointError: The file cannot be opened or read.
    """

    def __init__(self, path: Path, *, cached: bool = False) -> None:
        self.path = path
        self._cached = cached
        try:
            self.direct = not cached and _reads_direct(path)
            self._fd = open_regular(path, os.O_DIRECT if self.direct else 0)
        except OSError as error:
            raise unreadable(path, error, "be opened") from error
        self._close = weakref.finalize(self, os.close, self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. No read may be under way."""
        self._fd = -1
        self._close()

    def read_range(self, buffer: PageRange, start: int, stop: int, *, at: int = 0) -> int:
        """Read the file's bytes [start, stop) into a buffer. Blocks, without the GIL.

        Whole blocks are read, so the buffer's bytes from `at` to `at + aligned_span(start, stop)` are
        overwritten. The range keeps its distance from a block's begin: a tensor lies at the same address
        modulo 4096 in the buffer as in a mapping, and kernels compute the same bits from either.

        Args:
            buffer: Where to.
            start: Offset in the file of the first byte.
            stop: Offset in the file after the last byte.
            at: Position in the buffer of the first block, a multiple of `ALIGNMENT`.

        Returns:
            The position in the buffer of byte `start`: `at + start % ALIGNMENT`.

        Raises:
            CheckpointError: The file ends before `stop`, or the disk failed.
            ValueError: The range is no range, or the buffer has no room for it at `at`.
        """
        span = aligned_span(start, stop)
        if not 0 <= start <= stop or at < 0 or at % ALIGNMENT or at + span > buffer.nbytes:
            raise ValueError(
                f"reading [{start}, {stop}) takes {span} bytes from a multiple of {ALIGNMENT}, found {at} in "
                f"a buffer of {buffer.nbytes}"
            )
        position = at + start % ALIGNMENT
        if start == stop:
            return position
        begin = start - start % ALIGNMENT
        wanted = stop - begin
        target = buffer.memoryview[at : at + span]
        done = 0
        while done < wanted:
            try:
                count = os.preadv(self._fd, [target[done : done + _CHUNK_BYTES]], begin + done)
            except OSError as error:  # never EINTR: Python tries again by itself
                raise CheckpointError(
                    f"Bytes {start} to {stop} of '{self.path}' cannot be read: {error.strerror}. "
                    "Check the disk."
                ) from error
            reached = done + count
            # Go on at a block's begin, as direct reads must, also where one was cut short inside a block.
            next_block = reached if reached >= wanted else reached - reached % ALIGNMENT
            if next_block == done:
                raise CheckpointError(
                    f"'{self.path}' ends at byte {begin + reached}, {start} to {stop} were to be read: it "
                    "was cut short. Put the original back and load the model again."
                )
            done = next_block
        if not self.direct and not self._cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, begin, wanted, os.POSIX_FADV_DONTNEED)
        return position


def _reads_direct(path: Path) -> bool:
    """Try whether a file can be read past the page cache; file systems refuse when opening, or later."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fd = open_regular(path, os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    block = separate_pages(ALIGNMENT)
    try:
        os.preadv(fd, [block.memoryview], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(fd)
    return True
