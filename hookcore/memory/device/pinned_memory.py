"""Host memory from which a device can copy by itself: page-locked, in exactly the size that is wanted.

A runtime that lets memory be locked where it is (`cudaHostRegister`) is given memory of our own: torch's
allocator for pinned memory rounds each size up to a power of two, which can double it. For other devices that
is what there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hookcore.errors import HookcoreWarning
from hookcore.memory.host_memory import free_host_bytes, private_pages
from hookcore.memory.planning.free_list import FreeList
from hookcore.units import format_bytes

if TYPE_CHECKING:
    import mmap

    from hookcore.memory.device.flat_group import FlatGroup

_SHARE = 0.8
"""Of what is free; memory that is locked cannot be swapped out, and others need some, too."""


class PinnedMemory:
    """Makes host memory to copy weights from, and locks it as far as that is wise.

    What is locked in place is unlocked at the latest when nobody refers to it any more, but for the end of
    the process. Whoever copies from it sees to it that it is referred to until the copy is done.

    Args:
        device: The device that copies from it.
        lock_limit: Bytes that may be locked; None for a share of what is free now.

    Attributes:
        locked: Bytes that are locked.
    """

    def __init__(self, device: torch.device, lock_limit: int | None = None) -> None:
        self.locked = 0
        self._limit = free_host_bytes(_SHARE) if lock_limit is None else lock_limit
        self._tells = lock_limit is None  # when there is no more room
        self._runtime = _Runtime.of(device)
        self._buffers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._unlock: dict[int, weakref.finalize[Any, Any]] = {}

    def pack(self, flat: FlatGroup) -> None:
        """Copy a group's tensors to memory of this kind, and rebind them to it; all of it or nothing."""
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
        """Make memory to be filled and then given to `lock`.

        Returns:
            A uint8 tensor, `(nbytes,)`.
        """
        with torch.inference_mode(False):
            if self._runtime is None:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._may_lock(nbytes))
            # Pages of its own: locking is by pages, and one that is locked cannot be locked again.
            pages = private_pages(nbytes)
            buffer: Any = (ctypes.c_ubyte * nbytes).from_buffer(pages)
            buffer.pages = pages
            memory = torch.frombuffer(buffer, dtype=torch.uint8) if nbytes else torch.empty(0).byte()
        self._buffers[memory.data_ptr()] = buffer
        return memory

    def lock(self, memory: torch.Tensor) -> None:
        """Lock memory that `make` made, if there is no reason not to."""
        if self._runtime is not None and self._may_lock(memory.nbytes):
            address = memory.data_ptr()
            if self._runtime.register(address, memory.nbytes):
                buffer = self._buffers[address]
                unlock = weakref.finalize(buffer, self._runtime.unregister, address, buffer.pages)
                unlock.atexit = False  # copies may still be under way, and the process takes all with it
                self._unlock[address] = unlock
            else:  # what cannot be locked is copied all the same, only slower and with the host waiting
                self._limit, self._tells = self.locked, False
        if memory.is_pinned():
            self.locked += memory.nbytes
        elif self._tells and memory.nbytes > self._limit - self.locked:
            self._tells = False
            warnings.warn(
                f"{format_bytes(memory.nbytes)} of weights stay in host memory that is not page-locked, and "
                f"all that find no room later: {format_bytes(self.locked)} are locked by now, and no more "
                f"than {format_bytes(self._limit)} may be, which is {_SHARE:.0%} of what was free. The host "
                "copies them through a little locked memory. Free host memory, or choose it with "
                "low_cpu_mem_usage=True",
                HookcoreWarning,
                stacklevel=2,
            )

    def release(self, memory: torch.Tensor) -> None:
        """Unlock memory. Nothing may be copying from it any more."""
        if memory.nbytes and memory.is_pinned():
            self.locked -= memory.nbytes
            if (unlock := self._unlock.pop(memory.data_ptr(), None)) is not None:
                unlock()

    def _may_lock(self, nbytes: int) -> bool:
        return 0 < nbytes <= self._limit - self.locked


class _Runtime:
    """Locks memory where it is, with the functions of CUDA's runtime that torch offers.

    An error that one of them returns stays pending, too: the next kernel would raise it, whoever launches it.
    So it is taken away there and then.
    """

    _left: ClassVar[list[tuple[_Runtime, int, mmap.mmap]]] = []
    """What could not be unlocked, since it was let go while somebody captured a graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._functions = self._module.cudart()

    @classmethod
    def of(cls, device: torch.device) -> _Runtime | None:
        """The runtime of a device, if it can do that."""
        return cls(device) if hasattr(torch.get_device_module(device), "cudart") else None

    def register(self, address: int, nbytes: int) -> bool:
        """Lock memory; return False, and warn, if that is not possible."""
        while self._left and not self._captures:
            runtime, left, pages = self._left.pop()
            runtime.unregister(left, pages)
        with self._module.device(self._device):  # or another device would get a context
            error = self._functions.cudaHostRegister(address, nbytes, 0)
        if _is_success(error):
            return True
        self._clear_error()
        warnings.warn(
            f"the system lets no more host memory be page-locked ({self._functions.cudaGetErrorString(error)}"
            "). Weights in other memory are copied to the device more slowly, and the host waits for it. "
            "Raise the limit of locked memory ('ulimit -l'), or give weights less host memory",
            HookcoreWarning,
            stacklevel=2,
        )
        return False

    def unregister(self, address: int, pages: mmap.mmap) -> None:
        """Unlock memory, now or when nobody captures a graph any more; its pages live on until then."""
        if sys.is_finalizing():
            return
        if self._captures:
            self._left.append((self, address, pages))
            return
        with self._module.device(self._device):
            error = self._functions.cudaHostUnregister(address)
        if not _is_success(error):
            self._clear_error()

    @property
    def _captures(self) -> bool:
        """Whether a graph is captured, which forbids to lock, unlock, or launch anything of one's own."""
        asks = getattr(self._module, "is_current_stream_capturing", None)
        return asks is not None and bool(asks())

    def _clear_error(self) -> None:
        if not self._captures:
            with contextlib.suppress(RuntimeError):
                torch.empty(1, device=self._device).zero_()


def _is_success(error: Any) -> bool:
    return error is None or int(error) == 0


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
        """Find a free range; None while there is none. Waits for nothing."""
        while self._sent and self._sent[0][0].query():
            self._free_oldest()
        start = self._ranges.take(nbytes)
        return None if start is None else self._memory[start : start + nbytes]

    def wait(self) -> bool:
        """Wait for the oldest copy; return whether there was one."""
        if not self._sent:
            return False
        self._sent[0][0].synchronize()
        self._free_oldest()
        return True

    def fill(self, source: torch.Tensor) -> torch.Tensor:
        """Copy bytes into a free range, and return that; wait for the oldest copy while there is none."""
        while (room := self.take(source.nbytes)) is None:
            self.wait()
        return room.copy_(source)

    def sent(self, filled: torch.Tensor, copied: Any) -> None:
        """Take down what `take` or `fill` returned, with an event after its copy."""
        self._sent.append((copied, int(filled.storage_offset()), filled.nbytes))

    def give_back(self, room: torch.Tensor) -> None:
        """Take back what `take` returned, and what was never copied."""
        self._ranges.give_back(int(room.storage_offset()), room.nbytes)

    def _free_oldest(self) -> None:
        _, start, nbytes = self._sent.popleft()
        self._ranges.give_back(start, nbytes)
