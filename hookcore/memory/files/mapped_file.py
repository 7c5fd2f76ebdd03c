"""Checkpoint files mapped into memory: tensors that cost no RAM until they are read.

A mapping is private: an in-place edit of a mapped weight copies the page it touches and never reaches
the file. On Linux the pages of a range can be asked about, brought in ahead of use and given back
afterwards. Elsewhere mappings work, and these calls do what each of them says under "Elsewhere".

Weights in a file lie wherever the header ends, so mapped tensors may be unaligned in memory.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import sys
from typing import TYPE_CHECKING, Self
from weakref import WeakValueDictionary

import torch

from hookcore.errors import CheckpointError
from hookcore.memory.files.regular_file import open_regular, unreadable

if TYPE_CHECKING:
    from pathlib import Path

    from hookcore.memory.files.checkpoint import Checkpoint
    from hookcore.memory.files.safetensors_header import TensorEntry

_PAGE = mmap.PAGESIZE

# From Linux's headers, where Python's mmap does not have them.
_MAP_NORESERVE = 0x4000
_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22  # Linux 5.14
_PAGEMAP = "/proc/self/pagemap"
_PAGEMAP_ENTRY_BYTES = 8
# Bits 63 to 61 of an entry: linux/Documentation/admin-guide/mm/pagemap.rst.
_FLAGS_SHIFT = 61
_IN_RAM = 4
_SWAPPED = 2
_OF_FILE = 1  # not a private copy

if sys.platform == "linux":
    # Through ctypes, because mmap.madvise() holds the GIL for as long as the disk takes.
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class MappedFile(mmap.mmap):
    """One file of a checkpoint, mapped whole, private and copy-on-write.

    It *is* the mmap, because a tensor keeps alive the object whose memory it views: as long as a tensor of
    this file lives, so does its mapping, and `find_mapping` leads from one to the other. The address range
    goes back to the system with the last of them; closing it before is refused with `BufferError`.

    All offsets and lengths are in bytes, offsets from the start of the file. A range must lie inside the
    file, or `ValueError` is raised.

    Args:
        path: The file.

    Raises:
        CheckpointError: It cannot be opened or mapped.
    """

    path: Path
    address: int
    """Where the file's first byte lies in memory."""
    _residency_is_told: bool

    def __new__(cls, path: Path) -> Self:
        """Open the file, map it and close it again."""
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                if sys.platform == "linux":
                    # A private writable mapping is charged against RAM and swap as if all of it were going
                    # to be written; without NORESERVE a file larger than both cannot be mapped.
                    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
                    protection = mmap.PROT_READ | mmap.PROT_WRITE
                    self = super().__new__(cls, file.fileno(), 0, flags=flags, prot=protection)
                else:
                    self = super().__new__(cls, file.fileno(), 0, access=mmap.ACCESS_COPY)
                status = os.fstat(file.fileno())
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise unreadable(path, error, "be mapped into memory") from error
        self.path = path
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        # Linux tells only those who may write a file what of it is cached; to others everything seems to be.
        self._residency_is_told = sys.platform == "linux" and (
            status.st_uid == os.geteuid() or os.access(path, os.W_OK, effective_ids=True)
        )
        _live[self.address] = self
        return self

    def __repr__(self) -> str:
        return f"<MappedFile '{self.path}'{' closed' if self.closed else ''}>"

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """View one tensor of the file, without reading it.

        Args:
            entry: Where it lies in this file.

        Returns:
            A contiguous CPU tensor of the entry's dtype and shape. Writing to it copies the pages written.
            One without elements has memory of its own.
        """
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        self._check_range(entry.offset, entry.nbytes)
        count = entry.nbytes // entry.dtype.itemsize
        # The memoryview is an export of the mmap that lives as long as the tensor, so that it stays open.
        flat = torch.frombuffer(memoryview(self), dtype=entry.dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)

    def cached_fraction(self, offset: int, nbytes: int) -> float | None:
        """Tell which part of a range is in RAM (the page cache counts), by page, without reading it.

        Returns:
            0.0 to 1.0; None where the system does not tell: the file is neither owned nor writable by this
            user, so that Linux reports all of it as cached. Elsewhere: None.

        Raises:
            CheckpointError: The system refused to answer.
        """
        self._check_range(offset, nbytes)
        if not self._residency_is_told:
            return None
        if not nbytes:
            return 1.0
        start, length = self._pages_around(offset, nbytes)
        residency = bytearray(length // _PAGE)
        out = ctypes.addressof(ctypes.c_char.from_buffer(residency))
        if _libc.mincore(start, length, out):
            raise self._failed("be asked about", offset, nbytes, ctypes.get_errno())
        # Only the lowest bit of each byte is defined.
        return (torch.frombuffer(residency, dtype=torch.uint8) & 1).float().mean().item()

    def populate(self, offset: int, nbytes: int) -> None:
        """Bring a range into RAM and map it, so that reading it afterwards waits for nothing.

        Blocks until it is there, without the GIL. Elsewhere: does nothing; pages come when they are touched.

        Raises:
            CheckpointError: The file was cut short, or the disk failed. (Touching such a page would end the
                process with SIGBUS.)
        """
        self._check_range(offset, nbytes)
        if sys.platform != "linux" or not nbytes:
            return
        start, length = self._pages_around(offset, nbytes)
        self.check_size()
        # Starts reading all of the range at once; populating alone reads in steps of the disk's read-ahead.
        _libc.madvise(start, length, _MADV_WILLNEED)
        while _libc.madvise(start, length, _MADV_POPULATE_READ):
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # a kernel before 5.14
                first = start - self.address
                torch.frombuffer(memoryview(self), dtype=torch.uint8)[first : offset + nbytes : _PAGE].sum()
                break
            if code not in {errno.EINTR, errno.EAGAIN}:
                raise self._failed("be read", offset, nbytes, code)
        # Cut inside a page, the file reads on as zeros to the page's end, and no call above fails.
        self.check_size()

    def drop(self, offset: int, nbytes: int) -> int:
        """Give back the RAM of a range; what is touched again comes back from the page cache or the disk.

        Only whole pages inside the range are dropped, as the outer ones also hold the neighbours, and only
        those that were never written: an edit of a mapped weight is never lost. Nobody may write to the range
        during the call. Elsewhere, and where `/proc/self/pagemap` cannot be read: drops nothing.

        Returns:
            Bytes that were in this process's memory and no longer are (the page cache may still hold them).
        """
        self._check_range(offset, nbytes)
        first = -(-offset // _PAGE)
        last = (offset + nbytes) // _PAGE
        if first >= last:
            return 0
        pages = self._page_flags(first, last)
        if pages is None:
            return 0
        clean = ~_is_written(pages)
        # Runs of clean and of written pages take turns: cut where the flag changes.
        cuts = (torch.nonzero(clean[1:] != clean[:-1]).flatten() + 1).tolist()
        for begin, end in itertools.pairwise([0, *cuts, last - first]):
            start = self.address + (first + begin) * _PAGE
            if clean[begin] and _libc.madvise(start, (end - begin) * _PAGE, _MADV_DONTNEED):
                return 0  # locked into memory (mlock): nothing can be dropped
        return int((pages == _IN_RAM | _OF_FILE).sum()) * _PAGE

    def was_written(self, offset: int, nbytes: int) -> bool:
        """Tell whether memory of a range may differ from the file, by page.

        Returns:
            True if a page that the range touches was written to since it was mapped: by an edit in the range
            or in a neighbour on the same page. Elsewhere, and where `/proc/self/pagemap` cannot be read:
            True, as nobody knows.
        """
        self._check_range(offset, nbytes)
        if not nbytes:
            return False
        pages = self._page_flags(offset // _PAGE, -(-(offset + nbytes) // _PAGE))
        return pages is None or bool(_is_written(pages).any())

    def _page_flags(self, first: int, last: int) -> torch.Tensor | None:
        """Read the flags of pages [first, last) of the file; None if the system does not tell.

        Returns:
            `(last - first,)` of int64, each a sum of `_IN_RAM`, `_SWAPPED` and `_OF_FILE`.
        """
        if sys.platform != "linux":
            return None
        entries = bytearray((last - first) * _PAGEMAP_ENTRY_BYTES)
        where = (self.address // _PAGE + first) * _PAGEMAP_ENTRY_BYTES
        try:
            with open(_PAGEMAP, "rb", buffering=0) as pagemap:  # noqa: PTH123 - bare, for the few us
                if os.preadv(pagemap.fileno(), [entries], where) != len(entries):
                    return None
        except OSError:
            return None
        return (torch.frombuffer(entries, dtype=torch.int64) >> _FLAGS_SHIFT) & 7

    def _check_range(self, offset: int, nbytes: int) -> None:
        # len() raises ValueError on a closed mapping, whose address may be somebody else's by now.
        if offset < 0 or nbytes < 0 or offset + nbytes > len(self):
            raise ValueError(f"[{offset}, {offset + nbytes}) is not inside the {len(self)} bytes of {self!r}")

    def check_size(self) -> None:
        """Check that the file is as long as when it was mapped: to read beyond its end would end the process.

        Raises:
            CheckpointError: It was cut short.
        """
        size = self.size()
        if size < len(self):
            raise CheckpointError(
                f"'{self.path}' was cut to {size} bytes while mapped, {len(self)} were expected. Weights are "
                "read from this file while the model runs: put the original back, or load the model again."
            )

    def _pages_around(self, offset: int, nbytes: int) -> tuple[int, int]:
        """Return the address and length in bytes of the pages that a range touches."""
        start = offset // _PAGE * _PAGE
        end = -(-(offset + nbytes) // _PAGE) * _PAGE
        return self.address + start, end - start

    def _failed(self, what: str, offset: int, nbytes: int, code: int) -> CheckpointError:
        return CheckpointError(
            f"Bytes {offset} to {offset + nbytes} of '{self.path}' cannot {what}: {os.strerror(code)}. The "
            f"file has {self.size()} bytes, {len(self)} were mapped. Check the disk, put the original back "
            "and load the model again."
        )


_live: WeakValueDictionary[int, MappedFile] = WeakValueDictionary()


def _is_written(pages: torch.Tensor) -> torch.Tensor:
    """Tell from their flags which pages are private copies, in RAM or swapped out."""
    return (pages & (_IN_RAM | _SWAPPED) != 0) & (pages & _OF_FILE == 0)


def map_checkpoint(checkpoint: Checkpoint) -> dict[Path, MappedFile]:
    """Map every file of a checkpoint.

    Raises:
        CheckpointError: A file cannot be mapped, or is not the one whose header was read.
    """
    mappings = {path: MappedFile(path) for path in checkpoint.stamps}
    # Afterwards, so that a file replaced between reading its header and mapping it is found.
    checkpoint.verify()
    return mappings


def find_mapping(tensor: torch.Tensor) -> tuple[MappedFile, int, int] | None:
    """Find the mapping that a tensor's data lies in, from the tensor alone.

    Returns:
        The mapping, the offset of the tensor's first element in the file and the length of what it spans, in
        bytes; None for a tensor that lies elsewhere or has no elements.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
        return None
    pointer = tensor.data_ptr()
    elements = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    for reference in _live.valuerefs():  # a copy: other threads may map files meanwhile
        mapping = reference()
        if mapping is not None and not mapping.closed and 0 <= pointer - mapping.address < len(mapping):
            return mapping, pointer - mapping.address, elements * tensor.itemsize
    return None
