"""What other libraries would put on a hooked model afterwards is refused, and goes on the others as ever."""

from __future__ import annotations

import copy
import gc

import accelerate
import accelerate.hooks
import diffusers.hooks
import pytest
import torch
from torch import nn

import hookcore
from hookcore import ConflictError
from hookcore.testing import ModelSnapshot
from hookcore.testing.models import real_models
from hookcore_plugins import GroupOffload, LayerwiseCasting, Slicing

CPU = torch.device("cpu")
CASE = real_models()["flux"]()
CLASSES = {
    diffusers.hooks.HookRegistry: "register_hook",
    accelerate.hooks.AlignDevicesHook: "init_hook",
    accelerate.hooks.CpuOffload: "init_hook",
    accelerate.hooks.LayerwiseCastingHook: "init_hook",
}
ORIGINALS = {owner: vars(owner)[method] for owner, method in CLASSES.items()}

LATER = {
    "group offload": lambda model: model.enable_group_offload(CPU, offload_type="leaf_level"),
    "group offload of blocks": lambda model: diffusers.hooks.apply_group_offloading(
        model, CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "casting": lambda model: model.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "casting of a part": lambda model: diffusers.hooks.apply_layerwise_casting(
        model.transformer_blocks[0], torch.bfloat16, torch.float32, skip_modules_classes=None
    ),
    "accelerate's offload": lambda model: accelerate.cpu_offload(model, CPU),
    "offload with a hook": lambda model: accelerate.cpu_offload_with_hook(model, CPU),
    "dispatch": lambda model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "a hook of a part": lambda model: accelerate.hooks.add_hook_to_module(
        model.proj_out, accelerate.hooks.AlignDevicesHook(CPU, offload=True)
    ),
    "a sequence of hooks": lambda model: accelerate.hooks.add_hook_to_module(
        model, accelerate.hooks.SequentialHook(accelerate.hooks.CpuOffload(CPU))
    ),
}
TECHNIQUES = [GroupOffload("cpu", offload_type="leaf_level"), LayerwiseCasting("bfloat16"), Slicing()]


@pytest.fixture(autouse=True)
def pristine():
    yield
    gc.collect()
    assert {owner: vars(owner)[method] for owner, method in CLASSES.items()} == ORIGINALS


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda it: it.name)
@pytest.mark.parametrize("later", LATER)
def test_what_moves_or_casts_a_hooked_model_is_refused_and_nothing_is_touched(technique, later):
    model, bare = CASE.build(), CASE.build()
    before = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [technique])
    with torch.no_grad():
        expected = CASE.call(model)
        with pytest.raises(
            ConflictError,
            match=rf"hook .* cannot be put on .* {technique.name} is on the model.*hookcore.remove",
        ):
            LATER[later](model)
        assert not any("_hf_hook" in vars(it) or "_old_forward" in vars(it) for it in model.modules())
        for it in model.modules():
            if (registry := vars(it).pop("_diffusers_hook", None)) is not None:
                assert not registry.hooks
        assert all(map(torch.equal, CASE.call(model), expected))
        LATER[later](bare)  # goes on what is not hooked
        CASE.call(bare)
    applied.remove(allow_lossy=True)
    if technique.name != "layerwise_casting":
        before.assert_restored(model)
    LATER[later](model)


def test_a_copy_of_a_hooked_model_is_not_hooked():
    model = CASE.build()
    with hookcore.apply(model, TECHNIQUES[:1]):
        copied = copy.deepcopy(model)
        copied.enable_layerwise_casting(torch.bfloat16, torch.float32)


def test_classes_are_as_before_when_a_hooked_model_has_gone_away():
    model = nn.Sequential(nn.Linear(2, 2))
    hookcore.apply(model, TECHNIQUES[:1])
    assert vars(accelerate.hooks.CpuOffload)["init_hook"] is not ORIGINALS[accelerate.hooks.CpuOffload]
    del model
    gc.collect()
    other = nn.Linear(2, 2)
    for kind in (accelerate.hooks.CpuOffload, accelerate.hooks.AlignDevicesHook):
        accelerate.hooks.add_hook_to_module(other, kind())
    diffusers.hooks.HookRegistry(other).register_hook(diffusers.hooks.ModelHook(), "mine")
    accelerate.hooks.LayerwiseCastingHook(torch.float32, torch.float32, False).init_hook(other)
