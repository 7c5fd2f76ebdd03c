"""The remedy that an error names can be taken: each option in it is one of the technique that is refused."""

import inspect
import re

import attrs
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hookcore
import hookcore_plugins
from hookcore import HookcoreError, Technique
from hookcore_plugins import (
    DiskOffload,
    GroupOffload,
    LayerwiseCasting,
    ModelOffload,
    SequentialOffload,
)

KINDS = [getattr(hookcore_plugins, name) for name in hookcore_plugins.__all__]
KINDS = [kind for kind in KINDS if isinstance(kind, type) and issubclass(kind, Technique)]
OF_FUNCTIONS = {
    name
    for function in (hookcore.apply, hookcore.load, hookcore.remove)
    for name in inspect.signature(function).parameters
}
OPTIONS = {it.name for kind in KINDS for it in attrs.fields(kind)} - OF_FUNCTIONS


def assert_remedy_exists(technique, message):
    """Each option of any technique that the message names, or sets, is one of this technique."""
    own = {it.name for it in attrs.fields(type(technique))}
    named = set(re.findall(r"\b([a-z_]+)=", message))
    named |= {word for word in re.findall(r"\w+", message) if word in OPTIONS and "_" in word}
    if re.search(r"\bexclude\b", message):
        named.add("exclude_modules")
    assert named <= own | OF_FUNCTIONS, message


class Wrapped(torch.Tensor):
    """A kind of tensor that cannot be moved by its data."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    @property
    def dtype(self):
        return self.first.weight.dtype

    @property
    def device(self):
        return self.first.weight.device

    def forward(self, x):
        return self.second(self.first(x))


def on_meta():
    with torch.device("meta"):
        return Model()


def wrapped():
    model = Model()
    model.first.weight = nn.Parameter(torch.ones(8, 8).as_subclass(Wrapped))
    return model


def sparse():
    model = Model()
    model.first.weight = nn.Parameter(torch.eye(8).to_sparse())
    return model


def of_two_dtypes():
    model = Model()
    model.first.bias = nn.Parameter(model.first.weight.data.view(torch.bfloat16)[0, :8])
    return model


def empty():
    return nn.Sequential(nn.Identity())


def of_integers():
    model = Model()
    for parameter in (model.first.weight, model.first.bias, model.second.weight, model.second.bias):
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.int8)
    return model


MODELS = [Model, on_meta, wrapped, sparse, of_two_dtypes, empty, of_integers]


def checkpoint(folder, scale=1.0):
    path = folder / f"model{scale}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file({name: it * scale for name, it in Model().state_dict().items()}, path)
    return path


TECHNIQUES = {
    "model": lambda _: ModelOffload("sim"),
    "model with a budget": lambda _: ModelOffload("sim", memory_budget=8),
    "sequential": lambda _: SequentialOffload("sim"),
    "groups": lambda _: GroupOffload("sim"),
    "groups without streams": lambda _: GroupOffload("sim", use_stream=False),
    "groups with a budget": lambda _: GroupOffload("sim", memory_budget=8),
    "groups on disk": lambda folder: GroupOffload("sim", offload_to_disk_path=folder),
    "disk": lambda folder: DiskOffload(checkpoint(folder)),
    "disk with a budget": lambda folder: DiskOffload(checkpoint(folder), memory_budget=8),
    "disk of another model": lambda folder: DiskOffload(checkpoint(folder, scale=2.0)),
    "disk, on the device": lambda folder: DiskOffload(checkpoint(folder), execution_device="sim"),
    "disk, converting": lambda folder: DiskOffload(checkpoint(folder)),
    "casting": lambda _: LayerwiseCasting(),
    "casting to bfloat16": lambda _: LayerwiseCasting("bfloat16"),
}
REFUSED = {
    "model": {"wrapped", "sparse"},
    "sequential": {"wrapped"},
    "disk": {"wrapped"},
    "casting": {"empty"},
}


@pytest.mark.filterwarnings("ignore:the checkpoint in")  # has more weights than some of the models
@pytest.mark.parametrize("name", TECHNIQUES)
def test_options_in_refusals_are_those_of_the_technique(sim, name, tmp_path):
    technique = TECHNIQUES[name](tmp_path)
    refused = set()
    for build in MODELS:
        torch.manual_seed(0)
        model = build()
        try:
            hookcore.apply(model, [technique])
        except HookcoreError as error:
            assert_remedy_exists(technique, str(error))
            refused.add(build.__name__)
    assert REFUSED.get(name, set()) <= refused


@pytest.mark.parametrize("name", TECHNIQUES)
def test_options_in_errors_of_an_applied_technique_are_its_own(sim, name, tmp_path):
    technique = TECHNIQUES[name](tmp_path)
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16 if "converting" in name else torch.float32)
    x = torch.ones(1, 8, dtype=model.dtype)
    try:
        applied = hookcore.apply(model, [technique])
    except HookcoreError as error:
        assert_remedy_exists(technique, str(error))
        return
    found = []
    for act in (
        lambda: model(x),
        lambda: model.to(torch.float64),
        lambda: model.to("sim:1"),
        lambda: hookcore.apply(model, [technique]),  # a second time
        applied.remove,
    ):
        try:
            act()
        except HookcoreError as error:
            assert_remedy_exists(technique, str(error))
            found.append(error)
    assert found
