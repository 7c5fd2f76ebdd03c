"""Components of one target have the device's memory in turn: within one budget, right, and without waiting."""

from __future__ import annotations

import gc
import re
import threading
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import BudgetError, ConcurrentCallError
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
    return hook_of(applied)._placement.mover._room


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


@FOR_EACH_EXAMPLE
@given(
    sizes, levels, shares, st.none() | st.integers(0, 3), st.lists(calls | others, max_size=8), st.booleans()
)
def test_outputs_are_those_of_bare_components(sim, sizes, level, share, prefetch, steps, nested):  # noqa: PLR0917
    technique = technique_for(build(sizes), level, share, prefetch)
    twins = Twins(sizes, technique, nested)
    for kind, name, what in steps:
        getattr(twins, kind)(name, what)
    twins.finish()


@FOR_EACH_EXAMPLE
@given(sizes, levels, shares, st.none() | st.integers(0, 3), st.lists(calls, max_size=8))
def test_all_weights_together_keep_to_the_budget(sim, sizes, level, share, prefetch, steps):
    technique = technique_for(build(sizes), level, share, prefetch)
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
