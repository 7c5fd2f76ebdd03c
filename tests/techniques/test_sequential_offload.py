"""Sequential offloading: one layer, and the next, are on the device."""

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
def test_no_more_than_two_neighbouring_layers_are_there_and_the_bits_are_the_same(sim, widths):
    model, bare = chain(widths), chain(widths)
    sizes = [layer.weight.nbytes for layer in model]
    largest = max(sum(sizes[at : at + 2]) for at in range(len(sizes)))
    device = torch.get_device_module("sim")
    before = device.memory_allocated()
    device.reset_peak_memory_stats()
    x = torch.ones(1, 16 * widths[0])
    with hookcore.apply(model, [SequentialOffload("sim")]), torch.no_grad():
        for _ in range(3):
            assert same_bits(model(x).cpu(), bare(x))
    values = 4 * 16 * max(widths)
    assert device.max_memory_allocated() - before <= largest + 3 * values  # an input, and two outputs


def test_the_next_layer_is_copied_while_this_one_computes(sim):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    x = torch.ones(4096, 256, device="sim")
    hookcore.apply(model, [SequentialOffload("sim")])
    with torch.no_grad():
        for _ in range(2):
            model(x)
        torch.get_device_module("sim").synchronize()
        with sim.traced() as trace:
            model(x)
            torch.get_device_module("sim").synchronize()
    computing = sum(span.end - span.start for span in trace.spans if span.engine == "compute")
    copying = sum(span.end - span.start for span in trace.spans if span.engine == "copy in")
    assert trace.duration < 0.7 * (computing + copying)


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
