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

from hookcore.testing.simulator.capture import Captures
from hookcore.testing.simulator.cuda_errors import CudaError, cuda_error
from hookcore.testing.simulator.devices import Device, HostCopy, Mark, StreamState
from hookcore.testing.simulator.errors import HOST_FIRST, KEEP_LONGER, WAIT_FIRST
from hookcore.testing.simulator.findings import Findings
from hookcore.testing.simulator.host_memory import HostMemory
from hookcore.testing.simulator.ordering import Access, Clock, Operation, join

if TYPE_CHECKING:
    from hookcore.testing.simulator.faults import Request, Watch
    from hookcore.testing.simulator.memory import Block
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
        captures: Captures of graphs that are under way.
        findings: What was found wrong.
        pending_error: The error that a call of the runtime has left for the next kernel; `success` for none.
        trace: Where operations are noted; None for nowhere.
        watches: Who counts requests, and may fail one.
    """

    def __init__(self, devices: int, profile: DeviceProfile) -> None:
        self.lock = threading.RLock()
        self.devices = [Device(i, profile) for i in range(devices)]
        self.host_clock: Clock = {}
        self.host_time = 0.0
        self.origin = 0.0
        self.host_waits_count = 0
        self.host_memory = HostMemory()
        self.blocks: dict[int, Block] = {}
        self.in_flight: list[HostCopy] = []
        self.captures = Captures()
        self.findings = Findings()
        self.pending_error = CudaError.success
        self.trace: Trace | None = None
        self.watches: tuple[Watch, ...] = ()
        self._freed: deque[Block] = deque()

    # Operations

    def reach(self, request: Request) -> None:
        """Let those who watch count a request before it has any effect, the innermost first.

        Raises:
            BaseException: One of them fails it.
        """
        for watch in reversed(self.watches):
            watch.reach(request)

    def launch(self, stream: StreamState, name: str) -> Operation:
        """Issue a kernel on a stream.

        Raises:
            RaceError: Something was found since the last operation.
            torch.AcceleratorError: A call of the runtime has left an error pending.
        """
        self.reach("launch")
        if self.pending_error is not CudaError.success:
            error, self.pending_error = self.pending_error, CudaError.success
            raise cuda_error(error)
        device = self.devices[stream.key[0]]
        if device.profile.first_launch and name not in device.loaded:
            device.loaded.add(name)
            self.host_time += device.profile.first_launch
        return self.begin(stream, name)

    def begin(self, stream: StreamState, name: str) -> Operation:
        """Issue an operation on a stream.

        Raises:
            RaceError: Something was found since the last operation.
            torch.AcceleratorError: The stream is captured, and an error has broken the capture.
        """
        self.settle()
        self.findings.raise_found()
        self.captures.check(stream)
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
        """Note that an operation reads or writes a span of bytes of a block.

        Raises:
            RaceError: Another operation that it races with is not ordered before it.
        """
        earlier = block.history.conflict(*span, writes, stream.clock)
        if earlier is not None:
            rule = _rule(earlier.writes, writes)
            self.findings.add(rule, block, earlier, (operation.name, stream.key, WAIT_FIRST), now=True)
        block.history.record(Access(*span, writes, operation), self.host_clock)
        if self.trace is not None and block.device is not None:
            self.trace.touch(operation, block.address + span[0])

    def finish(self, operation: Operation, stream: StreamState, engine: str, seconds: float) -> None:
        """State which engine runs an operation, and how long it takes; what is captured does not run."""
        if stream.capture is not None:
            return
        device = self.devices[stream.key[0]]
        engines = device.engines
        start = max(stream.free_at, self.host_time, engines.get(engine, 0.0))
        if self.trace is not None:
            times = (max(stream.end, self.host_time), start, start + seconds)
            self.trace.add(operation, engine, *(time - self.origin for time in times))
        stream.free_at = stream.end = engines[engine] = start + seconds
        if device.profile.launch_queue is not None:
            self.host_time = max(self.host_time, stream.queue(device.profile.launch_queue))

    # What waits for what

    def wait(self, stream: StreamState, mark: Mark) -> None:
        """Make a stream wait until another one reaches a mark.

        Raises:
            torch.AcceleratorError: One of them is captured, and the other not or by another capture.
        """
        self.settle()
        self.captures.waits(stream, mark.capture)
        join(stream.clock, mark.clock)
        stream.free_at = max(stream.free_at, mark.time)

    def mark(self, stream: StreamState) -> Mark:
        """Mark the end of what the stream was given so far.

        Raises:
            torch.AcceleratorError: The stream is captured, and an error has broken the capture.
        """
        self.settle()
        self.captures.check(stream)
        return Mark(dict(stream.clock), max(stream.free_at, self.host_time), stream.capture)

    def host_waits(self, clock: Clock, time: float) -> None:
        """Make the host wait for all that a clock knows, which is done at a time."""
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
        """Return whether it is done. Asking takes time, so that a loop ends; a yes is as good as a wait."""
        self.host_time += self.devices[0].profile.launch_latency
        if time > self.host_time:
            self.pending_error = CudaError.success  # as torch then clears "not ready", the last error
            return False
        self.host_waits(clock, time)
        return True

    def synchronize(self, device: int) -> None:
        """Make the host wait for all streams of a device.

        Raises:
            torch.AcceleratorError: One of them is captured, or a capture forbids it.
        """
        clock: Clock = {}
        streams = self.devices[device].streams.values()
        for stream in streams:
            self.captures.host_waits_for(stream)
            join(clock, stream.clock)
        self.host_waits(clock, max(stream.free_at for stream in streams))

    # Memory

    def drop(self, block: Block) -> None:
        """Queue a block to which nothing refers any more; may be called at any moment."""
        self._freed.append(block)

    def settle(self) -> None:
        """Give back the blocks that were dropped."""
        while self._freed:
            block = self._freed.popleft()
            if block.device is None:
                if self.host_memory.allocated.get(block.address) is block:
                    del self.host_memory.allocated[block.address]
                self.host_memory.count.give_back(block.nbytes)
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
            device.memory.hold(block, until, clock)
        else:
            device.memory.give_back(block)
        self.trace_memory(device)

    def trace_memory(self, device: Device) -> None:
        """Note in the trace, if there is one, how much of a device's memory is in use."""
        if self.trace is not None:
            self.trace.note_memory(device.index, self.host_time - self.origin, device.memory.allocated)

    # What was found

    def host_touches(self, block: Block, start: int, stop: int, writes: bool, name: str) -> None:
        """Check that the host may read or write bytes of pinned memory now.

        Raises:
            RaceError: A copy from or to it may still run.
        """
        earlier = block.history.conflict(start, stop, writes, self.host_clock)
        if earlier is not None:
            rule = "host write too early" if writes else "host read too early"
            self.findings.add(rule, block, earlier, (name, None, HOST_FIRST), now=True)

    def reset(self) -> None:
        """Wait for everything, and starts anew at time 0; what is allocated stays.

        All is done now and everybody knows, so nothing has to be remembered. Time itself goes on, as events
        from before may be waited for.
        """
        self.captures.abandon()
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
            device.memory.reset_peaks()
            for stream in device.streams.values():
                stream.clock.clear()
        self.host_memory.count.reset_peak()


def _rule(earlier_writes: bool, writes: bool) -> str:
    if not writes:
        return "read before it was written"
    return "written twice at once" if earlier_writes else "overwritten while in use"
