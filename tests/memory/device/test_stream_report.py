"""What streaming counts, and its timeline: exact, as the simulated device's time is virtual."""

from __future__ import annotations

import sys
from itertools import pairwise
from unittest.mock import patch

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from techniques import toy
from torch import nn

import hookcore
from hookcore import Binding, Hook, HookcoreError, PlanError
from hookcore.memory import StreamReport, record_timeline
from hookcore.testing import simulator
from hookcore.testing.modules import Counter
from hookcore_plugins import GroupOffload, SequentialOffload

FOR_EACH_EXAMPLE = settings(
    max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTH = 16
SLOW = simulator.DeviceProfile(name="slow", host_to_device=1e8, kernel_latency=1e-5)


def build(widths):
    """Layers of the given widths, each followed by nothing that takes time."""
    layers = [nn.Linear(before, after) for before, after in pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], widths[0]))


def call(model, x, times=1):
    with torch.no_grad():
        for _ in range(times):
            model(x)


def input_for(model):
    return torch.ones(2, model[0].in_features, device="sim")


def synchronize():
    torch.get_device_module("sim").synchronize()


def counted(applied):
    (entry,) = applied.run_report().entries
    return entry.counted


def packed(layer):
    return sum(-(-it.nbytes // 64) * 64 for it in layer.parameters())


sizes = st.integers(1, 8).map(lambda it: 8 * it)
widths = st.lists(sizes, min_size=3, max_size=8) | sizes.map(lambda it: [it] * 5)


def budgeted(share):
    """A budget of a share of the weights, or what is needed at least."""

    def made(model):
        sizes = [packed(layer) for layer in model]
        return GroupOffload("sim", memory_budget=max(*sizes, int(share * sum(sizes))))

    return made


techniques = st.one_of(
    st.integers(0, 4).map(lambda ahead: lambda _: GroupOffload("sim", prefetch=ahead)),
    st.floats(0.2, 1.2).map(budgeted),
    st.just(lambda _: SequentialOffload("sim")),
)


# What is counted


@FOR_EACH_EXAMPLE
@given(widths, techniques, st.integers(1, 3))
def test_copies_bytes_and_uses_are_counted_exactly(sim, widths, technique, passes):
    model = build(widths)
    applied = hookcore.apply(model, [technique(model)])
    x = input_for(model)
    call(model, x, 3)
    before = counted(applied)
    synchronize()
    with sim.traced() as trace:
        call(model, x, passes)
    after = counted(applied)
    copies = [it for it in trace.spans if it.engine == "copy in"]
    assert after.copies - before.copies == len(copies)
    assert after.passes - before.passes == passes
    report = hookcore.status(model).run_report()
    assert report == applied.run_report()
    streamed = [layer for layer in model if layer.weight.device.type == "cpu"]
    uses = after.hits + after.on_demand - before.hits - before.on_demand
    assert uses == passes * len(streamed)
    assert abs(after.copies - before.copies - uses) < len(model)  # some are on their way at either end
    moved = after.moved_bytes - before.moved_bytes
    sizes = list(map(packed, streamed))
    if len(set(sizes)) == 1:
        assert moved == len(copies) * sizes[0]
    assert after.hits + after.on_demand <= after.copies
    assert (after.timed_passes, after.stalled_seconds) == (0, None)
    hookcore.remove(model)


@FOR_EACH_EXAMPLE
@given(widths, techniques, st.booleans())
def test_the_bytes_of_the_report_are_those_that_are_taken(sim, widths, technique, low):
    module = torch.get_device_module("sim")
    model = build(widths)
    x = input_for(model)
    call(model[0].to("sim"), x)  # what a device's first call takes
    model.to("cpu").count = Counter(widths[0])
    before = module.memory_allocated(), sim.pinned_bytes()
    options = {"memory_budget": 60_000} if low else {"exclude_modules": ["1"]}
    applied = hookcore.apply(model, [GroupOffload("sim", low_cpu_mem_usage=low, **options)])
    call(model, x, 4)
    synchronize()
    found = counted(applied)
    assert found.resident_bytes + found.ring_bytes == module.memory_allocated() - before[0]
    assert found.locked_bytes == sim.pinned_bytes() - before[1]
    hookcore.remove(model)


def test_what_was_not_expected_is_loaded_on_demand(sim):
    model = build([WIDTH] * 6)
    applied = hookcore.apply(model, [GroupOffload("sim", prefetch=1)])
    x = input_for(model)
    call(model, x, 2)
    applied.reset()
    assert counted(applied) == attrs.evolve(
        StreamReport(), ring_bytes=counted(applied).ring_bytes, locked_bytes=counted(applied).locked_bytes
    )
    call(model, x)
    assert (counted(applied).hits, counted(applied).on_demand) == (6, 0)
    call(model[4], x)  # the first was expected
    assert (counted(applied).hits, counted(applied).on_demand) == (6, 1)
    model(x).sum().backward()
    assert (counted(applied).hits, counted(applied).on_demand, counted(applied).passes) == (6, 7, 3)


@attrs.frozen
class Figures:
    calls: int
    read_bytes: int
    waited_seconds: float | None
    reasons: dict[str, int]


class Counting(Hook):
    def run_report(self, module):
        return Figures(3, 2048, None, {} if module.in_features == 2 else {"it was late": 2, "it rained": 1})


COUNTING = toy("counting", lambda _: [Binding("", Counting())])


def test_figures_are_printed_by_their_names():
    models = {"unet": nn.Linear(2, 2), "vae": nn.Linear(3, 2)}
    applied = hookcore.apply(models, {"unet": [COUNTING, toy("silent")], "vae": [COUNTING]})
    assert str(applied.run_report()) == (
        "           unet      vae\n"
        "---------  --------  --------\n"
        "technique  counting  counting\n"
        "calls      3         3\n"
        "read       2.0 KiB   2.0 KiB\n"
        "waited     -         -\n"
        "vae: 2 x it was late\n"
        "vae: 1 x it rained"
    )
    assert [(it.component, it.counted.calls) for it in applied.run_report().entries] == [
        ("unet", 3),
        ("vae", 3),
    ]
    applied.remove()
    assert str(applied.run_report()) == "nothing is counted"


# When it was


@FOR_EACH_EXAMPLE
@given(widths, techniques, st.sampled_from([1e8, 2e9, 1e12]))
def test_the_timeline_is_that_of_the_device(sim, widths, technique, rate):
    model = build(widths)
    with sim.limited(profile=attrs.evolve(SLOW, host_to_device=rate)):
        applied = hookcore.apply(model, [technique(model)])
        x = input_for(model)
        call(model, x, 3)
        before = counted(applied)
        with record_timeline(model) as timeline, sim.traced() as trace:
            call(model, x, 2)
        after = counted(applied)
    assert not timeline.spans or timeline.spans[0].start >= 0
    found = {kind: [it for it in timeline.spans if it.kind == kind] for kind in ("copy", "compute", "stall")}
    first = next(it for it in trace.spans if it.engine == "compute")
    offset = first.end - found["compute"][0].stop
    for kind, engine in (("copy", "copy in"), ("compute", "compute")):
        ran = [it for it in trace.spans if it.engine == engine]
        assert [it.stop for it in found[kind]] == pytest.approx([it.end - offset for it in ran], abs=1e-12)
    assert [it.group for it in found["compute"]] == [str(number) for number in range(len(model))] * 2
    # Whatever computes next was either waited for or there.
    every = sorted(found["compute"] + found["stall"], key=lambda it: it.start)
    assert all(before.stop <= after.start + 1e-12 for before, after in pairwise(every))
    for stall in found["stall"]:
        (copy,) = (it for it in found["copy"] if it.stop == pytest.approx(stall.stop, abs=1e-12))
        assert copy.group == stall.group
    assert after.timed_passes == 2
    assert after.stalled_seconds == timeline.stalled == sum(it.seconds for it in found["stall"])
    assert len(found["copy"]) == after.copies - before.copies
    hookcore.remove(model)


def recorded(model, rate=SLOW.host_to_device, prefetch=1):
    applied = hookcore.apply(model, [GroupOffload("sim", prefetch=prefetch)])
    x = input_for(model)
    with simulator.limited(profile=attrs.evolve(SLOW, host_to_device=rate)):
        call(model, x, 2)
        with record_timeline(model) as timeline:
            call(model, x)
    applied.remove()
    return timeline


def test_stalls_are_what_the_link_is_too_slow_for(sim):
    """Of equal layers with one copied ahead, each but the first takes as long as its copy."""
    timeline = recorded(build([64] * 8))
    copies, uses = ([it for it in timeline.spans if it.kind == kind] for kind in ("copy", "compute"))
    copy, use = copies[1].seconds, uses[1].seconds
    assert copy > use
    assert timeline.stalled == pytest.approx(copies[0].seconds - uses[0].seconds + 6 * (copy - use))
    assert recorded(build([64] * 8), rate=1e12, prefetch=2).stalled == 0


def test_recording_ends_with_the_block_and_after_an_error(sim):
    model = build([WIDTH] * 4)
    applied = hookcore.apply(model, [GroupOffload("sim")])
    x = input_for(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), record_timeline(model) as timeline:
        call(model, x)
        call(model, x[:, 1:])
    spans = timeline.spans
    assert len({it.group for it in spans}) == len(model)
    call(model, x)
    assert timeline.spans == spans
    assert counted(applied).timed_passes == 2
    with patch.object(torch.get_device_module("sim"), "Event", side_effect=AssertionError):
        call(model, x)  # no event is made where nothing is timed


def test_components_are_told_apart(sim):
    models = {"unet": build([WIDTH] * 3), "vae": build([WIDTH] * 3)}
    hookcore.apply(models, [GroupOffload("sim")])
    with record_timeline(models) as timeline:
        for model in models.values():
            call(model, input_for(model))
    groups = dict.fromkeys(it.group for it in timeline.spans if it.kind == "compute")
    assert list(groups) == [f"{name}.{number}" for name in models for number in range(3)]


def test_a_model_that_does_not_stream_has_no_timeline():
    model = nn.Linear(2, 2)
    hookcore.apply(model, [GroupOffload("cpu")])
    with pytest.raises(PlanError, match="nothing on this target streams"), record_timeline(model):
        pass


def test_the_picture_has_both_lanes_and_the_stalls(sim, tmp_path):
    pytest.importorskip("matplotlib")
    timeline = recorded(build([64] * 5))
    path = tmp_path / "timeline.svg"
    (axes,) = timeline.draw(path).axes
    assert path.stat().st_size > 5000
    assert [it.get_text() for it in axes.get_yticklabels()] == ["copies", "computing"]
    assert len(axes.collections) == len(timeline.spans)
    assert {it.get_text() for it in axes.texts} == set("01234")
    assert axes.get_title() == "computing waited 0.661 of 0.887 ms (red)"
    stalls = [it for it in axes.collections if it.get_hatch()]
    assert len(stalls) == sum(it.kind == "stall" for it in timeline.spans)


def test_a_picture_needs_spans_and_matplotlib(sim):
    model = build([WIDTH] * 3)
    hookcore.apply(model, [GroupOffload("sim")])
    with record_timeline(model) as timeline:
        pass
    with pytest.raises(HookcoreError, match="there is nothing to draw: no group was copied"):
        timeline.draw()
    with patch.dict(sys.modules, {"matplotlib.figure": None}):
        with pytest.raises(HookcoreError, match="drawing needs matplotlib: pip install"):
            recorded(build([WIDTH] * 3)).draw()
