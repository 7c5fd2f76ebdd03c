"""Keyword inputs that are not to be moved stay where they are, under all offloads; all others are moved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hookcore
from hookcore_plugins import DiskOffload, GroupOffload, ModelOffload, SequentialOffload

WAYS = {
    "groups": lambda _, **options: GroupOffload("sim", **options),
    "groups without streams": lambda _, **options: GroupOffload("sim", use_stream=False, **options),
    "groups on disk": lambda path, **options: GroupOffload("sim", checkpoint=path, **options),
    "groups on disk without streams": lambda path, **options: GroupOffload(
        "sim", checkpoint=path, use_stream=False, **options
    ),
    "layers": lambda _, **options: SequentialOffload("sim", **options),
    "components": lambda _, **options: ModelOffload("sim", **options),
    "disk": lambda path, **options: DiskOffload(path, execution_device="sim", **options),
}


class Caching(nn.Module):
    """Takes down where its inputs are; has a buffer, which disk techniques keep in memory."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("table", torch.ones(4))
        self.seen = {}

    def forward(self, x, **named):
        self.seen = named
        for layer in self.layers:
            x = layer(x) + self.table
        return x


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ({}, set()),
        ({"exclude_kwargs": "cache"}, {"cache"}),
        ({"exclude_kwargs": ["cache", "mask", "absent"]}, {"cache", "mask"}),
        ({"exclude_kwargs": ()}, set()),
    ],
)
def test_only_what_is_named_stays(sim, tmp_path, way, options, stays):
    model = Caching()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    named = {name: [torch.zeros(2)] for name in ("cache", "mask", "other")}
    with hookcore.apply(model, [way(tmp_path, **options)]), torch.no_grad():
        for called in (model, model):
            called(torch.ones(1, 4), **named)
            for name, given in named.items():
                assert (model.seen[name] is given) == (name in stays)
                assert model.seen[name][0].device.type == ("cpu" if name in stays else "sim")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_the_models_library_says_holds_unless_something_is_named(sim, tmp_path, way):
    modeling = pytest.importorskip("diffusers.models.modeling_utils")

    class Model(modeling.ModelMixin, Caching):
        _skip_keys = ("cache",)

        def __init__(self):
            modeling.ModelMixin.__init__(self)
            Caching.__init__(self)

    model, cache = Model(), [torch.zeros(2)]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for options, stays in (({}, True), ({"exclude_kwargs": ()}, False)):
        with hookcore.apply(model, [way(tmp_path, **options)]), torch.no_grad():
            model(torch.ones(1, 4), cache=cache)
            assert (model.seen["cache"] is cache) == stays


@pytest.mark.parametrize("made", [GroupOffload, SequentialOffload, ModelOffload])
@pytest.mark.parametrize("wrong", [["cache", 3], "two words", [None]])
def test_what_is_no_name_is_refused(made, wrong):
    with pytest.raises(TypeError, match="^exclude_kwargs has .*, expected names of keyword inputs, such as"):
        made("cpu", exclude_kwargs=wrong)
