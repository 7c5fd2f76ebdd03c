"""Weights that a call reads of layers that it does not call: as they would be in those layers' own calls."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812

import hookcore
from hookcore.memory import ConvertedTensors
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import DiskOffload, GroupOffload, LayerwiseCasting, ModelOffload, SequentialOffload

FP8 = torch.float8_e4m3fn
X = torch.linspace(-2, 2, 24).reshape(3, 8)

ASK = {
    "weight.dtype": lambda layer: layer.weight.dtype,
    "parameters()": lambda layer: next(layer.parameters()).dtype,
    "parameters() of the last": lambda layer: [*layer.parameters()][-1].dtype,
    "named_parameters()": lambda layer: dict(layer.named_parameters())["weight"].dtype,
    "get_parameter()": lambda layer: layer.get_parameter("weight").dtype,
    "get_parameter_dtype()": get_parameter_dtype,
}


class Block(nn.Module):
    """Does something with two layers, and then calls one of them."""

    def __init__(self, do):
        super().__init__()
        torch.manual_seed(0)
        self.called = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)
        self.do = do

    def forward(self, x):
        found = self.do(self)
        return self.called(F.linear(x, self.read.weight, self.read.bias)), found

    def encode(self, x):
        return self(x)


class Model(nn.Sequential):
    def __init__(self, *does):
        super().__init__(*map(Block, does))
        self.eval()

    def forward(self, x):
        found = []
        for block in self:
            x, did = block(x)
            found.append(did)
        return x, found


def rounded(model):
    """A copy that lies in its compute dtype and was rounded by hand."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.to(FP8))
    return twin


def stored_in(model):
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK.keys())
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_whoever_asks_in_a_forward_is_told_the_compute_dtype(ask, compute):
    def do(block):
        return {ask(layer) for layer in (block.called, block.read)} | {next(block.parameters()).dtype}

    model = Model(do, do)
    hookcore.apply(model, [LayerwiseCasting(FP8, compute)])
    _, found = model(X.to(compute))
    assert found == [{compute}, {compute}]
    assert {ask(layer) for block in model for layer in (block.called, block.read)} == {FP8}
    assert stored_in(model) == {FP8}


@pytest.mark.parametrize("call", ["model", "block", "forward", "encode"])
def test_it_does_not_matter_how_a_part_is_called(call):
    model = Model(lambda block: block.read.weight.dtype, lambda block: block.read.weight.dtype)
    twin = rounded(model)
    hookcore.apply(model, [LayerwiseCasting()])
    for each in ("model", call):
        (y, found), (expected, _) = (
            it(X) if each == "model" else it[0](X) if each == "block" else getattr(it[0], each)(X)
            for it in (model, twin)
        )
        assert same_bits(y, expected)
        assert {*(found if isinstance(found, list) else [found])} == {torch.float32}


def test_a_forward_of_another_name_is_a_call_too():
    def compute(block, x):
        return F.linear(x, block.read.weight, block.read.bias)

    model = Model(lambda _: None)[0]
    model.forward = partial(compute, model)
    twin = rounded(model)
    hookcore.apply(model, [LayerwiseCasting()])
    assert same_bits(model(X), compute(twin, X))


def offloads(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return {
        "none": [],
        "leaf": [GroupOffload("sim", offload_type="leaf_level")],
        "stream": [GroupOffload("sim", offload_type="leaf_level", use_stream=True)],
        "block": [GroupOffload("sim", offload_type="block_level", num_blocks_per_group=1)],
        "budget": [GroupOffload("sim", memory_budget="600B")],
        "sequential": [SequentialOffload("sim")],
        "model": [ModelOffload("sim")],
        "disk": [DiskOffload(tmp_path / "model.safetensors", memory_budget="4KiB")],
        "disk to device": [DiskOffload(tmp_path / "model.safetensors", execution_device="sim")],
    }


@pytest.mark.parametrize(
    "offload",
    ["none", "leaf", "stream", "block", "budget", "sequential", "model", "disk", "disk to device"],
)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_it_works_with_what_moves_the_weights(sim, tmp_path, offload, compute):
    def do(block):
        return block.read.weight.dtype, next(block.parameters()).dtype

    model = Model(do, do, do)
    twin = rounded(model).to(compute)
    others = offloads(tmp_path, model)[offload]
    hookcore.apply(model, [LayerwiseCasting(FP8, compute), *others])
    x = X.to(compute)
    with torch.no_grad():
        for _ in range(3):
            (y, found), (expected, _) = model(x if offload in ("none", "disk") else x.to("sim")), twin(x)
            assert same_bits(y.cpu(), expected)
            assert set(found) == {(compute, compute)}
    hookcore.remove(model, allow_lossy=True)
    assert all(type(module._parameters) is dict for module in model.modules())
    with torch.no_grad():
        assert same_bits(model.to(compute)(x)[0], expected)


def test_what_is_saved_or_copied_in_a_call_is_what_is_saved_or_copied_outside():
    def do(block):
        if block.training:
            return None
        return block.state_dict(), copy.deepcopy(block)

    model = Model(do)
    hookcore.apply(model, [LayerwiseCasting()])
    outside, copied = model.state_dict(), copy.deepcopy(model[0])
    y, [(saved, also_copied)] = model(X)
    assert {value.dtype for value in saved.values()} == {FP8}
    assert all(same_bits(value, outside[f"0.{name}"]) for name, value in saved.items())
    for each in (copied.train(), also_copied.train()):
        assert stored_in(each) == {torch.float32}
        assert same_bits(each(X)[0], y)


def test_a_model_is_loaded_or_converted_in_a_call_as_outside():
    def do(block):
        block.read.load_state_dict({"weight": torch.eye(8), "bias": torch.ones(8)})
        block.read.requires_grad_(False)
        block.called.to(torch.float32)
        return block.read.weight

    model = Model(do)
    hookcore.apply(model, [LayerwiseCasting()])
    _, [weight] = model(X)
    assert same_bits(weight, torch.eye(8))
    assert same_bits(model[0].read.weight.float(), torch.eye(8))


def test_another_thread_sees_what_is_stored_while_a_call_runs():
    inside, looked = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        def forward(self, x):
            inside.set()
            assert looked.wait(30)
            return super().forward(x)

    model = nn.Sequential(nn.Linear(8, 8), Waits(8, 8)).eval()
    twin = rounded(model)
    hookcore.apply(model, [LayerwiseCasting()])
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(model(X)), daemon=True)
    thread.start()
    assert inside.wait(30)
    try:
        for found in (
            model.state_dict(),
            dict(model.named_parameters()),
            {name: model.get_parameter(name) for name in stored},
        ):
            assert all(same_bits(value, stored[name]) for name, value in found.items())
        copied = copy.deepcopy(model)
    finally:
        looked.set()
    thread.join(30)
    looked.set()
    assert [same_bits(output, twin(X)) for output in outputs] == [True]
    assert same_bits(copied(X), twin(X))


@given(st.lists(st.sampled_from(["read", "called", "copy"]), min_size=1, max_size=4))
@settings(deadline=None, max_examples=20)
def test_gradients_reach_parameters_that_are_only_read(uses):
    def do(block):
        total = torch.zeros(())
        for use in uses:
            weight = block.read.weight if use == "read" else block.called.weight
            if use != "copy":
                total = total + (weight * weight).sum()
        return total

    model = Model(do)
    twin = rounded(model)
    hookcore.apply(model, [LayerwiseCasting()])
    for each in (model, twin):
        y, [total] = each(X)
        (y.sum() + total).backward()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(own.grad, expected.grad)


def test_nothing_is_kept_after_a_read():
    def do(block):
        return weakref.ref(block.read.weight.untyped_storage()), block.read.weight.data_ptr()

    model = Model(do)
    hookcore.apply(model, [LayerwiseCasting()])
    with torch.no_grad():
        _, [(storage, _)] = model(X)
    gc.collect()
    assert storage() is None


def test_a_weight_put_in_the_place_of_a_cast_one_is_read_as_it_is():
    def do(block):
        block.read.weight = new
        return block.read.weight

    new = nn.Parameter(torch.eye(8))
    model = Model(do)
    hookcore.apply(model, [LayerwiseCasting()])
    _, [found] = model(X)
    assert found is new


def test_removing_leaves_no_stand_in():
    model = Model(lambda _: None)
    before = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [LayerwiseCasting(keep_originals=True)])
    assert isinstance(model[0].read._parameters, ConvertedTensors)
    assert not any(isinstance(it._parameters, ConvertedTensors) for it in copy.deepcopy(model).modules())
    model(X)
    applied.remove()
    before.assert_restored(model)
    assert all(type(module._parameters) is dict for module in model.modules())
