"""The machine: streams in virtual time, the host that drives them, and the rules that they have to keep.

This is pure bookkeeping: it knows no tensors. The host issues operations one after another; each starts
when the host has issued it, its stream is free and the engine that runs it (compute, or a copy engine for
each direction) is free. What is known to be done is kept in vector clocks; see `ordering`.

Python may free a tensor at any moment, also while a method of the machine runs. So a free only joins a
queue, and every method begins by working off the queue.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

import torch

from hookcore.testing.simulator.cuda_errors import CudaError, cuda_error
from hookcore.testing.simulator.devices import Device, HostCopy, StreamState
from hookcore.testing.simulator.errors import HOST_FIRST, KEEP_HOST_MEMORY, KEEP_LONGER, WAIT_FIRST
from hookcore.testing.simulator.findings import Findings
from hookcore.testing.simulator.host_memory import HostMemory
from hookcore.testing.simulator.memory import Block, MemoryPool
from hookcore.testing.simulator.ordering import Access, Clock, Operation, join
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from hookcore.testing.simulator.faults import Request, Watch
    from hookcore.testing.simulator.profiles import DeviceProfile
    from hookcore.testing.simulator.trace import Trace


class Machine:
    """All devices, the host, and what was found wrong.

    Args:
        devices: How many there are.
        profile: What each of them can do.

    Attributes:
        host_clock: What the host knows to be done.
        host_time: The host's time, in seconds.
        origin: When `reset` was called last; times that are told are counted from there.
        host_waits_count: How often the host has waited.
        host_memory: Page-locked memory of the host.
        blocks: Live blocks of devices, by address.
        in_flight: Copies from and to page-locked memory that the host has not waited for.
        findings: What was found wrong.
        pending_error: The error that a call of the runtime has left for the next kernel; `success` for none.
        trace: Where operations are noted; None for nowhere.
        watches: Who counts requests, and may fail one.
    """

    def __init__(self, devices: int, profile: DeviceProfile) -> None:
        self.lock = threading.RLock()
        self.devices = [Device(i, profile, MemoryPool(profile.memory)) for i in range(devices)]
        self.host_clock: Clock = {}
        self.host_time = 0.0
        self.origin = 0.0
        self.host_waits_count = 0
        self.host_memory = HostMemory()
        self.blocks: dict[int, Block] = {}
        self.in_flight: list[HostCopy] = []
        self.findings = Findings()
        self.pending_error = CudaError.success
        self.trace: Trace | None = None
        self.watches: tuple[Watch, ...] = ()
        self._freed: deque[Block] = deque()

    # Operations

    def reach(self, request: Request) -> None:
        """Lets those who watch count a request before it has any effect, the innermost first.

        Raises:
            BaseException: One of them fails it.
        """
        for watch in reversed(self.watches):
            watch.reach(request)

    def launch(self, stream: StreamState, name: str) -> Operation:
        """Issues a kernel on a stream.

        Raises:
            RaceError: Something was found since the last operation.
            torch.AcceleratorError: A call of the runtime has left an error pending.
        """
        self.reach("launch")
        if self.pending_error is not CudaError.success:
            error, self.pending_error = self.pending_error, CudaError.success
            raise cuda_error(error)
        return self.begin(stream, name)

    def begin(self, stream: StreamState, name: str) -> Operation:
        """Issues an operation on a stream.

        Raises:
            RaceError: Something was found since the last operation.
        """
        self.settle()
        self.findings.raise_found()
        self.host_time += self.devices[stream.key[0]].profile.launch_latency
        if stream.heard != self.host_waits_count:
            join(stream.clock, self.host_clock)
            stream.heard = self.host_waits_count
        stream.tick += 1
        stream.clock[stream.key] = stream.tick
        return Operation(name, stream.key, stream.tick)

    def touch(
        self,
        operation: Operation,
        stream: StreamState,
        block: Block,
        span: tuple[int, int],
        *,
        writes: bool,
    ) -> None:
        """Notes that an operation reads or writes a span of bytes of a block.

        Raises:
            RaceError: Another operation that it races with is not ordered before it.
        """
        earlier = block.history.conflict(*span, writes, stream.clock)
        if earlier is not None:
            rule = _rule(earlier.writes, writes)
            self.findings.add(rule, block, earlier, (operation.name, stream.key, WAIT_FIRST), now=True)
        block.history.record(Access(*span, writes, operation), self.host_clock)

    def finish(self, operation: Operation, stream: StreamState, engine: str, seconds: float) -> None:
        """Says which engine runs an operation, and how long it takes."""
        engines = self.devices[stream.key[0]].engines
        start = max(stream.free_at, self.host_time, engines.get(engine, 0.0))
        if self.trace is not None:
            times = (max(stream.end, self.host_time), start, start + seconds)
            self.trace.add(operation, engine, *(time - self.origin for time in times))
        stream.free_at = stream.end = engines[engine] = start + seconds

    # What waits for what

    def wait(self, stream: StreamState, clock: Clock, time: float) -> None:
        """Has a stream wait for all that a clock knows, which is done at a time."""
        self.settle()
        join(stream.clock, clock)
        stream.free_at = max(stream.free_at, time)

    def mark(self, stream: StreamState) -> tuple[Clock, float]:
        """What is done, and when, once all that the stream was given so far is done."""
        self.settle()
        return dict(stream.clock), max(stream.free_at, self.host_time)

    def host_waits(self, clock: Clock, time: float) -> None:
        """Has the host wait for all that a clock knows, which is done at a time."""
        self.settle()
        join(self.host_clock, clock)
        self.host_waits_count += 1
        self.host_time = max(self.host_time, time)
        copies, self.in_flight = self.in_flight, []
        for copy in copies:
            if copy.operation.is_before(self.host_clock):
                copy.land()
            else:
                self.in_flight.append(copy)
        for device in self.devices:
            device.memory.release(self.host_time)

    def host_asks(self, clock: Clock, time: float) -> bool:
        """Whether it is done. Asking takes time, so that a loop ends; a yes is as good as a wait."""
        self.host_time += self.devices[0].profile.launch_latency
        if time > self.host_time:
            self.pending_error = CudaError.success  # as torch then clears "not ready", the last error
            return False
        self.host_waits(clock, time)
        return True

    def synchronize(self, device: int) -> None:
        """Has the host wait for all streams of a device."""
        clock: Clock = {}
        streams = self.devices[device].streams.values()
        for stream in streams:
            join(clock, stream.clock)
        self.host_waits(clock, max(stream.free_at for stream in streams))

    # Memory

    def allocate(self, stream: StreamState, nbytes: int, address: int, keeper: object, made_by: str) -> Block:
        """Gives memory of a stream's device to that stream; see `make_room`, which goes first."""
        device = stream.key[0]
        block = Block(device, nbytes, address, keeper, stream.key, made_by)
        self.devices[device].memory.take(nbytes)
        self.blocks[address] = block
        tick = stream.clock.get(stream.key, 0)
        if tick > self.host_clock.get(stream.key, 0):
            # What the stream did so far may have used the same memory: others have to wait for it.
            allocation = Operation(f"allocating it for {made_by}", stream.key, tick)
            block.history.record(Access(0, nbytes, True, allocation), self.host_clock)
        if self.trace is not None:
            self._trace_memory(self.devices[device], self.trace)
        return block

    def make_room(self, device: int, nbytes: int) -> None:
        """Sees to it that so many bytes can be allocated.

        Raises:
            torch.OutOfMemoryError: They cannot, even when all that is held has come back.
        """
        self.settle()
        if nbytes:
            self.reach("allocate")
        memory = self.devices[device].memory
        memory.release(self.host_time)
        if not memory.fits(nbytes) and (held := memory.all_held()) is not None:
            self.host_waits(*held)
        if not memory.fits(nbytes):
            capacity = memory.capacity or 0
            raise torch.OutOfMemoryError(
                f"sim:{device} is out of memory: tried to allocate {format_bytes(nbytes)} ({nbytes} B) with "
                f"{format_bytes(memory.allocated)} ({memory.allocated} B) of {format_bytes(capacity)} "
                f"({capacity} B) in use. simulator.snapshot() lists who has it."
            )

    def pin(self, nbytes: int, address: int, keeper: object) -> Block:
        """Counts an allocation of page-locked host memory.

        Raises:
            torch.AcceleratorError: The system doesn't let so much be page-locked.
        """
        self.settle()
        self.reach("pin")
        if not self.host_memory.can_lock(nbytes, self.devices[0].profile):
            raise cuda_error(CudaError.memoryAllocation)
        block = Block(None, nbytes, address, keeper, (0, 0), "pinning")
        self.host_memory.pool.take(nbytes)
        self.host_memory.allocated[address] = block
        return block

    def register(self, device: int, address: int, nbytes: int) -> CudaError:
        """Page-locks a range of host addresses where it is; see `HostMemory.registration_error`."""
        self.settle()
        error = self.host_memory.registration_error(address, nbytes, self.devices[device].profile)
        if error is CudaError.success:
            self.host_memory.add(Block(None, nbytes, address, None, (0, 0), "cudaHostRegister"))
        return self._result(error)

    def unregister(self, address: int) -> CudaError:
        """Unlocks the range that was registered at an address.

        A finalizer may call it at any moment, and the memory may be gone when it returns. So copies that are
        under way end here, and its bytes are given back later.
        """
        block = self.host_memory.remove(address)
        if block is None:
            return self._result(CudaError.hostMemoryNotRegistered)
        by = ("cudaHostUnregister", None, KEEP_HOST_MEMORY)
        for access in block.history:
            if not access.operation.is_before(self.host_clock):
                self.findings.add("unregistered while in use", block, access, by, now=False)
        for copy in block.copies:
            copy.land()
        self._freed.append(block)
        return self._result(CudaError.success)

    def _result(self, error: CudaError) -> CudaError:
        if error is not CudaError.success:
            self.pending_error = error
        return error

    def drop(self, block: Block) -> None:
        """Is told that nothing refers to a block any more; may be called at any moment."""
        self._freed.append(block)

    def settle(self) -> None:
        """Gives back the blocks that were dropped."""
        while self._freed:
            block = self._freed.popleft()
            if block.device is None:
                if self.host_memory.allocated.get(block.address) is block:
                    del self.host_memory.allocated[block.address]
                self.host_memory.pool.give_back(block.nbytes)
            else:
                del self.blocks[block.address]
                self._free(block, self.devices[block.device])

    def _free(self, block: Block, device: Device) -> None:
        owner = device.streams[block.stream[1]]
        for access in block.history:
            operation = access.operation
            if operation.stream == block.stream or operation.stream in block.recorded:
                continue
            if operation.is_before(owner.clock) or operation.is_before(self.host_clock):
                continue
            self.findings.add(
                "freed while in use", block, access, ("freeing it", block.stream, KEEP_LONGER), now=False
            )
        streams = [self.devices[index].streams[number] for index, number in block.recorded]
        until = max((stream.free_at for stream in streams), default=0.0)
        if until > self.host_time:
            clock: Clock = {}
            for stream in streams:
                join(clock, stream.clock)
            device.memory.hold(block.nbytes, until, clock)
        else:
            device.memory.give_back(block.nbytes)
        if self.trace is not None:
            self._trace_memory(device, self.trace)

    def _trace_memory(self, device: Device, trace: Trace) -> None:
        trace.note_memory(device.index, self.host_time - self.origin, device.memory.allocated)

    # What was found

    def host_touches(self, block: Block, start: int, stop: int, writes: bool, name: str) -> None:
        """Checks that the host may read or write bytes of pinned memory now.

        Raises:
            RaceError: A copy from or to it may still run.
        """
        earlier = block.history.conflict(start, stop, writes, self.host_clock)
        if earlier is not None:
            rule = "host write too early" if writes else "host read too early"
            self.findings.add(rule, block, earlier, (name, None, HOST_FIRST), now=True)

    def reset(self) -> None:
        """Waits for everything, and starts anew at time 0; what is allocated stays.

        All is done now and everybody knows, so nothing has to be remembered. Time itself goes on, as events
        from before may be waited for.
        """
        for device in self.devices:
            self.synchronize(device.index)
        self.settle()
        self.findings.violations.clear()
        self.pending_error = CudaError.success
        locked = (*self.host_memory.allocated.values(), *self.host_memory.registered)
        for block in (*self.blocks.values(), *locked):
            block.history.forget()
        self.host_clock.clear()
        self.origin = self.host_time
        for device in self.devices:
            device.memory.peak = device.memory.allocated
            for stream in device.streams.values():
                stream.clock.clear()
        self.host_memory.pool.peak = self.host_memory.pool.allocated


def _rule(earlier_writes: bool, writes: bool) -> str:
    if not writes:
        return "read before it was written"
    return "written twice at once" if earlier_writes else "overwritten while in use"
