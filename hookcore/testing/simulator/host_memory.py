"""Page-locked host memory: blocks that torch allocated so, and ranges that a program registered in place."""

from __future__ import annotations

import bisect
import mmap
from typing import TYPE_CHECKING

from attrs import define, field

from hookcore.testing.simulator.cuda_errors import CudaError, cuda_error
from hookcore.testing.simulator.memory import ByteCount

if TYPE_CHECKING:
    from hookcore.testing.simulator.memory import Block
    from hookcore.testing.simulator.profiles import DeviceProfile


@define(eq=False)
class HostMemory:
    """All page-locked memory of the host.

    Attributes:
        count: Counts its bytes.
        allocated: Live blocks that were allocated page-locked, by address.
        registered: Ranges that were registered, the lowest address first.
    """

    count: ByteCount = field(factory=ByteCount)
    allocated: dict[int, Block] = field(factory=dict)
    registered: tuple[Block, ...] = ()

    def registration_error(self, address: int, nbytes: int, profile: DeviceProfile) -> CudaError:
        """Return why a range cannot be registered; `success` if it can.

        CUDA locks whole pages, so two ranges may not share one.
        """
        if not address or nbytes < 1:
            return CudaError.invalidValue
        first, last = address // mmap.PAGESIZE, (address + nbytes - 1) // mmap.PAGESIZE
        for block in self.registered:
            end = block.address + block.nbytes - 1
            if block.address // mmap.PAGESIZE <= last and first <= end // mmap.PAGESIZE:
                return CudaError.hostMemoryAlreadyRegistered
        for block in self.allocated.values():
            if block.address < address + nbytes and address < block.address + block.nbytes:
                return CudaError.hostMemoryAlreadyRegistered
        if not self.can_lock(nbytes, profile):
            return profile.lock_error
        return CudaError.success

    def can_lock(self, nbytes: int, profile: DeviceProfile) -> bool:
        """Return whether the system lets so many more bytes be page-locked."""
        return profile.lockable is None or self.count.allocated + nbytes <= profile.lockable

    def add(self, block: Block) -> None:
        """Add a range that is registered now."""
        self.registered = tuple(sorted((*self.registered, block), key=lambda it: it.address))
        self.count.take(block.nbytes)

    def remove(self, address: int) -> Block | None:
        """Take out the range that begins at an address; None if there is none. Its bytes still count."""
        found = next((it for it in self.registered if it.address == address), None)
        self.registered = tuple(it for it in self.registered if it is not found)
        return found

    def registered_at(self, start: int, stop: int) -> Block | None:
        """The registered range that holds the addresses from `start` up to `stop`; None if none does.

        Raises:
            torch.AcceleratorError: One holds a part of them only; CUDA doesn't copy from or to such memory.
        """
        index = bisect.bisect_right(self.registered, start, key=lambda it: it.address) - 1
        if index >= 0 and start < (end := self.registered[index].address + self.registered[index].nbytes):
            if stop <= end:
                return self.registered[index]
            raise cuda_error(CudaError.invalidValue)
        if index + 1 < len(self.registered) and self.registered[index + 1].address < stop:
            raise cuda_error(CudaError.invalidValue)
        return None
