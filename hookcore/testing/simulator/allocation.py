"""Gives out the memory of devices and page-locked memory of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookcore.testing.simulator.cuda_errors import CudaError, cuda_error
from hookcore.testing.simulator.errors import KEEP_HOST_MEMORY
from hookcore.testing.simulator.memory import Block
from hookcore.testing.simulator.ordering import Access, Operation
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from hookcore.testing.simulator.devices import StreamState
    from hookcore.testing.simulator.machine import Machine


def allocate(machine: Machine, stream: StreamState, block: Block) -> None:
    """Give a new block memory of a stream's device, on that stream; see `make_room`, which goes first."""
    device = stream.key[0]
    machine.devices[device].memory.take(block)
    machine.blocks[block.address] = block
    tick = stream.clock.get(stream.key, 0)
    if tick > machine.host_clock.get(stream.key, 0):
        # What the stream did so far may have used the same memory: others have to wait for it.
        allocation = Operation(f"allocating it for {block.made_by}", stream.key, tick)
        block.history.record(Access(0, block.nbytes, True, allocation), machine.host_clock)
    machine.trace_memory(machine.devices[device])


def make_room(machine: Machine, stream: StreamState, nbytes: int) -> None:
    """Ensure that so many bytes can be allocated on a stream.

    Raises:
        torch.OutOfMemoryError: They cannot, even when all that is held or cached has come back.
    """
    machine.settle()
    if nbytes:
        machine.reach("allocate")
    device, number = stream.key
    memory = machine.devices[device].memory
    memory.release(machine.host_time)
    can_wait = not machine.captures.is_running
    if can_wait and not memory.fits(number, nbytes) and (held := memory.all_held()) is not None:
        machine.host_waits(*held)
    if can_wait and not memory.fits(number, nbytes):
        empty_cache(machine, device)
    if not memory.fits(number, nbytes):
        capacity = memory.capacity or 0
        raise torch.OutOfMemoryError(
            f"sim:{device} is out of memory: tried to allocate {format_bytes(nbytes)} ({nbytes} B) with "
            f"{format_bytes(memory.allocated)} ({memory.allocated} B) of {format_bytes(capacity)} "
            f"({capacity} B) in use, {memory.reserved} B reserved. simulator.snapshot() lists who has it."
        )


def empty_cache(machine: Machine, device: int) -> None:
    """Give the segments that nobody uses back to the device; the host waits for it, as CUDA has it."""
    cache = machine.devices[device].memory.cache
    if cache is not None:
        machine.synchronize(device)
        cache.release()


def pin(machine: Machine, nbytes: int, address: int, keeper: object) -> Block:
    """Count an allocation of page-locked host memory.

    Raises:
        torch.AcceleratorError: The system doesn't let so much be page-locked.
    """
    machine.settle()
    machine.reach("pin")
    if not machine.host_memory.can_lock(nbytes, machine.devices[0].profile):
        raise cuda_error(CudaError.memoryAllocation)
    block = Block(None, nbytes, address, keeper, (0, 0), "pinning")
    machine.host_memory.count.take(nbytes)
    machine.host_memory.allocated[address] = block
    return block


def register(machine: Machine, device: int, address: int, nbytes: int) -> CudaError:
    """Page-lock a range of host addresses where it is; see `HostMemory.registration_error`."""
    machine.settle()
    error = _forbidden(machine) or machine.host_memory.registration_error(
        address, nbytes, machine.devices[device].profile
    )
    if error is CudaError.success:
        machine.host_memory.add(Block(None, nbytes, address, None, (0, 0), "cudaHostRegister"))
    return _result(machine, error)


def unregister(machine: Machine, address: int) -> CudaError:
    """Unlock the range that was registered at an address.

    A finalizer may call it at any moment, and the memory may be gone when it returns. So copies that are
    under way end here, and its bytes are given back later.
    """
    error = _forbidden(machine)
    if error:
        return _result(machine, error)
    block = machine.host_memory.remove(address)
    if block is None:
        return _result(machine, CudaError.hostMemoryNotRegistered)
    by = ("cudaHostUnregister", None, KEEP_HOST_MEMORY)
    for access in block.history:
        if not access.operation.is_before(machine.host_clock):
            machine.findings.add("unregistered while in use", block, access, by, now=False)
    for copy in block.copies:
        copy.land()
    machine.drop(block)
    return _result(machine, CudaError.success)


def _forbidden(machine: Machine) -> CudaError:
    """The error of a call that a capture forbids, and that breaks it; `success` if none does."""
    try:
        machine.captures.forbid_unsafe()
    except torch.AcceleratorError:
        return CudaError.streamCaptureUnsupported
    return CudaError.success


def _result(machine: Machine, error: CudaError) -> CudaError:
    if error is not CudaError.success:
        machine.pending_error = error
    return error
