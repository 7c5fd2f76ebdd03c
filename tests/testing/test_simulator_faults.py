"""Requests are counted, and exactly the one that is to fail does, without any effect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FOR_EACH_EXAMPLE = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class InjectedError(Exception):
    """Raised on purpose."""


class Program:
    """One step for each kind of request, with the requests that it makes."""

    def __init__(self, sim):
        self.module = torch.get_device_module("sim")
        self.side = sim.Stream()
        self.event = sim.Event()
        self.source = torch.ones(4).pin_memory()
        self.there = torch.zeros(4, device="sim")
        self.made = []

    def allocate(self):
        self.made.append(torch.empty(4, device="sim"))

    def allocate_nothing(self):
        torch.empty(0, device="sim")

    def pin(self):
        self.made.append(torch.empty(4, pin_memory=True))

    def launch(self):
        self.there.add_(1)

    def launch_and_allocate(self):
        self.made.append(self.there + 1)

    def copy_in(self):
        self.there.copy_(self.source, non_blocking=True)

    def copy_out(self):
        self.source.copy_(self.there)

    def bring(self):
        self.made.append(self.source.to("sim"))

    def record(self):
        self.event.record()

    def wait_event(self):
        self.side.wait_event(self.event)

    def wait_stream(self):
        self.side.wait_stream(self.module.current_stream())

    def wait_for_stream(self):
        self.side.synchronize()

    def wait_for_event(self):
        self.event.synchronize()

    def wait_for_device(self):
        self.module.synchronize()

    def observed(self):
        self.module.synchronize()
        seen = repr(self.event), self.there.tolist(), self.source.tolist(), len(self.made)
        return seen, self.module.memory_allocated()


REQUESTS = {
    "allocate": ["allocate"],
    "allocate_nothing": [],
    "pin": ["pin"],
    "launch": ["launch"],
    "launch_and_allocate": ["launch", "allocate"],
    "copy_in": ["copy"],
    "copy_out": ["copy"],
    "bring": ["allocate", "copy"],
    "record": ["record_event"],
    "wait_event": ["wait_event"],
    "wait_stream": ["wait_stream"],
    "wait_for_stream": ["synchronize"],
    "wait_for_event": ["synchronize"],
    "wait_for_device": ["synchronize"],
}
KINDS = sorted({kind for kinds in REQUESTS.values() for kind in kinds})
steps = st.lists(st.sampled_from(sorted(REQUESTS)), max_size=12)


@FOR_EACH_EXAMPLE
@given(steps, st.sampled_from(KINDS), st.integers(1, 5))
def test_exactly_the_request_that_is_to_fail_fails_and_has_no_effect(sim, names, kind, nth):
    program, expected, left = Program(sim), dict.fromkeys(KINDS, 0), nth
    with sim.counting() as around, sim.fail_at(kind, nth, InjectedError) as counts:
        for name in names:
            fails = False
            for request in REQUESTS[name]:
                expected[request] += 1
                left -= request == kind
                if fails := request == kind and not left:
                    break
            if fails:
                left = -1
                with pytest.raises(InjectedError):
                    getattr(program, name)()
            else:
                getattr(program, name)()
            assert {it: counts[it] for it in KINDS} == expected
    counts.subtract(around)
    assert counts.total() == (counts[kind] == 1)  # the outer block never hears of the request that failed
    program.launch()


@FOR_EACH_EXAMPLE
@given(st.sampled_from(sorted(REQUESTS)), st.sampled_from(KINDS))
def test_a_failed_step_changes_nothing_and_can_be_done_again(sim, name, kind):
    program, twin = Program(sim), Program(sim)
    before = program.observed()
    with sim.fail_at(kind, 1, InjectedError):
        if kind in REQUESTS[name]:
            with pytest.raises(InjectedError):
                getattr(program, name)()
            assert program.observed() == before
        getattr(program, name)()
    getattr(twin, name)()
    assert program.observed()[0] == twin.observed()[0]


@pytest.mark.parametrize("request_", ["wait_event", "wait_stream", "synchronize"])
def test_who_fails_to_wait_has_not_waited(sim, request_):
    main, side = torch.get_device_module("sim").current_stream(), sim.Stream()
    source = torch.ones(4).pin_memory()
    with side:
        weight = source.to("sim", non_blocking=True)
    wait = {
        "wait_event": lambda: main.wait_event(side.record_event()),
        "wait_stream": lambda: main.wait_stream(side),
        "synchronize": side.synchronize,
    }[request_]
    with sim.fail_at(request_, 1, InjectedError), pytest.raises(InjectedError):
        wait()
    with pytest.raises(sim.RaceError, match="read before it was written"):
        weight + 1
    wait()
    weight + 1
    torch.get_device_module("sim").synchronize()


def test_blocks_nest_and_end(sim):
    with sim.fail_at("launch", 2, InjectedError("outer")), sim.fail_at("launch", 1, KeyboardInterrupt):
        there = torch.empty(2, device="sim")
        with pytest.raises(KeyboardInterrupt):
            there.zero_()
        there.zero_()
        with pytest.raises(InjectedError, match="outer"):
            there.zero_()
    there.zero_()


@pytest.mark.parametrize(
    ("request_", "nth", "message"), [("alloc", 1, "'alloc'.*allocate, pin"), ("pin", 0, "nth is 0")]
)
def test_what_cannot_fail_is_refused(sim, request_, nth, message):
    with pytest.raises(ValueError, match=message), sim.fail_at(request_, nth, InjectedError):
        pass
