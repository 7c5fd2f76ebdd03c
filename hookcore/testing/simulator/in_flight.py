"""Copies from and to page-locked memory that the host has not waited for.

The device reads and writes such memory by itself. A source has to stay as it is until its copy is done, and a
target holds poison until then.
"""

from __future__ import annotations

import ctypes
import mmap
import zlib
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field

from hookcore.testing.simulator.errors import HOST_FIRST, KEEP_HOST_MEMORY, Violation
from hookcore.testing.simulator.ordering import Access
from hookcore.testing.simulator.tensors import over

if TYPE_CHECKING:
    import torch

    from hookcore.testing.simulator.findings import Findings
    from hookcore.testing.simulator.memory import Block
    from hookcore.testing.simulator.ordering import Operation

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


@define(eq=False)
class LockedCopy:
    """A copy from or to page-locked memory that the host has not waited for.

    Attributes:
        operation: What runs it.
        block: The memory.
        start: The first byte of the block that it touches.
        stop: The byte after the last.
        findings: Where it tells what is wrong.
        keeps: Keeps memory that torch allocated, as torch does until the copy is done; None where the program
            registered the memory, as nobody does it then.
        writes: Whether it writes there.
        landed: Whether it is known to be done.
    """

    operation: Operation
    block: Block
    start: int
    stop: int
    findings: Findings
    keeps: torch.Tensor | None
    writes: ClassVar[bool]
    landed: bool = field(default=False, init=False)

    def land(self) -> None:
        """Complete it, unless that has been done."""
        if self.landed:
            return
        self.landed = True
        self.block.copies = tuple(it for it in self.block.copies if it is not self)
        if self.keeps is None and not _is_mapped(self._address, self.stop - self.start):
            access = Access(self.start, self.stop, self.writes, self.operation)
            by = ("unmapping it", None, KEEP_HOST_MEMORY)
            self.findings.add("freed while in use", self.block, access, by, now=False)
        else:
            self._complete()

    @property
    def _address(self) -> int:
        return self.block.address + self.start

    def _complete(self) -> None:
        raise NotImplementedError


@define(eq=False)
class FromLocked(LockedCopy):
    """A copy from page-locked memory, which has to stay as it is until the copy is done."""

    writes = False
    _before: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._before = self._checksum()

    def _checksum(self) -> int:
        return zlib.crc32((ctypes.c_ubyte * (self.stop - self.start)).from_address(self._address))

    def _complete(self) -> None:
        """Compare the source with what it was."""
        if self._checksum() == self._before:
            return
        memory, tensors = self.findings.describe(self.block, self.start, self.stop)
        self.findings.violations.append(
            Violation(
                rule="host write too early",
                memory=memory,
                tensors=tensors,
                operation="writing",
                stream=None,
                earlier=self.operation.name,
                earlier_stream=self.operation.stream,
                remedy=HOST_FIRST,
            )
        )


@define(eq=False)
class ToLocked(LockedCopy):
    """A copy to page-locked memory, which holds poison until the copy is done.

    Attributes:
        data: What is copied, of the target's size, stride and type.
    """

    data: torch.Tensor = field(kw_only=True)
    writes = True

    def _complete(self) -> None:
        """Write the data there."""
        over(self._address, self.stop - self.start, self.data).copy_(self.data)


def _is_mapped(address: int, nbytes: int) -> bool:
    """Return whether all pages of a range of addresses are there."""
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    nbytes += address - first
    pages = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    return bool(_mincore(first, nbytes, pages) == 0)
