"""Host memory from which a device can copy by itself: page-locked, in exactly the size that is wanted.

A runtime that lets memory be locked where it is (`cudaHostRegister`) is given memory of our own: torch's
allocator for pinned memory rounds each size up to a power of two, which can double it. For other devices that
is what there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookcore.memory.planning.free_list import FreeList

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookcore.memory.device.flat_group import FlatGroup

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_MEMINFO = Path("/proc/meminfo")
_SHARE = 0.8
"""Of what is free; memory that is locked cannot be swapped out, and others need some, too."""


class PinnedMemory:
    """Makes host memory to copy weights from, and locks it as far as that is wise.

    What is locked in place is unlocked at the latest when nobody refers to it any more.

    Args:
        device: The device that copies from it.
        lock_limit: Bytes that may be locked; None for a share of what is free now.

    Attributes:
        locked: Bytes that are locked.
    """

    def __init__(self, device: torch.device, lock_limit: int | None = None) -> None:
        self.locked = 0
        self._limit = free_host_bytes(_SHARE) if lock_limit is None else lock_limit
        runtime: Any = getattr(torch.get_device_module(device), "cudart", None)
        self._runtime = None if runtime is None else runtime()
        self._buffers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._unlock: dict[int, Callable[[], object]] = {}

    def pack(self, flat: FlatGroup) -> None:
        """Copies a group's tensors to memory of this kind, and has them show it; all of it or nothing."""
        before = [(tensor, tensor.data) for tensor in flat.tensors]
        memory = self.make(flat.nbytes)
        try:
            flat.take(memory)
            self.lock(memory)
            flat.is_locked = memory.is_pinned()
        except BaseException:
            for tensor, data in before:
                tensor.data = data
            self.release(memory)
            raise

    def make(self, nbytes: int) -> torch.Tensor:
        """Makes memory to be filled and then given to `lock`.

        Returns:
            A uint8 tensor, `(nbytes,)`.
        """
        with torch.inference_mode(False):
            if self._runtime is None:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._may_lock(nbytes))
            # Pages of its own: locking is by pages, and one that is locked cannot be locked again.
            buffer = (ctypes.c_ubyte * nbytes).from_buffer(mmap.mmap(-1, max(nbytes, 1)))
            memory = torch.frombuffer(buffer, dtype=torch.uint8) if nbytes else torch.empty(0).byte()
        self._buffers[memory.data_ptr()] = buffer
        return memory

    def lock(self, memory: torch.Tensor) -> None:
        """Locks memory that `make` made, if there is no reason not to."""
        address = memory.data_ptr()
        if self._runtime is not None and self._may_lock(memory.nbytes):
            # What cannot be locked is copied all the same, only slower and with the host waiting.
            self._runtime.cudaHostRegister(address, memory.nbytes, 0)
            unlock = self._runtime.cudaHostUnregister
            self._unlock[address] = weakref.finalize(self._buffers[address], unlock, address)
        if memory.is_pinned():
            self.locked += memory.nbytes

    def release(self, memory: torch.Tensor) -> None:
        """Unlocks memory. Nothing may be copying from it any more."""
        if memory.nbytes and memory.is_pinned():
            self.locked -= memory.nbytes
            self._unlock.pop(memory.data_ptr(), lambda: None)()

    def _may_lock(self, nbytes: int) -> bool:
        return 0 < nbytes <= self._limit - self.locked


class Staging:
    """A little locked memory, through which what cannot or shall not be locked is copied piece by piece.

    Args:
        device: The device that copies from it.
        nbytes: Its size. More than the largest piece, or the host has to wait for each copy.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        host = PinnedMemory(device)
        self._memory = host.make(nbytes)
        host.lock(self._memory)
        self._ranges = FreeList(nbytes)
        self._sent: deque[tuple[Any, int, int]] = deque()  # an event after the copy of each range

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._ranges.size

    def take(self, nbytes: int) -> torch.Tensor | None:
        """Finds a free range; None while there is none. Waits for nothing."""
        while self._sent and self._sent[0][0].query():
            self._free_oldest()
        start = self._ranges.take(nbytes)
        return None if start is None else self._memory[start : start + nbytes]

    def wait(self) -> bool:
        """Waits for the oldest copy; says whether there was one."""
        if not self._sent:
            return False
        self._sent[0][0].synchronize()
        self._free_oldest()
        return True

    def fill(self, source: torch.Tensor) -> torch.Tensor:
        """Copies bytes into a free range, and returns that; waits for the oldest copy while there is none."""
        while (room := self.take(source.nbytes)) is None:
            self.wait()
        return room.copy_(source)

    def sent(self, filled: torch.Tensor, copied: Any) -> None:
        """Takes down what `take` or `fill` returned, with an event after its copy."""
        self._sent.append((copied, int(filled.storage_offset()), filled.nbytes))

    def give_back(self, room: torch.Tensor) -> None:
        """Takes back what `take` returned, and what was never copied."""
        self._ranges.give_back(int(room.storage_offset()), room.nbytes)

    def _free_oldest(self) -> None:
        _, start, nbytes = self._sent.popleft()
        self._ranges.give_back(start, nbytes)


def free_host_bytes(share: float = 1.0) -> int:
    """A share of the host memory that is free, for this process's control group as for the machine."""
    free = [1 << 62]
    with contextlib.suppress(OSError):
        fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        free.append(int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USED.read_text()))
    return int(max(0, min(free)) * share)
