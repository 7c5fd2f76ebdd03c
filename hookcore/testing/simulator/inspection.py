"""What a test can look at: the time, and who holds which memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from hookcore.testing.simulator import state
from hookcore.testing.simulator.naming import names_in
from hookcore.units import format_bytes

if TYPE_CHECKING:
    import torch


def now() -> float:
    """The host's virtual time since `reset`, in seconds."""
    machine = state.get_machine()
    return machine.host_time - machine.origin


def pinned_bytes() -> int:
    """Bytes of page-locked host memory."""
    machine = state.get_machine()
    with machine.lock:
        machine.settle()
        return machine.host_memory.count.allocated


def max_pinned_bytes() -> int:
    """The most bytes of page-locked host memory that there were since `reset`."""
    return state.get_machine().host_memory.count.peak


@frozen
class StreamPool:
    """Memory of a device that was allocated on one stream; torch gives what is freed to this stream only.

    Attributes:
        stream: The stream's number.
        allocated: Bytes in use.
        reserved: Bytes that the pool holds, freed ones included: the peak since `reset` or, where torch's
            cache is simulated, the bytes of its segments.
    """

    stream: int
    allocated: int
    reserved: int


def stream_pools(device: torch.device | str | int | None = None) -> tuple[StreamPool, ...]:
    """State which stream's pool holds how much of a device's memory, by the streams' numbers.

    The sum of all `reserved` is what a device needs whose streams don't use each other's freed memory.

    Args:
        device: The device; the current one by default.
    """
    machine = state.get_machine()
    with machine.lock:
        machine.settle()
        memory = machine.devices[state.device_index(device)].memory
        memory.release(machine.host_time)
        reserved = None if memory.cache is None else memory.cache.reserved
        return tuple(
            StreamPool(stream, count.allocated, count.peak if reserved is None else reserved[stream])
            for stream, count in sorted(memory.by_stream.items())
        )


@frozen
class Holding:
    """One block of memory that is in use.

    Attributes:
        device: Where: "sim:0", or "pinned" for page-locked host memory.
        nbytes: Its size.
        made_by: The operation that made it.
        stream: Number of the stream that it was made on.
        tensors: Names of the tensors in it, where `name_tensors` was told of them.
    """

    device: str
    nbytes: int
    made_by: str
    stream: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(self.tensors) or "unnamed"
        return f"{self.device} {format_bytes(self.nbytes)}: {names} (by {self.made_by})"


def snapshot() -> tuple[Holding, ...]:
    """State who holds what: all blocks in use, the largest first."""
    machine = state.get_machine()
    with machine.lock:
        machine.settle()
        locked = (*machine.host_memory.allocated.values(), *machine.host_memory.registered)
        blocks = (*machine.blocks.values(), *locked)
        holdings = [
            Holding(
                device="pinned" if block.device is None else f"sim:{block.device}",
                nbytes=block.nbytes,
                made_by=block.made_by,
                stream=block.stream[1],
                tensors=names_in(block, 0, block.nbytes),
            )
            for block in blocks
        ]
    return tuple(sorted(holdings, key=lambda it: -it.nbytes))
