"""Sequential offloading: one layer at a time is on the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import PlanError
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import SequentialOffload

FIXTURE = HealthCheck.function_scoped_fixture


def chain(widths):
    """Linear layers of these widths without biases, which take a multiple of 64 bytes each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = [16 * width for width in widths]
        return nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)))


@settings(max_examples=20, suppress_health_check=[FIXTURE])
@given(widths=st.lists(st.integers(1, 6), min_size=2, max_size=8))
def test_no_more_than_one_layer_is_there_and_the_bits_are_the_same(sim, widths):
    model, bare = chain(widths), chain(widths)
    largest = max(layer.weight.nbytes for layer in model)
    device = torch.get_device_module("sim")
    before = device.memory_allocated()
    device.reset_peak_memory_stats()
    x = torch.ones(1, 16 * widths[0])
    with hookcore.apply(model, [SequentialOffload("sim")]), torch.no_grad():
        for _ in range(3):
            assert same_bits(model(x).cpu(), bare(x))
    values = 4 * 16 * max(widths)
    assert device.max_memory_allocated() - before <= largest + 3 * values  # an input, and two outputs


def test_it_takes_no_more_memory_than_accelerates_and_less_time(sim):
    """Layers of unequal size, with activations that are largest where weights are small."""
    accelerate = pytest.importorskip("accelerate")
    device = torch.get_device_module("sim")
    x = torch.ones(512, 64, device="sim")
    found = {}
    for name in ("ours", "theirs"):
        layers = [nn.Linear(*pair) for pair in itertools.pairwise([64, 512, 512, 64, 1024, 64])]
        model = nn.Sequential(*itertools.chain.from_iterable((it, nn.ReLU()) for it in layers))
        if name == "ours":
            hookcore.apply(model, [SequentialOffload("sim")])
        else:
            accelerate.cpu_offload(model, torch.device("sim"))
        with torch.no_grad():
            for _ in range(2):
                model(x)
            device.synchronize()
            device.reset_peak_memory_stats()
            begun, before = sim.now(), device.memory_allocated()
            model(x)
            device.synchronize()
        found[name] = device.max_memory_allocated() - before, sim.now() - begun
        del model
    assert found["ours"][0] <= found["theirs"][0]
    assert found["ours"][1] < 0.8 * found["theirs"][1]


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_excluded_modules_stay(sim, device):
    model = chain([1, 2, 3, 1])
    applied = hookcore.apply(model, [SequentialOffload(device, exclude_modules="1")])
    assert [layer.weight.device.type for layer in model] == ["cpu", device, "cpu"]
    assert f"6.0 KiB resident on {device}" in str(applied)
    with torch.no_grad():
        assert same_bits(model(torch.ones(1, 16)).cpu(), chain([1, 2, 3, 1])(torch.ones(1, 16)))
    applied.remove()
    with pytest.raises(PlanError, match="no module named '7'"):
        hookcore.plan(model, [SequentialOffload(device, exclude_modules=["7"])])


@pytest.mark.parametrize(
    ("options", "error"),
    [({"device": "meta"}, ValueError), ({"device": "cpu", "exclude_modules": [0]}, TypeError)],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(error):
        SequentialOffload(**options)
