"""Components that share weights, under one technique: right whatever is called, and given back in the end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import BudgetError, ConflictError, UnsupportedModelError
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import GroupOffload, ModelOffload, SequentialOffload

FOR_EACH_EXAMPLE = settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTH = 8


class BoomError(Exception):
    pass


class Part(nn.Module):
    """Layers, of which some are another component's, too, with a weight that is read outside of its layer."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.other = ()  # a component that is called inside

    def forward(self, x, fails=False):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for other in self.other:
            x = other(x)
        if fails:
            raise BoomError
        return x + self.head(x) @ self.layers[0].weight


def linear():
    return nn.Linear(WIDTH, WIDTH)


def tied_weight():
    """A head is the other's first layer's weight; the last one stands in all of them."""
    models = {name: Part(linear(), linear()) for name in ("text", "unet", "vae")}
    models["unet"].head.weight = models["text"].layers[0].weight
    models["vae"].layers[1].bias = models["text"].layers[1].bias
    return models


def shared_module():
    shared = nn.Sequential(linear(), linear())
    shared.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
    return {"text": Part(linear(), shared), "unet": Part(linear(), shared), "vae": Part(shared)}


def part_of_another():
    """The second component is a module in the first, and the third joins them with one that was apart."""
    text, vae = Part(linear(), linear()), Part(linear())
    text.layers.append(Part(linear(), linear()))
    text.layers[2].weight = text.head.weight
    last = Part(text.layers[2].layers[0], vae.layers[0])
    return {"text": text, "unet": text.layers[2], "vae": vae, "last": last}


def calls_another():
    models = tied_weight()
    models["vae"].other = (models["text"],)
    return models


BUILDS = [tied_weight, shared_module, part_of_another, calls_another]


def build(which, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return which()


names = st.sampled_from(["text", "unet", "vae"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("call"), names),
        st.tuples(st.just("fail"), names),
        st.tuples(st.just("edit"), names),
        st.tuples(st.just("load"), names),
        st.tuples(st.just("gradients"), names),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=10,
)


def techniques(device):
    return st.one_of(
        st.builds(SequentialOffload, st.just(device)),
        st.builds(
            ModelOffload,
            st.just(device),
            st.none() | st.permutations(["text", "unet", "vae"]),
            memory_budget=st.none() | st.integers(1_800, 4_000) if device == "sim" else st.none(),
        ),
        st.builds(
            GroupOffload,
            st.just(device),
            offload_type=st.sampled_from(["auto", "block_level", "leaf_level"]),
            exclude_modules=st.lists(st.just("layers.0"), max_size=1),
        ),
        st.builds(GroupOffload, st.just(device), memory_budget=st.integers(700, 3_000))
        if device == "sim"
        else st.nothing(),
    )


class Twins:
    """Components with a technique and their bare twins, to which the same is done."""

    def __init__(self, which, technique):
        self.ours, self.bare = build(which), build(which)
        self.device = technique.onload_device if isinstance(technique, GroupOffload) else technique.device
        self.x = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
        self.applied = hookcore.apply(self.ours, [technique])
        self.outputs = []

    def call(self, name):
        with torch.no_grad():
            self.outputs.append((self.ours[name](self.x.to(self.device)), self.bare[name](self.x)))

    def fail(self, name):
        for models in (self.ours, self.bare):
            with pytest.raises(BoomError), torch.no_grad():
                models[name](self.x, fails=True)

    def edit(self, name):
        for models in (self.ours, self.bare):
            with torch.no_grad():
                models[name].layers[-1].bias.mul_(1.5) if hasattr(models[name].layers[-1], "bias") else None
                models[name].layers[0].weight.data *= 0.5

    def load(self, name):
        for models in (self.ours, self.bare):
            state = {key: it.cpu() * 0.75 for key, it in models[name].state_dict().items()}
            models[name].load_state_dict(state)

    def gradients(self, name):
        for models in (self.ours, self.bare):
            models[name](self.x).sum().backward()
        for ours, theirs in zip(self.ours[name].parameters(), self.bare[name].parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
        for models in (self.ours, self.bare):
            for model in models.values():
                model.zero_grad()

    def reset(self, _):
        self.applied.reset()

    def check(self):
        for ours, theirs in self.outputs:
            assert same_bits(ours.cpu(), theirs)
        self.outputs.clear()

    def check_removed(self, names):
        for name in names:
            states = [models[name].state_dict() for models in (self.ours, self.bare)]
            for key, theirs in states[1].items():
                assert states[0][key].device.type == "cpu", key
                assert same_bits(states[0][key], theirs), key
            for ours, theirs in zip(self.ours[name].modules(), self.bare[name].modules(), strict=True):
                assert vars(ours).keys() == vars(theirs).keys()
                assert type(ours._parameters) is dict


def ties(models):
    every = [it for model in models.values() for it in model.parameters()]
    return [[it is other for other in every] for it in every]


def do(twins, steps):
    for kind, what in steps:
        getattr(twins, kind)(what)
    twins.check()


@pytest.mark.parametrize("which", BUILDS)
@pytest.mark.parametrize("device", ["cpu", "sim"])
@FOR_EACH_EXAMPLE
@given(data=st.data(), steps=steps)
def test_outputs_are_those_of_the_bare_components(sim, which, device, data, steps):
    technique = data.draw(techniques(device))
    try:
        hookcore.plan(build(which), [technique])
    except BudgetError as error:
        least = int(str(error).rsplit("works is ", 1)[1].split()[0])
        technique = GroupOffload("sim", memory_budget=least)
    twins = Twins(which, technique)
    do(twins, steps)
    for name in twins.ours:
        twins.call(name)
    twins.check()
    assert ties(twins.ours) == ties(twins.bare)
    twins.applied.remove()
    twins.check_removed(twins.ours)


@pytest.mark.parametrize("which", [tied_weight, calls_another])
@pytest.mark.parametrize("device", ["cpu", "sim"])
@FOR_EACH_EXAMPLE
@given(data=st.data(), steps=steps)
def test_they_are_given_back_one_by_one(sim, which, device, data, steps):
    technique, order = data.draw(techniques(device)), data.draw(st.permutations(["text", "unet", "vae"]))
    try:
        hookcore.plan(build(which), [technique])
    except BudgetError:
        technique = GroupOffload(device)
    twins = Twins(which, technique)
    do(twins, steps)
    while order:
        gone, *order = order
        hookcore.remove(twins.ours[gone])
        for name in order:
            if device == "cpu" or not twins.ours[name].other:  # what it calls may be on the CPU again
                twins.call(name)
        twins.check()
    twins.check_removed(twins.ours)
    assert not hookcore.status(twins.ours).techniques


def test_what_is_shared_is_copied_for_each_use_and_known_in_advance(sim):
    models = build(tied_weight)
    applied = hookcore.apply(models, [GroupOffload("sim", offload_type="leaf_level", prefetch=2)])
    x = torch.ones(2, WIDTH, device="sim")

    def run():
        with torch.no_grad():
            for model in models.values():
                model(x)
        torch.get_device_module("sim").synchronize()
        (entry,) = applied.run_report().entries  # they are counted together
        return entry.counted

    for _ in range(3):
        before = run()
    with sim.traced() as trace:
        after = run()
    assert after.copies - before.copies == sum(it.engine == "copy in" for it in trace.spans)
    assert after.passes - before.passes == 3
    assert after.hits - before.hits > 9 > after.on_demand - before.on_demand


def test_only_one_of_them_says_what_they_need_together(sim):
    models = build(tied_weight)
    before = torch.get_device_module("sim").memory_allocated()
    plan = hookcore.plan(models, [GroupOffload("sim", prefetch=2)])
    assert [bool(step.needs) for step in plan.steps] == [True, False, False]
    hookcore.apply(models, [GroupOffload("sim", prefetch=2)])
    for model in models.values():
        with torch.no_grad():
            model(torch.ones(2, WIDTH))
    torch.get_device_module("sim").synchronize()
    assert torch.get_device_module("sim").memory_allocated() - before == sum(plan.needs.values())


def test_other_techniques_still_conflict(sim):
    models = build(tied_weight)
    first = hookcore.apply({"text": models["text"]}, [GroupOffload("sim")])
    for technique in (GroupOffload("sim"), SequentialOffload("sim")):
        with pytest.raises(ConflictError, match=r"cannot claim the placement of 'unet.head.weight'"):
            hookcore.apply({"unet": models["unet"], "vae": models["vae"]}, [technique])
    first.remove()
    with pytest.raises(ConflictError, match=r"cannot claim the placement of"):
        hookcore.plan(models, {"unet": [GroupOffload("sim")], "text": [SequentialOffload("sim")]})
    hookcore.apply(models, [GroupOffload("sim")])
    with pytest.raises(ConflictError, match="already been applied"):
        hookcore.apply(models, [GroupOffload("sim")])


def test_a_tie_that_is_none_in_the_other_component_is_refused():
    models = build(tied_weight)
    models["unet"].layers[0].weight = nn.Parameter(models["text"].layers[0].weight.data.t())
    with pytest.raises(UnsupportedModelError, match="'unet.layers.0.weight' is a weight of another"):
        hookcore.plan(models, [GroupOffload("cpu")])
