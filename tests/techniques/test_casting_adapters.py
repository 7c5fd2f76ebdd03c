"""Adapters that are fused into cast weights."""

from __future__ import annotations

import copy

import pytest
import torch

import hookcore
from hookcore.testing.models import real_models
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import GroupOffload, LayerwiseCasting

peft = pytest.importorskip("peft")
FP8 = torch.float8_e4m3fn


def round_like(twin, model):
    """Rounds by hand those weights of a twin that are cast in a model."""
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dtype == FP8:
                own[name].copy_(own[name].to(FP8))


def merge(model, method):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            getattr(module, method)()


@pytest.mark.parametrize("offload", [[], [GroupOffload("cpu", offload_type="leaf_level")]])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_fused_into_cast_weights_and_taken_out_again(use_dora, offload):
    case = real_models()["unet"]()
    model = case.build()
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "conv1"], init_lora_weights=False, use_dora=use_dora
    )
    peft.inject_adapter_in_model(config, model)
    hookcore.apply(model, [LayerwiseCasting(), *offload])
    twin = copy.deepcopy(model)  # it lies in the compute dtype, and is rounded by hand
    outputs = []
    with torch.no_grad():
        for method in ("merge", "unmerge"):
            for each in (model, twin):
                merge(each, method)
            round_like(twin, model)
            outputs.append(case.call(model))
            assert all(map(same_bits, outputs[-1], case.call(twin)))
    assert not same_bits(outputs[0][0], outputs[1][0])
    assert FP8 in {parameter.dtype for parameter in model.parameters()}


def test_a_merge_that_fails_changes_no_weight():
    case = real_models()["unet"]()
    model = case.build()
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    hookcore.apply(model, [LayerwiseCasting()])
    with torch.no_grad():
        before = case.call(model)
        layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
        with pytest.raises(TypeError):
            layer.merge(safe_merge=False, adapter_names=1)
        assert all(map(same_bits, case.call(model), before))
