"""Weights that are buffers, as layers of GPTQ and AWQ hold them, come and go like parameters."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import Component, ModelConventions
from hookcore.memory.grouping import is_weight
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import GroupOffload, ModelOffload, SequentialOffload

WIDTH = 96  # of which the square, in four bytes each, is above 32 KiB
LAYERS = 4
NBYTES = 2 * 4 * WIDTH**2  # of a layer's weights
X = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)


class Quantized(nn.Module):
    """Integer weights and their scales as buffers; a small table; a call may change the weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.randint(-8, 8, (WIDTH, WIDTH), dtype=torch.int32))
        self.register_buffer("scales", torch.rand(WIDTH, WIDTH))
        self.register_buffer("g_idx", torch.arange(WIDTH))
        self.change = ""

    def forward(self, x):
        if self.change == "in place":
            self.qweight.add_(1)
        elif self.change == "replaced":
            with torch.inference_mode(False):  # or torch itself would refuse later edits
                self.qweight = self.qweight + 1
        elif self.change == "in part":
            self.scales[0] = x[0].detach().abs()
        return torch.tanh(x @ (self.qweight[self.g_idx] * self.scales) / WIDTH)


def build():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(Quantized() for _ in range(LAYERS)), nn.Linear(WIDTH, WIDTH))


def edit(model, number, how):
    layer = model[number]
    with torch.no_grad():
        if how == "in place":
            layer.qweight.mul_(2)
        elif how == "through data":
            layer.scales.data *= 0.5
        elif how == "new data":
            layer.scales.data = layer.scales.data.cpu() / 2
        elif how == "replaced":
            layer.qweight = layer.qweight.cpu() - 1
        elif how == "loaded":
            model.load_state_dict({name: it.cpu().flip(0) for name, it in model.state_dict().items()})


def call(model, mode, device):
    with mode():
        return model(X.to(device)).detach()


TECHNIQUES = st.one_of(
    st.builds(
        lambda level, budget, prefetch: GroupOffload(
            "sim", offload_type=level, memory_budget=budget, prefetch=prefetch
        ),
        st.sampled_from(["auto", "block_level"]),
        st.none() | st.integers(2 * NBYTES + 80_000, 5 * NBYTES),
        st.none() | st.integers(0, 3),
    ),
    st.builds(GroupOffload, st.just("sim"), use_stream=st.just(False)),
    st.builds(SequentialOffload, st.just("sim")),
    st.builds(ModelOffload, st.just("sim")),
)
CHANGES = st.sampled_from(["", "in place", "replaced", "in part"])
EDITS = st.sampled_from(["in place", "through data", "new data", "replaced", "loaded"])
NUMBERS = st.integers(0, LAYERS - 1)
MODES = st.sampled_from([torch.no_grad, torch.no_grad, torch.inference_mode, torch.enable_grad])
STEPS = st.lists(
    st.tuples(st.just("call"), MODES, st.dictionaries(NUMBERS, CHANGES))
    | st.tuples(st.just("edit"), NUMBERS, EDITS),
    min_size=1,
    max_size=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=40)
@given(TECHNIQUES, STEPS)
def test_whatever_calls_and_edits_change_is_kept(sim, technique, steps):
    model, bare = build(), build()
    applied = hookcore.apply(model, [technique])
    for kind, *what in steps:
        if kind == "edit":
            for it in (model, bare):
                edit(it, *what)
            continue
        mode, changes = what
        for it in (model, bare):
            for number in range(LAYERS):
                it[number].change = changes.get(number, "")
        assert same_bits(call(model, mode, "sim").cpu(), call(bare, mode, "cpu"))
        for number in range(LAYERS):
            model[number].change = bare[number].change = ""
    found, expected = model.state_dict(), bare.state_dict()
    assert all(same_bits(found[name].cpu(), expected[name]) for name in expected)
    applied.remove()
    assert {it.device.type for it in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert all(map(same_bits, model.state_dict().values(), expected.values()))
    sim.check()


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: GroupOffload("sim"), 4),  # layers are copied ahead of use
        (lambda: GroupOffload("sim", memory_budget=3 * NBYTES), 3),
        (lambda: SequentialOffload("sim"), 2),
        (lambda: GroupOffload("sim", use_stream=False), 0),
    ],
    ids=["ahead", "budget", "sequential", "no streams"],
)
def test_they_take_no_memory_of_the_device_between_calls_but_what_is_ahead(sim, make, most):
    technique = make()
    gc.collect()
    models = {name: build() for name in "abc"}
    before = torch.get_device_module("sim").memory_allocated()
    needed = sum(hookcore.plan(models, [technique]).needs.values())
    hookcore.apply(models, [technique])
    for model in list(models.values()) * 2:
        call(model, torch.no_grad, "sim")
    taken = torch.get_device_module("sim").memory_allocated() - before
    tables = 3 * LAYERS * 8 * WIDTH
    assert taken <= most * NBYTES + tables
    assert taken <= needed
    hookcore.remove(models)
    assert torch.get_device_module("sim").memory_allocated() == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("use_stream", [True, False])
def test_what_a_call_puts_in_their_place_and_returns_stays_what_it_was(sim, use_stream, mode):
    class Counting(Quantized):
        def forward(self, x):
            self.qweight = self.qweight + 1
            return self.qweight

    model = nn.Sequential(Counting())
    expected = model[0].qweight + 1
    applied = hookcore.apply(model, [GroupOffload("sim", use_stream=use_stream)])
    with mode():
        returned = model(X)
        model(X)
    assert returned.device.type == "sim"
    assert same_bits(returned.cpu(), expected)
    assert same_bits(model[0].qweight, expected + 1)
    applied.remove()


@pytest.mark.parametrize("use_stream", [True, False])
def test_what_a_call_in_inference_mode_puts_in_their_place_can_be_edited(sim, use_stream):
    model, bare = build(), build()
    hookcore.apply(model, [GroupOffload("sim", use_stream=use_stream)])
    for it, device in ((model, "sim"), (bare, "cpu")):
        it[0].change = "replaced"
        call(it, torch.inference_mode, device)
        it[0].change = "in place"
    assert same_bits(call(model, torch.no_grad, "sim").cpu(), call(bare, torch.no_grad, "cpu"))


def test_what_is_changed_with_gradients_waits_for_copies_that_were_given_up(sim):
    model, bare = build(), build()
    hookcore.apply(model, [GroupOffload("sim")])
    call(model, torch.no_grad, "sim")
    call(model, torch.no_grad, "sim")  # which copies ahead for the next
    for it in (model, bare):
        it[0].change = "in place"
    with sim.limited(profile=sim.DeviceProfile(name="slow", host_to_device=1e5)):
        call(model, torch.no_grad, "sim")
        call(bare, torch.no_grad, "cpu")
        for mode in (torch.enable_grad, torch.no_grad):
            assert same_bits(call(model, mode, "sim").cpu(), call(bare, mode, "cpu"))


def test_only_saved_large_buffers_of_quantized_layers_are_weights():
    layer = Quantized()
    layer.register_buffer("workspace", torch.zeros(WIDTH, WIDTH, dtype=torch.int32), persistent=False)
    layer.norm = nn.BatchNorm1d(2**14)
    layer.table = nn.Module()
    layer.table.register_buffer("positions", torch.rand(WIDTH, WIDTH))
    found = {
        slot.name for slot in Component("", layer, lambda _: ModelConventions()).slots if is_weight(slot)
    }
    assert found == {"qweight", "scales", "norm.weight", "norm.bias"}
