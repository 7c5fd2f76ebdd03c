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

from hookcore.testing.simulator.devices import Device, HostCopy, StreamState
from hookcore.testing.simulator.errors import RaceError, Violation
from hookcore.testing.simulator.memory import Block, MemoryPool
from hookcore.testing.simulator.ordering import Access, Clock, Operation, StreamKey, join
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookcore.testing.simulator.faults import Request, Watch
    from hookcore.testing.simulator.profiles import DeviceProfile
    from hookcore.testing.simulator.trace import Trace

WAIT_FIRST = (
    "Let the later stream wait first, with wait_stream() or wait_event(), or let the host wait, with "
    "synchronize()."
)
KEEP_LONGER = (
    "Before the last reference goes, let the stream that it was allocated on wait for the other, or call "
    "tensor.record_stream(other)."
)
HOST_FIRST = "Let the host wait first, with event.synchronize() or stream.synchronize()."


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
        pinned: Page-locked host memory.
        blocks: Live blocks of devices, by address.
        pinned_blocks: Live blocks of page-locked memory, by address.
        in_flight: Copies from and to pinned memory that the host has not waited for.
        violations: What was found and not yet raised.
        strict: Whether to raise what is found, at once or at the next operation; else it is kept.
        name_of: Gives the names of the tensors that lie in a range of a block.
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
        self.pinned = MemoryPool()
        self.blocks: dict[int, Block] = {}
        self.pinned_blocks: dict[int, Block] = {}
        self.in_flight: list[HostCopy] = []
        self.violations: list[Violation] = []
        self.strict = True
        self.trace: Trace | None = None
        self.watches: tuple[Watch, ...] = ()
        self.name_of: Callable[[Block, int, int], tuple[str, ...]] = lambda _block, _start, _stop: ()
        self._freed: deque[Block] = deque()

    # Operations

    def reach(self, request: Request) -> None:
        """Lets those who watch count a request before it has any effect, the innermost first.

        Raises:
            BaseException: One of them fails it.
        """
        for watch in reversed(self.watches):
            watch.reach(request)

    def begin(self, stream: StreamState, name: str) -> Operation:
        """Issues an operation on a stream.

        Raises:
            RaceError: Something was found since the last operation.
        """
        self.settle()
        self.raise_found()
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
            self._found(rule, block, earlier, (operation.name, stream.key, WAIT_FIRST), now=True)
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
        """Counts page-locked host memory."""
        self.settle()
        self.reach("pin")
        block = Block(None, nbytes, address, keeper, (0, 0), "pinning")
        self.pinned.take(nbytes)
        self.pinned_blocks[address] = block
        return block

    def drop(self, block: Block) -> None:
        """Is told that nothing refers to a block any more; may be called at any moment."""
        self._freed.append(block)

    def settle(self) -> None:
        """Gives back the blocks that were dropped."""
        while self._freed:
            block = self._freed.popleft()
            if block.device is None:
                del self.pinned_blocks[block.address]
                self.pinned.give_back(block.nbytes)
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
            self._found(
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
            self._found(rule, block, earlier, (name, None, HOST_FIRST), now=True)

    def describe(self, block: Block, start: int, stop: int) -> tuple[str, tuple[str, ...]]:
        """A range of a block, and the tensors in it, for people."""
        part = "" if (start, stop) == (0, block.nbytes) else f"bytes {start} to {stop} of "
        return f"{part}{block}", self.name_of(block, start, stop)

    def _found(
        self, rule: str, block: Block, earlier: Access, by: tuple[str, StreamKey | None, str], *, now: bool
    ) -> None:
        """Raises or keeps that `by`, an operation on a stream, with a remedy, didn't wait for an access."""
        operation, stream, remedy = by
        memory, tensors = self.describe(block, earlier.start, earlier.stop)
        violation = Violation(
            rule=rule,
            memory=memory,
            tensors=tensors,
            operation=operation,
            stream=stream,
            earlier=earlier.operation.name,
            earlier_stream=earlier.operation.stream,
            remedy=remedy,
        )
        if self.strict and now:
            raise RaceError([violation])
        self.violations.append(violation)

    def raise_found(self) -> None:
        """Raises what was found and not yet raised, if it is to be raised.

        Raises:
            RaceError: There is something.
        """
        if self.strict and self.violations:
            found, self.violations = self.violations, []
            raise RaceError(found)

    def reset(self) -> None:
        """Waits for everything, and starts anew at time 0; what is allocated stays.

        All is done now and everybody knows, so nothing has to be remembered. Time itself goes on, as events
        from before may be waited for.
        """
        for device in self.devices:
            self.synchronize(device.index)
        self.settle()
        self.violations.clear()
        for block in (*self.blocks.values(), *self.pinned_blocks.values()):
            block.history.forget()
        self.host_clock.clear()
        self.origin = self.host_time
        for device in self.devices:
            device.memory.peak = device.memory.allocated
            for stream in device.streams.values():
                stream.clock.clear()
        self.pinned.peak = self.pinned.allocated


def _rule(earlier_writes: bool, writes: bool) -> str:
    if not writes:
        return "read before it was written"
    return "written twice at once" if earlier_writes else "overwritten while in use"
