"""A technique as others may write it, float8 weights with scales: what it says of them is heard."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import ClassVar

import pytest
import torch
from attrs import frozen
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

import hookcore
from hookcore import Binding, Claim, Hook, Phase, Resource, Technique
from hookcore.testing import TechniqueContract
from hookcore.testing.cases import ModelCase
from hookcore.testing.modules import (
    Lookup,
    Recipe,
    TreeModel,
    WeightReader,
    layer_norm,
    linear,
    linear_without_bias,
    sequential,
)
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import GroupOffload, ModelOffload, SequentialOffload

FP8 = torch.float8_e4m3fn
X = torch.linspace(-2, 2, 24).reshape(3, 8)


@frozen
class ScaledFloat8(Technique):
    """Keeps weights of linear layers in float8, with one scale each."""

    name: ClassVar[str] = "scaled_float8"
    phase: ClassVar[Phase] = Phase.CAST

    def bind(self, component):
        for fqn, module in component.modules.items():
            name = f"{fqn}.weight" if fqn else "weight"
            if type(module) is nn.Linear and len(component.slot_of[name].fqns) == 1:
                claim = Claim(Resource.STORAGE_DTYPE, name, dtype=FP8)
                yield Binding(fqn, ScaledHook(), claims=[claim])


class ScaledHook(Hook):
    swaps_weights: ClassVar[bool] = True
    only_brings_weights: ClassVar[bool] = True

    def attach(self, module):
        self.dtype = module.weight.dtype
        module.weight.data = self.stored_value(module, module.weight, module.weight.data)

    def detach(self, module):
        module.weight.data = self.true_value(module, module.weight, module.weight.data)

    def stored_value(self, module, tensor, value):
        largest = value.detach().abs().max().float().clamp(min=1e-12).item()
        self.scale = 2.0 ** math.ceil(math.log2(largest / 448))  # a power of two rounds nothing
        return (value / self.scale).to(FP8)

    def true_value(self, module, tensor, data):
        return data if data.dtype is not FP8 else (data.float() * self.scale).to(self.dtype)

    def pre_forward(self, module, args, kwargs):
        self.stored = module.weight.data
        module.weight.data = self.true_value(module, module.weight, self.stored)

    def post_forward(self, module, output):
        module.weight.data = self.stored

    def on_error(self, module, error):
        self.post_forward(module, None)

    def loss_on_detach(self, module):
        return "the weights were rounded"


class TestItKeepsWhatIsPromised(TechniqueContract):
    """With weights that float8 holds exactly, so that whatever is wrong shows."""

    tolerance = 1e-6

    def make(self):
        return ScaledFloat8()

    def build(self, case):
        model = case.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(FP8))
        return model

    def models(self):
        recipes = st.lists(
            st.sampled_from([linear, linear_without_bias, layer_norm, Lookup, WeightReader]),
            min_size=1,
            max_size=3,
        )
        trees = recipes.map(lambda made: Recipe(sequential, tuple(map(Recipe, made))))
        return st.builds(ModelCase, st.builds(TreeModel, trees, width=st.sampled_from([4, 8])))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)
        self.seen = []

    def forward(self, x):
        self.seen.append(self.state_dict())
        return self.called(F.linear(x, self.read.weight, self.read.bias))


def saved_by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_by_torch,
}
OFFLOADS = {
    "none": list,
    "leaf": lambda: [GroupOffload("sim", offload_type="leaf_level")],
    "stream": lambda: [GroupOffload("sim", offload_type="leaf_level", use_stream=True)],
    "sequential": lambda: [SequentialOffload("sim")],
    "model": lambda: [ModelOffload("sim")],
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_all_who_look_see_the_true_values(sim, offload):
    model, bare = Model().eval(), Model().eval()
    before = ModelSnapshot.take(model)
    state = copy.deepcopy(bare.state_dict())
    applied = hookcore.apply(model, [ScaledFloat8(), *offload()])
    x = X if offload is OFFLOADS["none"] else X.to("sim")
    with torch.no_grad():
        for factor in (1, 3):
            if factor != 1:  # a scale of its own
                loaded = {name: value * factor for name, value in state.items()}
                model.load_state_dict(loaded)
                assert all(same_bits(value, state[name] * factor) for name, value in loaded.items())
            saved = {name: value.cpu() for name, value in model.state_dict().items()}
            assert {value.dtype for value in saved.values()} == {torch.float32}
            for name, value in saved.items():
                torch.testing.assert_close(value, state[name] * factor, rtol=0.07, atol=1e-3)
            assert model.read.weight.dtype is FP8
            bare.load_state_dict(saved)
            expected = bare(X)
            assert same_bits(model(x).cpu(), expected)
            assert all(same_bits(value.cpu(), saved[name]) for name, value in model.seen.pop().items())
            for make in COPIES.values():
                copied = make(model)
                assert not any(vars(parameter) for parameter in copied.parameters())
                assert same_bits(copied(X), expected)
    applied.remove(allow_lossy=True)
    assert not before.differences(model) or all("values" in it for it in before.differences(model))
    assert all(type(module._parameters) is dict for module in model.modules())
    with torch.no_grad():
        assert same_bits(model(X), expected)


def test_gradients_reach_weights_that_are_only_read():
    model, bare = Model(), Model()
    hookcore.apply(model, [ScaledFloat8()])
    bare.load_state_dict(model.state_dict())
    for each in (model, bare):
        each(X).sum().backward()
    assert same_bits(model.read.weight.grad, bare.read.weight.grad)


def test_assigned_weights_are_stored_anew():
    model, bare = Model().eval(), Model().eval()
    applied = hookcore.apply(model, [ScaledFloat8()])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**bare.state_dict(), "read.weight": torch.ones(2, 2)})
    applied.remove(allow_lossy=True)
