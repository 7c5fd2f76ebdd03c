"""Bytes of mapped files: which ones hold a group's weights, and what the system says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from hookcore.memory.files.direct_reader import aligned_span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookcore.memory.files.mapped_file import MappedFile
    from hookcore.memory.files.origin import Origin

_CACHED = 0.9
"""From this part of a group on in the system's cache, mapping it is faster than reading it directly."""

_NEIGHBOURS = 64 * 1024
"""Bytes between two tensors in a file that are read along rather than read around."""


@frozen
class FileRange:
    """Bytes of a mapped file, `[start, stop)`."""

    mapping: MappedFile
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Length."""
        return self.stop - self.start


def merged(origins: Sequence[Origin]) -> tuple[FileRange, ...]:
    """The file ranges that hold these tensors; neighbours are read in one go."""
    ranges: list[FileRange] = []
    for origin in sorted(origins, key=lambda it: (it.entry.path, it.entry.offset)):
        start, stop = origin.entry.offset, origin.entry.offset + origin.entry.nbytes
        last = ranges[-1] if ranges else None
        if last is not None and last.mapping is origin.mapping and start - last.stop <= _NEIGHBOURS:
            ranges[-1] = FileRange(last.mapping, last.start, max(stop, last.stop))
        elif start < stop:
            ranges.append(FileRange(origin.mapping, start, stop))
    return tuple(ranges)


def cost(origins: Sequence[Origin]) -> int:
    """Bytes of memory that parameters take together while they are used on the CPU."""
    read = sum(aligned_span(it.start, it.stop) for it in merged(origins))
    converted = [it.raw.numel() * it.dtype.itemsize for it in origins if it.dtype != it.entry.dtype]
    return read + sum(aligned_span(0, nbytes) for nbytes in converted)  # buffers are whole pages


def are_aligned(origins: Sequence[Origin]) -> bool:
    """Return whether views of read bytes can be tensors; files of old writers do not align them."""
    return all(it.entry.offset % it.entry.dtype.itemsize == 0 for it in origins)


def is_cached(ranges: Sequence[FileRange]) -> bool:
    """Return whether nearly all of it is in memory already."""
    for it in ranges:
        fraction = it.mapping.cached_fraction(it.start, it.nbytes)
        if fraction is not None and fraction < _CACHED:
            return False
    return True


def was_written(ranges: Sequence[FileRange]) -> bool:
    """Return whether memory may differ from the file."""
    return any(it.mapping.was_written(it.start, it.nbytes) for it in ranges)


def drop(ranges: Sequence[FileRange]) -> None:
    """Let the pages go that were never written."""
    for it in ranges:
        it.mapping.drop(it.start, it.nbytes)
