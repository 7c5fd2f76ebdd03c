"""Techniques that are bound jointly: what components share holds whichever of them changes, and when."""

from __future__ import annotations

import copy

import pytest
import torch
from attrs import frozen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import Binding, Claim, ConflictError, Hook, JointTechnique, Phase, PluginError, Resource
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import GroupOffload, ModelOffload, SequentialOffload

NAMES = "abc"
WIDTH = 16
LAYER = WIDTH * WIDTH * 4
FEW = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def stack(depth):
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth))).eval()


def append(model, seed):
    torch.manual_seed(seed)
    model.append(nn.Linear(WIDTH, WIDTH, bias=False))


def drop(model, _seed):
    if len(model) > 1:
        del model[-1]


def replace(model, seed):
    torch.manual_seed(seed)
    model[0].weight = nn.Parameter(torch.randn(WIDTH, WIDTH))


STEPS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["call", "call", append, drop, replace])), max_size=12
)
TECHNIQUES = {
    "model": lambda: ModelOffload("sim"),
    "group": lambda: GroupOffload("sim", memory_budget=8 * LAYER),
    "sequential": lambda: SequentialOffload("sim"),
    "plain": lambda: GroupOffload("sim", use_stream=False),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
@FEW
@given(steps=STEPS, taken_off=st.permutations(NAMES))
def test_components_may_change_in_any_order(sim, technique, steps, taken_off):
    torch.manual_seed(0)
    models = {name: stack(2) for name in NAMES}
    bare = copy.deepcopy(models)
    before = torch.get_device_module("sim").memory_allocated()
    hookcore.apply(models, [TECHNIQUES[technique]()])
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        for seed, (name, step) in enumerate(steps):
            if step == "call":
                assert same_bits(models[name](x).cpu(), bare[name](x))
                if technique == "group":
                    assert torch.get_device_module("sim").memory_allocated() - before <= 8 * LAYER
            else:
                step(models[name], seed)
                step(bare[name], seed)
        for name in taken_off:
            hookcore.remove(models[name])
            assert {it.device.type for it in models[name].parameters()} == {"cpu"}
            assert same_bits(models[name](x), bare[name](x))
    sim.check()


@pytest.mark.parametrize("changed", [append, replace])
def test_one_component_is_there_at_a_time_after_several_have_changed(sim, changed):
    models = {name: stack(2) for name in NAMES}
    hookcore.apply(models, [ModelOffload("sim")])
    with torch.no_grad():
        for seed, model in enumerate(models.values()):
            changed(model, seed)
        for model in models.values():
            model(torch.ones(1, WIDTH))
            there = [it for it in models.values() if next(it.parameters()).device.type == "sim"]
            assert there == [model]


class Counting(Hook):
    """Counts calls in a list that it has in common with others."""

    def __init__(self, calls):
        self.calls = calls

    def pre_forward(self, module, args, kwargs):
        self.calls.append(module)


@frozen
class CountTogether(JointTechnique):
    name = "count_together"
    phase = Phase.COMPUTE
    replans = True

    shares: bool = True

    @classmethod
    def bind_jointly(cls, places):
        calls = []
        return [
            [Binding("", Counting(calls), claims=[Claim(Resource.CODE, "0.weight", shared=technique.shares)])]
            for technique, _ in places
        ]


def shared_by(applied):
    return {id(binding.hook.calls) for step in applied.plan.steps for binding in step.bindings}


def test_components_of_one_apply_share_what_they_are_bound_with(sim):
    models = {name: stack(1) for name in NAMES}
    assert len(shared_by(hookcore.apply(models, [CountTogether()]))) == 1
    hookcore.remove(models)
    given_apart = {"a": [CountTogether()], "b": [CountTogether(shares=False)], "c": [CountTogether()]}
    assert len(shared_by(hookcore.apply(models, given_apart))) == 2


def test_a_component_that_changes_within_a_call_of_another_is_bound_jointly_again_after_it(sim):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.inner = (inner,)

        def forward(self, x):
            return self.inner[0](self.layer(x))

    inner = stack(1)
    outer = Outer(inner).eval()
    models = {"outer": outer, "inner": inner}
    applied = hookcore.apply(models, [ModelOffload("sim")])
    bare = copy.deepcopy(outer.layer)
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        append(inner, 1)
        wanted = copy.deepcopy(inner)
        for _ in range(2):
            assert same_bits(outer(x).cpu(), wanted(bare(x)))
        assert same_bits(inner(x).cpu(), wanted(x))
        assert next(outer.parameters()).device.type == "cpu"  # one at a time, again
    applied.remove()


def test_only_what_is_bound_jointly_and_declared_shared_may_be_claimed_twice():
    layer = nn.Linear(2, 2)
    models = {name: nn.Sequential(layer) for name in NAMES}
    hookcore.apply(models, [CountTogether()]).remove()
    with pytest.raises(ConflictError):
        hookcore.apply(models, [CountTogether(shares=False)])
    with pytest.raises(ConflictError):
        hookcore.apply(models, {"a": [CountTogether()], "b": [CountTogether(shares=False)]})


def test_hooks_for_too_few_components_are_refused():
    @frozen
    class Forgetful(CountTogether):
        name = "forgetful"

        @classmethod
        def bind_jointly(cls, places):
            return [[]]

    with pytest.raises(
        PluginError, match=r"forgetful.bind_jointly\(\) gave hooks for 1 components, expected 3"
    ):
        hookcore.apply({name: stack(1) for name in NAMES}, [Forgetful()])
