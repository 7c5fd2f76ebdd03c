"""Less free memory than a plan needs is told when it is applied; with exactly as much it runs."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import hookcore
from hookcore import BudgetError
from hookcore.memory import free_device_bytes
from hookcore.testing import simulator
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import DiskOffload, GroupOffload, LayerwiseCasting, ModelOffload, SequentialOffload

WIDTH = 32
X = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)

TECHNIQUES = {
    "groups": lambda _: [GroupOffload("sim")],
    "blocks": lambda _: [GroupOffload("sim", offload_type="block_level")],
    "a budget": lambda _: [GroupOffload("sim", memory_budget=30_000)],
    "no streams": lambda _: [GroupOffload("sim", use_stream=False)],
    "excluded": lambda _: [GroupOffload("sim", exclude_modules="0")],
    "cast": lambda _: [GroupOffload("sim"), LayerwiseCasting()],
    "sequential": lambda _: [SequentialOffload("sim")],
    "models": lambda _: [ModelOffload("sim")],
    "disk": lambda path: [DiskOffload(path, execution_device="sim")],
}


def build():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(8)))


def device():
    return torch.get_device_module("sim")


def taken_by_calls(model, techniques):
    """Bytes that a call takes besides what its plan says of weights."""
    needed = sum(hookcore.plan(model, techniques).needs.values())
    before = device().memory_allocated()
    hookcore.apply(model, techniques)
    device().reset_peak_memory_stats()
    with torch.no_grad():
        for _ in range(3):
            model(X)
    device().synchronize()
    peak = device().max_memory_allocated() - before
    hookcore.remove(model, allow_lossy=True)
    return max(peak - needed, 0)


@pytest.mark.parametrize("make", TECHNIQUES.values(), ids=TECHNIQUES)
def test_exactly_the_need_is_enough_to_apply_and_a_byte_less_is_refused(sim, tmp_path, make):
    gc.collect()
    save_file(build().state_dict(), tmp_path / "model.safetensors")
    model, bare, techniques = build(), build(), make(tmp_path)
    hookcore.apply(bare, [it for it in make(tmp_path) if isinstance(it, LayerwiseCasting)])
    (needed,) = hookcore.plan(model, techniques).needs.values()
    beside = taken_by_calls(build(), make(tmp_path))
    there = device().memory_allocated()
    before = ModelSnapshot.take(model)
    with sim.limited(memory=there + needed - 1):
        with pytest.raises(BudgetError, match=rf"\({needed} B\).* \({needed - 1} B\). Nothing was changed"):
            hookcore.apply(model, techniques)
        before.assert_restored(model)
    with sim.limited(memory=there + needed):
        applied = hookcore.apply(model, make(tmp_path))
    with sim.limited(memory=there + needed + beside), torch.no_grad():
        for _ in range(3):
            assert same_bits(model(X).cpu(), bare(X))
    applied.remove(allow_lossy=True)


def test_weights_that_lie_on_the_device_count_as_free(sim):
    gc.collect()
    before = device().memory_allocated()
    model = build().to("sim")
    taken = device().memory_allocated() - before
    technique = GroupOffload("sim", memory_budget=taken)
    with sim.limited(memory=device().memory_allocated() + 2 * 4 * WIDTH**2):
        applied = hookcore.apply(model, [technique])
        with torch.no_grad():
            model(X)
    applied.remove()
    other = build()
    with sim.limited(memory=device().memory_allocated() + taken - 1):
        with pytest.raises(BudgetError, match="free"):
            hookcore.apply(other, [GroupOffload("sim", memory_budget=taken)])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.lists(st.integers(1, 2**22), max_size=4), st.lists(st.booleans(), min_size=4, max_size=4))
def test_what_torch_has_cached_counts_as_free(sim, sizes, kept):
    gc.collect()
    with sim.limited(profile=evolve(simulator.GENERIC, caching=True, memory=2**26)):
        device().empty_cache()
        free = free_device_bytes(torch.device("sim"))
        tensors = [torch.empty(nbytes, dtype=torch.uint8, device="sim") for nbytes in sizes]
        held = [tensor for tensor, stays in zip(tensors, kept, strict=False) if stays]
        del tensors
        allocated = device().memory_allocated()
        assert free - free_device_bytes(torch.device("sim")) == allocated
        del held
        assert free_device_bytes(torch.device("sim")) == free
        technique = GroupOffload("sim", memory_budget=0.5)
        assert technique._budget == free // 2


def test_a_share_of_what_nobody_can_tell_is_refused(sim, monkeypatch):
    monkeypatch.delattr(device(), "mem_get_info")
    assert free_device_bytes(torch.device("sim")) is None
    text = re.escape(
        "memory_budget is 0.5, a share of the free memory, but torch cannot tell how much 'sim' has"
    )
    with pytest.raises(BudgetError, match=text):
        hookcore.plan(build(), [GroupOffload("sim", memory_budget=0.5)])
    hookcore.apply(build(), [GroupOffload("sim")])
