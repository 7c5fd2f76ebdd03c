"""The same promises on a real accelerator, and weights streamed under long kernels: `make test-gpu`.

On another device than the machine's own: `HOOKCORE_TEST_DEVICE=sim pytest -m gpu`.
"""

import os

import pytest
import test_first_party
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from torch import nn

import hookcore
from hookcore.testing import TechniqueContract
from hookcore_plugins import GroupOffload, ModelOffload, SequentialOffload

DEVICE = os.environ.get("HOOKCORE_TEST_DEVICE") or str(torch.accelerator.current_accelerator() or "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE != "sim" and not torch.accelerator.is_available(), reason="there is no accelerator here"
    ),
]

LEFT_OUT = {"TestTrace"} if DEVICE == "sim" else set()  # whose kernels, in Python, hide from it

globals().update(
    (kind.__name__, type(kind.__name__, (kind,), {"devices": (DEVICE,)}))
    for name, kind in vars(test_first_party).items()
    if name.startswith("Test") and issubclass(kind, TechniqueContract) and name not in LEFT_OUT
)


@pytest.mark.filterwarnings("ignore:the checkpoint in .* tensors that .* lacks:hookcore.HookcoreWarning")
@pytest.mark.parametrize("machine", ["Offloads", "OffloadsFromTheDevice", "OffloadsAndCasting", "Disk"])
def test_any_sequence_of_steps(request, machine):
    if DEVICE == "sim":
        request.getfixturevalue("sim")
    there = type(machine, (getattr(test_first_party, machine),), {"device": DEVICE})
    run_state_machine_as_test(there, settings=settings(there.TestCase.settings, max_examples=20))


@pytest.fixture
def width(request):
    """Of layers that compute and copy for so long that a copy that isn't waited for is seen."""
    if DEVICE == "sim":
        request.getfixturevalue("sim")
        return 64
    return 4096


TECHNIQUES = {
    "least memory": lambda _: GroupOffload(DEVICE),
    "a quarter": lambda nbytes: GroupOffload(DEVICE, memory_budget=nbytes // 4),
    "three quarters": lambda nbytes: GroupOffload(DEVICE, memory_budget=nbytes * 3 // 4),
    "staging": lambda _: GroupOffload(DEVICE, low_cpu_mem_usage=True),
    "sequential": lambda _: SequentialOffload(DEVICE),
    "model": lambda _: ModelOffload(DEVICE),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(12)))
@torch.no_grad()
def test_many_passes_that_nobody_waits_for_equal_the_resident_models(width, technique, seed, order):
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in order)
    resident = [layer.weight.to(DEVICE) for layer in model]
    x = torch.randn(64, width).to(DEVICE)
    expected, found = x, x
    for index in [*order, *order, *order]:
        expected = torch.nn.functional.linear(expected, resident[index])
    forward = _Chain(model, order)
    nbytes = sum(layer.weight.nbytes for layer in model)
    with hookcore.apply(forward, [TECHNIQUES[technique](nbytes)]):
        for _ in range(3):
            found = forward(found)
        assert torch.equal(found, expected)


class _Chain(nn.Module):
    """Calls layers in an order of its own."""

    def __init__(self, layers, order):
        super().__init__()
        self.layers = layers
        self.order = order

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x)
        return x
