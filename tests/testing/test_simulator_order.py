"""Random programs of copies, kernels, waits and frees, against a slow oracle of what happens before what.

The oracle draws a graph: a node for each thing that the host, or a stream, does; an edge where one comes
after the other. Two accesses of the same memory, one of them writing, race when no path leads from the
earlier to the later one.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from attrs import define, field
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hookcore.testing.simulator.ordering import Access, History, Operation, join

STREAMS, BUFFERS, EVENTS = 3, 2, 2
streams, buffers, events = (st.integers(0, count - 1) for count in (STREAMS, BUFFERS, EVENTS))
STEPS = {
    "allocate": (buffers, streams),
    "fill": (buffers, streams),
    "refill": (buffers, streams),
    "read": (buffers, streams),
    "write": (buffers, streams),
    "fetch": (buffers, streams),
    "free": (buffers,),
    "record_stream": (buffers, streams),
    "record": (events, streams),
    "wait": (events, streams),
    "wait_stream": (streams, streams),
    "host_waits_stream": (streams,),
    "host_waits_event": (events,),
    "host_writes": (),
    "host_reads": (),
}
programs = st.lists(
    st.sampled_from(list(STEPS)).flatmap(lambda name: st.tuples(st.just(name), *STEPS[name])), max_size=24
)


@define(eq=False)
class Node:
    """Something that happens; `after` has what comes before it, directly."""

    after: list[Node] = field(factory=list)
    operation: bool = False

    def comes_after(self, other):
        seen, todo = set(), [self]
        while todo:
            node = todo.pop()
            if node is other:
                return True
            if node not in seen:
                seen.add(node)
                todo += node.after
        return False


@define(eq=False)
class Buffer:
    """Memory, who touched it, and what its stream had been given when it was allocated."""

    stream: int = 0
    before: list[Node] = field(factory=list)
    touched: list[tuple[Node, int, bool]] = field(factory=list)
    recorded: set[int] = field(factory=set)


class Oracle:
    """Says for each step whether it breaks a rule."""

    def __init__(self):
        self.host = Node()
        self.last = [Node() for _ in range(STREAMS)]
        self.given = [[] for _ in range(STREAMS)]
        self.buffers = [None] * BUFFERS
        self.source, self.target = Buffer(), Buffer()
        self.events = [None] * EVENTS
        self.operations = []

    def step(self, name, *arguments):
        self.host = Node([self.host])
        return getattr(self, name)(*arguments) or False

    def on_stream(self, stream, *touches):
        node = Node([self.last[stream], self.host], operation=True)
        self.last[stream] = node
        self.given[stream].append(node)
        self.operations.append(node)
        found = [self.touch(buffer, node, stream, writes) for buffer, writes in touches]  # all are noted
        return any(found)

    def touch(self, buffer, node, stream, writes):
        races = any(
            (writes or wrote) and not node.comes_after(earlier) for earlier, _, wrote in buffer.touched
        ) or any(not node.comes_after(earlier) for earlier in buffer.before)
        if stream is not None:
            buffer.touched.append((node, stream, writes))
        return races

    def allocate(self, buffer, stream):
        freed = self.buffers[buffer] is not None and self.free(buffer)
        self.buffers[buffer] = Buffer(stream, list(self.given[stream]))
        return freed

    def free(self, buffer):
        freed, self.buffers[buffer] = self.buffers[buffer], None
        end = Node([self.last[freed.stream], self.host])
        return any(
            stream not in freed.recorded and not end.comes_after(node) for node, stream, _ in freed.touched
        )

    def fill(self, buffer, stream):
        return self.on_stream(stream, (self.buffers[buffer], True), (self.source, False))

    def refill(self, buffer, stream):
        return self.on_stream(stream, (self.buffers[buffer], True), (self.target, False))

    def read(self, buffer, stream):
        return self.on_stream(stream, (self.buffers[buffer], False))

    def write(self, buffer, stream):
        return self.on_stream(stream, (self.buffers[buffer], True))

    def fetch(self, buffer, stream):
        return self.on_stream(stream, (self.buffers[buffer], False), (self.target, True))

    def record_stream(self, buffer, stream):
        self.buffers[buffer].recorded.add(stream)

    def record(self, event, stream):
        self.events[event] = Node([self.last[stream], self.host])

    def wait(self, event, stream):
        if self.events[event] is not None:
            self.last[stream] = Node([self.last[stream], self.events[event]])

    def wait_stream(self, stream, other):
        self.last[stream] = Node([self.last[stream], self.last[other], self.host])

    def host_waits_stream(self, stream):
        self.host = Node([self.host, self.last[stream]])

    def host_waits_event(self, event):
        if self.events[event] is not None:
            self.host = Node([self.host, self.events[event]])

    def host_writes(self):
        return self.touch(self.source, self.host, None, True)

    def host_reads(self):
        return self.touch(self.target, self.host, None, False)


class Simulated:
    """Does the same on the simulated device."""

    def __init__(self, sim):
        self.sim = sim
        self.streams = [sim.Stream() for _ in range(STREAMS)]
        self.buffers = [None] * BUFFERS
        self.events = [sim.Event() for _ in range(EVENTS)]
        self.source, self.target = torch.ones(8).pin_memory(), torch.ones(8).pin_memory()

    def step(self, name, *arguments):
        getattr(self, name)(*arguments)
        return bool(self.sim.violations())

    def allocate(self, buffer, stream):
        self.buffers[buffer] = None
        with self.streams[stream]:
            self.buffers[buffer] = torch.empty(8, device="sim")

    def free(self, buffer):
        self.buffers[buffer] = None

    def fill(self, buffer, stream):
        with self.streams[stream]:
            self.buffers[buffer].copy_(self.source, non_blocking=True)

    def refill(self, buffer, stream):
        with self.streams[stream]:
            self.buffers[buffer].copy_(self.target, non_blocking=True)

    def read(self, buffer, stream):
        with self.streams[stream]:
            self.buffers[buffer] + 1

    def write(self, buffer, stream):
        with self.streams[stream]:
            self.buffers[buffer].mul_(2)

    def fetch(self, buffer, stream):
        with self.streams[stream]:
            self.target.copy_(self.buffers[buffer], non_blocking=True)

    def record_stream(self, buffer, stream):
        self.buffers[buffer].record_stream(self.streams[stream])

    def record(self, event, stream):
        self.events[event].record(self.streams[stream])

    def wait(self, event, stream):
        self.streams[stream].wait_event(self.events[event])

    def wait_stream(self, stream, other):
        self.streams[stream].wait_stream(self.streams[other])

    def host_waits_stream(self, stream):
        self.streams[stream].synchronize()

    def host_waits_event(self, event):
        self.events[event].synchronize()

    def host_writes(self):
        self.source.mul_(1)

    def host_reads(self):
        self.target + 1


FOR_EACH_EXAMPLE = settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def runnable(program):
    """Drops the steps that use memory that is not there."""
    there = set()
    for step in program:
        name, *arguments = step
        if "free" in name or STEPS[name][:1] == (buffers,):
            if name == "allocate":
                there.add(arguments[0])
            elif arguments[0] not in there:
                continue
            elif name == "free":
                there.remove(arguments[0])
        yield step


@FOR_EACH_EXAMPLE
@given(programs)
@example([("allocate", 0, 0), ("fill", 0, 0), ("record", 0, 0), ("wait", 0, 1), ("read", 0, 1), ("free", 0)])
@example([("allocate", 0, 0), ("record", 0, 0), ("fill", 0, 0), ("wait", 0, 1), ("read", 0, 1)])
@example([("allocate", 0, 0), ("fill", 0, 0), ("fetch", 0, 0), ("refill", 0, 1)])
@example(
    [
        ("allocate", 0, 0),
        ("fill", 0, 0),
        ("fetch", 0, 0),
        ("refill", 0, 0),
        ("fetch", 0, 0),
        ("host_waits_stream", 0),
    ]
)
@example([("allocate", 0, 0), ("fill", 0, 0), ("host_waits_stream", 0), ("host_writes",), ("fill", 0, 1)])
def test_exactly_what_the_oracle_finds_is_found(sim, program):
    sim.reset()
    oracle, simulated = Oracle(), Simulated(sim)
    with sim.limited(strict=False), sim.traced() as trace:
        for step in runnable(program):
            expected, found = oracle.step(*step), simulated.step(*step)
            assert expected == found, step
            if found:
                break
        times = dict(zip(oracle.operations, trace.spans, strict=True))
        for later, span in times.items():
            for earlier, earlier_span in times.items():
                if earlier is not later and later.comes_after(earlier):
                    assert earlier_span.end <= span.start
        for engine in {span.engine for span in trace.spans}:
            spans = [span for span in trace.spans if span.engine == engine]
            assert all(first.end <= second.start for first, second in itertools.pairwise(spans))
        torch.get_device_module("sim").synchronize()
        del simulated
        sim.reset()
    assert torch.get_device_module("sim").memory_allocated() == 0


# The history of a block on its own, with ranges of bytes


ranges = st.tuples(st.integers(0, 5), st.integers(1, 3)).map(lambda it: (it[0], it[0] + it[1]))
accesses = st.lists(
    st.tuples(streams, ranges, st.booleans(), st.lists(streams, max_size=2), st.lists(streams, max_size=1)),
    max_size=12,
)


@given(accesses)
def test_a_history_forgets_nothing_that_matters(program):
    history, everything, host = History(), [], {}
    clocks = [{} for _ in range(STREAMS)]
    for stream, (start, stop), writes, waits, host_waits in program:
        clock = clocks[stream]
        for other in host_waits:
            join(host, clocks[other])
        for known in (host, *(clocks[other] for other in waits)):
            join(clock, dict(known))
        key = (0, stream)
        clock[key] = clock.get(key, 0) + 1
        operation = Operation("kernel", key, clock[key])
        races = any(
            (writes or wrote) and low < stop and start < high and clock.get(it.stream, 0) < it.tick
            for it, low, high, wrote in everything
        )
        assert (history.conflict(start, stop, writes, clock) is not None) == races
        if races:
            break
        history.record(Access(start, stop, writes, operation), host)
        everything.append((operation, start, stop, writes))


def test_a_history_forgets_what_the_host_knows_to_be_done():
    history, key = History(), (0, 0)
    for tick in range(1, 100):
        read = Access(tick, tick + 2, False, Operation("kernel", key, tick))  # none covers another
        history.record(read, {key: tick - tick % 10})
        assert len(list(history)) <= 10


def test_reads_of_many_streams_are_all_kept_until_a_write(sim):
    buffer = torch.ones(8, device="sim")
    torch.get_device_module("sim").synchronize()
    readers = [sim.Stream() for _ in range(3)]
    for stream in readers:
        with stream:
            buffer + 1
    for stream in readers[1:]:
        torch.get_device_module("sim").current_stream().wait_stream(stream)
    with pytest.raises(sim.RaceError, match=f"aten.add.Tensor on stream {readers[0].stream_id} of"):
        buffer.zero_()
    readers[0].synchronize()
    buffer.zero_()
