"""The rules of CUDA that only some profiles have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FOR_EACH_EXAMPLE = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
STREAMS, EVENTS = 2, 3
SECOND = 1_000_000_000  # cycles of a kernel that sleeps
streams, events = st.integers(0, STREAMS - 1), st.integers(0, EVENTS - 1)


def module():
    return torch.get_device_module("sim")


@pytest.fixture
def cuda(sim):
    with sim.limited(profile=sim.CUDA):
        yield sim


class Clock:
    """Seconds at which each stream is free, each event is reached, and the host is; launches take no time."""

    def __init__(self):
        self.host = self.engine = 0
        self.streams = [0] * STREAMS
        self.events = [None] * EVENTS

    def work(self, stream):
        self.engine = self.streams[stream] = max(self.host, self.engine, self.streams[stream]) + 1

    def record(self, event, stream):
        self.events[event] = max(self.host, self.streams[stream])

    def wait_for_event(self, event):
        self.host = max(self.host, self.events[event] or 0)

    def wait_for_stream(self, stream):
        self.host = max(self.host, self.streams[stream])

    def wait_for_device(self):
        self.host = max(self.host, *self.streams)

    def wait(self, event, stream):
        self.streams[stream] = max(self.streams[stream], self.events[event] or 0)


STEPS = {
    "work": (streams,),
    "record": (events, streams),
    "wait": (events, streams),
    "wait_for_event": (events,),
    "wait_for_stream": (streams,),
    "wait_for_device": (),
}
programs = st.lists(
    st.sampled_from(sorted(STEPS)).flatmap(lambda name: st.tuples(st.just(name), *STEPS[name])), max_size=15
)


@FOR_EACH_EXAMPLE
@given(programs)
def test_only_events_that_are_done_can_be_timed(cuda, program):
    cuda.reset()
    clock, made = Clock(), [cuda.Stream() for _ in range(STREAMS)]
    marks = [cuda.Event(enable_timing=True) for _ in range(EVENTS)]
    steps = {
        "record": lambda event, stream: marks[event].record(made[stream]),
        "wait": lambda event, stream: made[stream].wait_event(marks[event]),
        "wait_for_event": lambda event: marks[event].synchronize(),
        "wait_for_stream": lambda stream: made[stream].synchronize(),
        "wait_for_device": module().synchronize,
    }
    for name, *arguments in program:
        getattr(clock, name)(*arguments)
        if name == "work":
            with made[arguments[0]]:
                module()._sleep(SECOND)
        else:
            steps[name](*arguments)
        for begun, mark in zip(clock.events, marks, strict=True):
            for ended, other in zip(clock.events, marks, strict=True):
                if begun is None or ended is None:
                    continue
                if max(begun, ended) <= clock.host:
                    assert mark.elapsed_time(other) == pytest.approx((ended - begun) * 1e3, abs=10)
                else:
                    with pytest.raises(RuntimeError, match="Both events must be completed"):
                        mark.elapsed_time(other)


def test_a_generic_device_times_events_that_are_not_done(sim):
    begun, ended = (sim.Event(enable_timing=True) for _ in range(2))
    begun.record()
    module()._sleep(SECOND)
    ended.record()
    assert begun.elapsed_time(ended) == pytest.approx(1000, abs=1)
