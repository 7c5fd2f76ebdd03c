"""Copies between the host and devices: when they run, when their data is there, and who has to wait.

As on CUDA, a copy without `non_blocking` makes the host wait; one with it does so only where the host's
memory is not page-locked. A copy to the host lands when the host has waited for it: until then the target
holds poison. A copy from the host must find its source unchanged when the host has waited for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookcore.testing.simulator import state
from hookcore.testing.simulator.errors import UnsupportedOperationError
from hookcore.testing.simulator.in_flight import FromLocked, LockedCopy, ToLocked
from hookcore.testing.simulator.tensors import (
    block_of,
    extent,
    locked_span,
    new_on_device,
    new_pinned,
    on_cpu,
    poison,
)

if TYPE_CHECKING:
    from hookcore.testing.simulator.devices import StreamState
    from hookcore.testing.simulator.machine import Machine
    from hookcore.testing.simulator.memory import Block
    from hookcore.testing.simulator.ordering import Operation

TO_DEVICE = "copy to the device"
TO_HOST = "copy to the host"
ON_DEVICE = "copy on the device"
TO_PEER = "copy to another device"


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy a tensor into another one; one of them at least lies on a simulated device.

    Returns:
        The target.

    Raises:
        RaceError: It touches memory that another stream, or the host, may be using.
    """
    machine = state.get_machine()
    from_device = source.device.type == state.DEVICE_TYPE
    to_device = target.device.type == state.DEVICE_TYPE
    with machine.lock:
        machine.reach("copy")
        if from_device and to_device:
            _between_devices(machine, source, target)
        elif to_device:
            _to_device(machine, source, target, non_blocking)
        else:
            _to_host(machine, source, target, non_blocking)
    return target


def to_copy(
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """Return what `tensor.to(...)` does with a simulated tensor.

    Raises:
        UnsupportedOperationError: A sparse layout is wanted, or a device that is neither this nor the CPU.
    """
    if layout not in (None, torch.strided):
        raise UnsupportedOperationError(f"a simulated device has strided tensors only, not {layout}")
    wanted = tensor.device if device is None else device
    # Only for its size and stride: nothing reads or writes its memory, or it is the result's own.
    like = torch.empty_like(
        on_cpu(tensor, block_of(tensor)), dtype=dtype, memory_format=memory_format or torch.preserve_format
    )
    if wanted.type == state.DEVICE_TYPE:
        made = new_on_device(like, state.device_index(wanted), "aten::_to_copy")
    elif wanted.type == "cpu":
        made = new_pinned(like) if non_blocking or pin_memory else like
    else:
        raise UnsupportedOperationError(
            f"a simulated tensor cannot be copied to {wanted}; copy it to the CPU"
        )
    return copy_from(tensor, made, non_blocking)


def _between_devices(machine: Machine, source: torch.Tensor, target: torch.Tensor) -> None:
    here, there = source.device.index, target.device.index
    profile = machine.devices[here].profile
    stream = state.current_stream_state(here)
    if here == there:
        operation = machine.begin(stream, ON_DEVICE)
        seconds = profile.kernel_latency + (source.nbytes + target.nbytes) / profile.memory_bandwidth
        engine = "compute"
    else:
        # As torch does on CUDA: the copy runs on the source's stream, and both streams wait for each other.
        receiver = state.current_stream_state(there)
        machine.wait(stream, machine.mark(receiver))
        operation = machine.begin(stream, TO_PEER)
        seconds = profile.copy_latency + target.nbytes / profile.peer
        engine = "peer copy"
    _touch(machine, operation, stream, block_of(source), source, writes=False)
    _touch(machine, operation, stream, block_of(target), target, writes=True)
    on_cpu(target, block_of(target)).copy_(on_cpu(source, block_of(source)))
    machine.finish(operation, stream, engine, seconds)
    if here != there:
        machine.wait(receiver, machine.mark(stream))


def _to_device(machine: Machine, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
    stream = state.current_stream_state(target.device.index)
    profile = machine.devices[target.device.index].profile
    locked, block = locked_span(source), block_of(target)
    if locked is None or not non_blocking:
        machine.captures.host_waits_for(stream)
    operation = machine.begin(stream, TO_DEVICE)
    _touch(machine, operation, stream, block, target, writes=True)
    if locked is not None:
        machine.touch(operation, stream, *locked, writes=False)
        _complete_earlier(*locked, writes=False)
    if block is not None:
        block.fill(*extent(target), source.data_ptr())
    on_cpu(target, block).copy_(source.detach())
    bandwidth = profile.pageable if locked is None else profile.host_to_device
    machine.finish(operation, stream, "copy in", profile.copy_latency + target.nbytes / bandwidth)
    if not non_blocking:
        machine.host_waits(stream.clock, stream.free_at)
        machine.findings.raise_found()
    elif locked is None:
        # The driver reads the source before it returns, but doesn't promise that the data has arrived.
        machine.host_time = max(machine.host_time, stream.free_at)
    else:
        memory, span = locked
        _send(machine, FromLocked(operation, memory, *span, machine.findings, _kept(memory, source)))


def _to_host(machine: Machine, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
    stream = state.current_stream_state(source.device.index)
    profile = machine.devices[source.device.index].profile
    locked, block = locked_span(target), block_of(source)
    if locked is None or not non_blocking:
        machine.captures.host_waits_for(stream)
    operation = machine.begin(stream, TO_HOST)
    _touch(machine, operation, stream, block, source, writes=False)
    if locked is not None:
        machine.touch(operation, stream, *locked, writes=True)
        _complete_earlier(*locked, writes=True)
    data = on_cpu(source, block)
    bandwidth = profile.pageable if locked is None else profile.device_to_host
    machine.finish(operation, stream, "copy out", profile.copy_latency + source.nbytes / bandwidth)
    target = target.detach()
    if non_blocking and locked is not None:
        memory, span = locked
        arriving = torch.empty_strided(target.size(), target.stride(), dtype=target.dtype).copy_(data)
        poison(target)
        kept = _kept(memory, target)
        _send(machine, ToLocked(operation, memory, *span, machine.findings, kept, data=arriving))
        return
    machine.host_waits(stream.clock, stream.free_at)
    machine.findings.raise_found()
    target.copy_(data)


def _kept(memory: Block, tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor where memory is torch's: its allocator keeps that for the copy, but no registered memory."""
    return None if memory.keeper is None else tensor.detach()


def _touch(
    machine: Machine,
    operation: Operation,
    stream: StreamState,
    block: Block | None,
    tensor: torch.Tensor,
    *,
    writes: bool,
) -> None:
    if block is not None:
        machine.touch(operation, stream, block, extent(tensor), writes=writes)


def _complete_earlier(locked: Block, span: tuple[int, int], *, writes: bool) -> None:
    """Complete the copies that this one must come after: the stream waited for them, if not the host."""
    start, stop = span
    for copy in locked.copies:
        if (writes or copy.writes) and copy.start < stop and start < copy.stop:
            copy.land()


def _send(machine: Machine, copy: LockedCopy) -> None:
    machine.in_flight.append(copy)
    copy.block.copies += (copy,)


def pin_memory(tensor: torch.Tensor, _device: torch.device | None = None) -> torch.Tensor:
    """Return what `tensor.pin_memory()` does while the simulator is installed: a page-locked copy."""
    return new_pinned(tensor).copy_(tensor.detach())


def is_pinned(tensor: torch.Tensor, _device: torch.device | None = None) -> bool:
    """Return what `tensor.is_pinned()` says while the simulator is installed."""
    host_memory, address = state.get_machine().host_memory, tensor.untyped_storage().data_ptr()
    return address in host_memory.allocated or host_memory.registered_at(address, address + 1) is not None


def record_stream(tensor: torch.Tensor, stream: torch.Stream) -> None:
    """Keep a tensor's memory, once it is freed, until a stream has done what it was given by then."""
    block = block_of(tensor)
    if block is not None:
        block.recorded |= {(stream.device_index, stream.stream_id)}
