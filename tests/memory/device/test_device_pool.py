"""Components of one target have the device's memory in turn: within a budget, right, and without waiting."""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import weakref
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import BudgetError, ConcurrentCallError
from hookcore.memory.device import copy_engine as engine
from hookcore.testing import simulator
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import GroupOffload, SequentialOffload

FOR_EACH_EXAMPLE = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTH = 32
ACTIVATIONS = 4_096  # bytes: more than all that a call has there besides weights
NAMES = ("text", "control", "unet")


class BoomError(Exception):
    pass


class Part(nn.Module):
    """Layers of different sizes, a buffer, and a weight that is held for the whole call."""

    def __init__(self, factors):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, factor * WIDTH) for factor in factors)
        self.down = nn.ModuleList(nn.Linear(factor * WIDTH, WIDTH) for factor in factors)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.inner = ()  # a component that is called within

    def forward(self, x, fails=False, skip=None):
        x = x * self.scale
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            if number != skip:
                x = x + down(torch.tanh(up(x)))
        for other in self.inner:
            x = other(x)
        if fails:
            raise BoomError
        return x * self.scale + self.shift


def build(sizes, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: Part(factors) for name, factors in zip(NAMES, sizes, strict=True)}


def weights(model):
    return sum(it.nbytes for it in (*model.parameters(), *model.buffers()))


def hook_of(applied, at=0):
    return list(applied._attachments)[at].bindings[0].hook


def room_of(applied):
    return hook_of(applied)._placement.mover._pool


def movers_of(applied):
    return [hook_of(applied, at)._placement.mover for at in range(3)]


def counted(applied):
    return {entry.component: entry.counted for entry in applied.run_report().entries}


def call(model, device="sim", **options):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, WIDTH, device=device).reshape(1, WIDTH), **options)


def least_of(target, technique):
    """The smallest budget that works, as the error says."""
    with pytest.raises(BudgetError) as caught:
        hookcore.plan(target, [technique(1)])
    return int(re.search(r"works is (\d+) bytes", str(caught.value)).group(1))


class Twins:
    """Components with a technique and their bare twins, to which the same is done."""

    def __init__(self, sizes, technique, nested):
        self.technique = technique
        self.ours, self.bare = build(sizes), build(sizes)
        if nested:
            for models in (self.ours, self.bare):
                models["unet"].inner = (models["control"],)
        self.module = torch.get_device_module("sim")
        self.streams = [self.module.current_stream(), torch.Stream("sim")]
        self.applied = hookcore.apply(self.ours, [technique])
        self.outputs = []

    def call(self, name, options):
        if "fails" in options:
            with pytest.raises(BoomError):
                call(self.ours[name], **options)
        else:
            self.outputs.append((call(self.ours[name], **options), call(self.bare[name], "cpu", **options)))

    def twice(self, name, _):
        for _ in range(3):
            self.call(name, {})

    def round(self, name, _):
        """A loop that calls one component after another."""
        for _ in range(4):
            self.call(name, {})
            self.call(NAMES[NAMES.index(name) - 1], {})

    def layer(self, name, _):
        if self.technique.offload_type == "block_level":
            return  # it can be called by its component only
        x = torch.ones(1, WIDTH)
        with torch.no_grad():
            self.outputs.append((self.ours[name].up[0](x.to("sim")), self.bare[name].up[0](x)))

    def edit(self, name, way):
        for models in (self.ours, self.bare):
            layer = models[name].up[0]
            with torch.no_grad():
                if way == "in place":
                    layer.weight.mul_(1.25)
                elif way == "through data":
                    layer.weight.data *= 1.25
                elif way == "new data":
                    layer.weight.data = layer.weight.data.cpu() * 1.25
                else:
                    models[name].load_state_dict({k: it.cpu() * 0.5 for k, it in layer_state(models[name])})

    def gradients(self, name, _):
        for models, device in ((self.ours, "sim"), (self.bare, "cpu")):
            models[name](torch.ones(1, WIDTH, device=device)).sum().backward()
        for ours, theirs in zip(self.ours[name].parameters(), self.bare[name].parameters(), strict=True):
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
            ours.grad = theirs.grad = None

    def reset(self, *_):
        self.applied.reset()

    def other_stream(self, *_):
        self.module.synchronize()
        self.streams.reverse()
        self.module.set_stream(self.streams[0])

    def finish(self):
        self.module.set_stream(min(self.streams, key=lambda it: it.stream_id))
        self.module.synchronize()
        for ours, theirs in self.outputs:
            assert same_bits(ours.cpu(), theirs)
        self.outputs.clear()
        self.applied.remove()
        for name in NAMES:
            states = [models[name].state_dict() for models in (self.ours, self.bare)]
            for key, theirs in states[1].items():
                assert states[0][key].device.type == "cpu", (name, key)
                assert same_bits(states[0][key], theirs), (name, key)


def layer_state(model):
    return list(model.state_dict().items())


names = st.sampled_from(NAMES)
ways = st.sampled_from(["in place", "through data", "new data", "loaded"])
options = st.fixed_dictionaries({}, optional={"fails": st.just(True), "skip": st.integers(0, 2)})
calls = st.one_of(
    st.tuples(st.just("call"), names, st.just({})),
    st.tuples(st.just("call"), names, options),
    st.tuples(st.just("twice"), names, st.none()),
    st.tuples(st.just("round"), names, st.none()),
    st.tuples(st.just("layer"), names, st.none()),
)
others = st.one_of(
    st.tuples(st.just("edit"), names, ways),
    st.tuples(st.just("gradients"), names, st.none()),
    st.tuples(st.just("reset"), names, st.none()),
    st.tuples(st.just("other_stream"), names, st.none()),
)
sizes = st.tuples(*[st.lists(st.integers(1, 4), min_size=1, max_size=4)] * 3)
levels = st.sampled_from(["auto", "block_level", "leaf_level"])
shares = st.none() | st.floats(0, 1.1)


def technique_for(target, level, share, prefetch):
    """With a budget between the smallest one and a little more than all."""

    def made(budget):
        return GroupOffload("sim", offload_type=level, memory_budget=budget, prefetch=prefetch)

    if share is None:
        return made(None)
    least, most = least_of(target, made), sum(map(weights, target.values())) + 4_096
    return made(least + int(share * (most - least)))


options_of_offload = st.tuples(levels, shares, st.none() | st.integers(0, 3))


@FOR_EACH_EXAMPLE
@given(sizes, options_of_offload, st.lists(calls | others, max_size=8), st.booleans())
def test_outputs_are_those_of_bare_components(sim, sizes, options, steps, nested):
    twins = Twins(sizes, technique_for(build(sizes), *options), nested)
    for kind, name, what in steps:
        getattr(twins, kind)(name, what)
    twins.finish()


@FOR_EACH_EXAMPLE
@given(sizes, options_of_offload, st.lists(calls, max_size=8))
def test_all_weights_together_keep_to_the_budget(sim, sizes, options, steps):
    technique = technique_for(build(sizes), *options)
    module = torch.get_device_module("sim")
    before = module.memory_allocated()
    twins = Twins(sizes, technique, nested=False)
    needs = sum(hookcore.plan(build(sizes), [technique]).needs.values())
    assert technique.memory_budget is None or needs <= technique.memory_budget
    for kind, name, what in steps:
        module.synchronize()
        module.reset_peak_memory_stats()
        getattr(twins, kind)(name, what)
        twins.outputs = [(ours.cpu(), theirs) for ours, theirs in twins.outputs]
        assert module.max_memory_allocated() - before <= needs + ACTIVATIONS
    twins.finish()


@FOR_EACH_EXAMPLE
@given(sizes, levels)
def test_the_smallest_budget_is_named_and_works(sim, sizes, level):
    """It is that of the component which needs most, with what all others have to keep there."""

    def made(budget):
        return GroupOffload("sim", offload_type=level, memory_budget=budget)

    models, bare = build(sizes), build(sizes)
    least = least_of(models, made)
    with pytest.raises(BudgetError, match="at once for calls of '(text|control|unet)' take"):
        hookcore.apply(models, [made(least - 1)])
    assert not hookcore.status(models).attachments
    plan = hookcore.plan(models, [made(least)])
    assert sum(plan.needs.values()) <= least
    assert [bool(step.needs) for step in plan.steps] == [True, False, False]
    hookcore.apply(models, [made(least)])
    for name in NAMES * 2:
        assert same_bits(call(models[name]).cpu(), call(bare[name], "cpu"))


# Speed


@contextlib.contextmanager
def no_waiting():
    """Raises where the host waits for the device."""

    def waits(*_):
        raise AssertionError("the host waited")

    with patch.object(simulator.state.get_machine(), "host_waits", waits):
        yield


def two(budget):
    """A ControlNet and a denoiser as large, and their weights in bytes."""
    models = build([[2] * 6] * 3)
    del models["text"]
    nbytes = sum(map(weights, models.values()))
    technique = GroupOffload("sim", memory_budget=int(budget * nbytes))
    return models, nbytes, hookcore.apply(models, [technique])


def moved(applied):
    return sum(it.moved_bytes for it in counted(applied).values())


@pytest.mark.parametrize("calls", [("control", "unet"), ("control", "control", "unet")])
def test_components_in_turn_are_one_round_and_wait_for_nothing(sim, calls):
    models, nbytes, applied = two(0.5)
    for _ in range(4):
        for name in calls:
            call(models[name])
    torch.get_device_module("sim").synchronize()
    before, report = moved(applied), counted(applied)
    with no_waiting():
        for _ in range(4):
            for name in calls:
                call(models[name])
    a_round = (moved(applied) - before) / 4
    called = sum(weights(models[name]) for name in calls)
    assert a_round <= called - 0.3 * nbytes  # of half the weights, some is room to come and go in
    after = counted(applied)
    assert all(after[name].on_demand == report[name].on_demand for name in models)
    assert all(after[name].resident_bytes > 0.1 * nbytes for name in models)


def test_without_a_budget_what_another_component_needs_is_copied_ahead(sim):
    models = build([[2] * 6] * 3)
    applied = hookcore.apply(models, [GroupOffload("sim")])
    for _ in range(4):
        for model in models.values():
            call(model)
    before = counted(applied)
    with no_waiting():
        for _ in range(3):
            for model in models.values():
                call(model)
    after = counted(applied)
    assert all(after[name].on_demand == before[name].on_demand for name in NAMES)
    # Nothing is copied in vain, and the next component's first layers are on their way.
    streamed = sum(packed.nbytes for mover in movers_of(applied) for packed in mover.coming)
    assert moved(applied) - sum(it.moved_bytes for it in before.values()) <= 3 * streamed
    assert [bool(mover.prefetcher.ahead) for mover in movers_of(applied)] == [True, False, False]
    seen = []
    models["unet"].up[1].register_forward_pre_hook(
        lambda *_: seen.append(movers_of(applied)[0].prefetcher.ahead.copy())
    )
    call(models["unet"])  # another one than expected
    assert seen == [{}]


def test_where_all_fit_together_all_stay(sim):
    models, nbytes, applied = two(1.05)
    for _ in range(3):
        for model in models.values():
            call(model)
    assert moved(applied) == 0
    assert sum(it.resident_bytes for it in counted(applied).values()) >= nbytes


def test_a_call_of_a_small_component_leaves_what_others_keep(sim):
    models = build([[1], [1], [2] * 12])
    nbytes = sum(map(weights, models.values()))
    applied = hookcore.apply(models, [GroupOffload("sim", memory_budget=int(0.7 * nbytes))])
    for _ in range(5):
        call(models["unet"])
    kept = counted(applied)["unet"].resident_bytes
    assert kept > 0.2 * nbytes
    call(models["text"])
    assert counted(applied)["unet"].resident_bytes == kept
    before = moved(applied)
    call(models["unet"])
    assert moved(applied) - before < nbytes - kept + 0.2 * nbytes


def test_what_a_call_holds_throughout_has_room_of_its_own(sim):
    """It would lie in the way of what comes and goes."""
    models, _, applied = two(0.3)
    scale, seen = models["control"].scale, []

    def note(*_):
        kept = room_of(applied).allocator.kept
        seen.append(sum(it is scale for packed in kept for it in packed.tensors))

    models["control"].up[1].register_forward_pre_hook(note)
    for name in ("control", "unet", "control"):
        call(models[name])
    assert seen == [1, 1]


class Outer(nn.Module):
    """Holds a large weight for the whole call, in which another component is called."""

    def __init__(self, inner, layers=3):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 16 * WIDTH**2).reshape(WIDTH, -1) / WIDTH)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        self.inner = (inner,)

    def forward(self, x):
        x = self.inner[0](self.layers(x @ self.table @ self.table.mT))
        return x @ self.table @ self.table.mT


def test_what_an_outer_call_uses_is_there_until_it_ends(sim):
    """Although it leaves no room for what an inner call needs, in the same stretch of memory."""

    def made():
        inner = build([[1], [4], [1]])["control"]
        return {"inner": inner, "outer": Outer(inner)}

    models, bare = made(), made()
    bare["outer"].load_state_dict(models["outer"].state_dict())
    outer = models["outer"]
    budget = outer.table.nbytes + weights(outer.layers) + ACTIVATIONS
    assert budget - outer.table.nbytes < weights(models["inner"].up[0])
    hookcore.apply(models, [GroupOffload("sim", memory_budget=budget)])
    for _ in range(3):
        assert same_bits(call(outer).cpu(), call(bare["outer"], "cpu"))


def test_what_is_held_is_no_part_of_what_is_divided(sim):
    """It is larger than the room for all else, in which two thirds of that can stay."""
    models = {name: Outer(nn.Identity(), 12) for name in ("control", "unet")}
    tables = sum(it.table.nbytes for it in models.values())
    layers = sum(map(weights, models.values())) - tables
    applied = hookcore.apply(models, [GroupOffload("sim", memory_budget=tables + int(0.8 * layers))])
    copied = []
    with sim.limited(profile=simulator.DeviceProfile(name="slow link", host_to_device=1e6)):
        for _ in range(6):
            before = moved(applied)
            for model in models.values():
                call(model)
            copied.append(moved(applied) - before)
    assert copied[-1] <= layers // 3


class Drifting(nn.Linear):
    """Changes its weight in each call."""

    def forward(self, x):
        self.weight.mul_(0.9)
        return super().forward(x)


def test_what_a_call_changed_is_copied_ahead_again(sim):
    """Also what would have been kept, and is on the device as it was before."""
    models, bare = build([[2] * 6] * 3), build([[2] * 6] * 3)
    for both in (models, bare):
        del both["text"]
        for part in both.values():
            part.up = nn.ModuleList(Drifting(WIDTH, it.out_features) for it in part.up)
    for name, theirs in bare.items():
        theirs.load_state_dict(models[name].state_dict())
    nbytes = sum(map(weights, models.values()))
    applied = hookcore.apply(models, [GroupOffload("sim", memory_budget=int(0.6 * nbytes))])
    found = []
    for number in range(9):
        for name in models:
            assert same_bits(call(models[name]).cpu(), call(bare[name], "cpu")), (number, name)
        found.append(sum(it.on_demand for it in counted(applied).values()))
    assert found[-1] == found[5]


def test_what_is_kept_is_copied_anew_after_a_change_that_torch_does_not_count(sim):
    models, _, applied = two(0.6)
    bare = build([[2] * 6] * 3)
    for factor in (0.5, 2):
        for _ in range(4):
            for name in models:
                assert same_bits(call(models[name]).cpu(), call(bare[name], "cpu"))
        assert room_of(applied).allocator.kept
        for name in models:
            for both in (models, bare):
                for layer in (*both[name].up, *both[name].down):
                    layer.weight.data *= factor


def test_what_a_component_kept_makes_way_and_comes_again(sim):
    models = build([[8], [1], [2] * 8])
    nbytes = sum(map(weights, models.values()))
    applied = hookcore.apply(models, [GroupOffload("sim", memory_budget=int(0.6 * nbytes))])
    kept = []
    for name in ("unet",) * 5 + ("text",) * 5 + ("unet",) * 4:
        call(models[name])
        kept.append(counted(applied)["unet"].resident_bytes)
    assert kept[9] < kept[4] == kept[-1]


def test_each_component_counts_its_own(sim):
    models, _, applied = two(0.4)
    for _ in range(3):
        call(models["control"])
    report = counted(applied)
    assert (report["control"].passes, report["unet"].passes) == (3, 0)
    assert report["unet"].moved_bytes == report["unet"].copies == 0
    call(models["unet"])
    after = counted(applied)
    assert after["unet"].hits + after["unet"].on_demand >= 12
    room = room_of(applied)
    assert sum(it.resident_bytes + it.ring_bytes for it in after.values()) <= room.budget
    assert after["control"].ring_bytes == 0 < after["unet"].ring_bytes


def test_a_timeline_has_the_spans_of_each_component(sim):
    models, _, applied = two(0.4)
    for _ in range(3):
        call(models["control"])
    with hookcore.memory.record_timeline(models) as timeline:
        call(models["unet"])
        call(models["control"])
    found = [{span.kind for span in recorder.spans} for recorder in timeline.recorders]
    assert all({"copy", "compute"} <= kinds for kinds in found)
    assert [it.timed_passes for it in counted(applied).values()] == [1, 1]


@pytest.mark.parametrize("kind", [GroupOffload, SequentialOffload])
def test_without_a_budget_the_largest_counts(sim, kind):
    technique = kind("sim")
    models = build([[1] * 3, [2] * 3, [3] * 3])
    alone = [sum(hookcore.plan(it, [technique]).needs.values()) for it in models.values()]
    shift = models["text"].shift.nbytes
    needs = sum(hookcore.plan(models, [technique]).needs.values())
    assert needs == max(alone) + 2 * shift
    module = torch.get_device_module("sim")
    before = module.memory_allocated()
    hookcore.apply(models, [technique])
    for name in NAMES * 2:
        call(models[name])
    module.synchronize()
    assert module.max_memory_allocated() - before <= needs + ACTIVATIONS


# Those that come and go


def test_a_component_that_nobody_keeps_goes_away_with_its_memory(sim):
    models, _, applied = two(0.5)
    for _ in range(4):
        for model in models.values():
            call(model)
    room = room_of(applied)
    kept = len(room.allocator.kept)
    gone = [weakref.ref(models["unet"]), weakref.ref(models["unet"].up[0].weight)]
    del applied, models["unet"], model
    gc.collect()
    assert [it() for it in gone] == [None, None]
    assert 0 < len(room.allocator.kept) < kept
    for _ in range(5):
        found = call(models["control"])
    assert same_bits(found.cpu(), call(build([[2] * 6] * 3)["control"], "cpu"))
    (mover,) = room._movers.values()
    lying = [*room.allocator.kept, *(load.flat for load in mover.prefetcher.ahead.values())]
    assert room.allocator.lender.lent == sum(packed.nbytes for packed in lying)  # what the other had is free


def test_one_thread_at_a_time(sim):
    models, _, _ = two(0.5)
    inside, go_on, caught = threading.Event(), threading.Event(), []

    def waits(*_):
        inside.set()
        assert go_on.wait(30)

    models["control"].up[1].register_forward_pre_hook(waits)
    thread = threading.Thread(target=call, args=(models["control"],))
    thread.start()
    assert inside.wait(30)
    for what in (lambda: call(models["unet"]), lambda: hookcore.remove(models["unet"])):
        with pytest.raises(ConcurrentCallError, match="another thread calls a component") as error:
            what()
        caught.append(error)
    go_on.set()
    thread.join()
    bare = build([[2] * 6] * 3)
    assert same_bits(call(models["unet"]).cpu(), call(bare["unet"], "cpu"))


def test_a_component_whose_weights_change_within_a_call_of_another(sim):
    """It is bound anew then, while the other's weights are in use."""
    models, _, applied = two(0.5)
    bare = build([[2] * 6] * 3)
    del bare["text"]
    for both in (models, bare):
        both["unet"].inner = (both["control"],)
    call(models["unet"])
    for both in (models, bare):
        both["control"].up.append(nn.Linear(WIDTH, WIDTH))
        both["control"].down.append(nn.Linear(WIDTH, WIDTH))
    for ours, theirs in zip(models["control"].parameters(), bare["control"].parameters(), strict=True):
        with torch.no_grad():
            theirs.copy_(ours.cpu())
    for name in ("unet", "control") * 3:
        assert same_bits(call(models[name]).cpu(), call(bare[name], "cpu"))
    applied.remove()


def test_a_device_without_room_raises_and_the_next_call_works(sim):
    models, nbytes, _ = two(0.5)
    with (
        sim.limited(memory=torch.get_device_module("sim").memory_allocated() + nbytes // 4),
        pytest.raises(torch.OutOfMemoryError),
    ):
        call(models["unet"])
    assert same_bits(call(models["unet"]).cpu(), call(build([[2] * 6] * 3)["unet"], "cpu"))


def test_no_wait_may_be_left_out(sim):
    """What is kept is used again and again, and given up: its memory is filled after its last use."""

    def silent(self, load):
        self.allocator.give_back(load.flat, load.place)

    models = build([[8], [1], [2] * 8])
    budget = int(0.6 * sum(map(weights, models.values())))
    hookcore.apply(models, [GroupOffload("sim", memory_budget=budget)])
    profile = simulator.DeviceProfile(name="fast link", host_to_device=1e12, kernel_latency=1e-3)
    with sim.limited(profile=profile), patch.object(engine.CopyEngine, "leave", silent):
        with pytest.raises(simulator.RaceError):
            for name in ("unet",) * 5 + ("text",) * 2:
                call(models[name])
            torch.get_device_module("sim").synchronize()
    sim.reset()
