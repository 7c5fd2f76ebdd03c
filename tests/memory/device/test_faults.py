"""Whatever the device refuses in an apply, a call or a removal, the next call is right, and all comes back.

`make stress` tries more of the same, and interrupts.
"""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stress.faults import Fault
from stress.scenes import VERBS, in_another_thread, output_of
from torch import nn

import hookcore
from hookcore.testing import ModelSnapshot, same_bits
from hookcore_plugins import GroupOffload, SequentialOffload

STREAMING = ("leaves", "blocks", "budget", "sequential", "casting_and_leaves", "no_stream")
X = torch.linspace(-1, 1, 16)[None]


@pytest.fixture(autouse=True)
def nothing_left_for_other_tests():
    """Frees what the frames of errors have kept, page-locked memory among it."""
    yield
    gc.collect()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(STREAMING),
    st.sampled_from(["layers", "blocks"]),
    st.sampled_from([verb for verb in VERBS if verb != "reset"]),
    st.floats(0, 1, exclude_max=True),
)
@pytest.mark.usefixtures("sim")
def test_a_request_that_fails_leaves_a_model_that_works(technique, model, verb, where):
    Fault(technique, model, verb, where).check()


@pytest.mark.usefixtures("sim")
@pytest.mark.parametrize("verb", ["apply", "remove"])
def test_components_that_move_as_a_whole_come_back_after_a_request_that_failed(verb):
    for part in range(14):
        Fault("model", "layers", verb, (part + 0.5) / 14).check()


@pytest.mark.usefixtures("sim")
@pytest.mark.parametrize("technique", ["leaves", "sequential"])
@pytest.mark.parametrize("tenth", range(10))
def test_a_call_after_a_request_that_failed_is_right(technique, tenth):
    for part in range(5):
        Fault(technique, "layers", "later call", (tenth + part / 5) / 10).check()


class Pair(nn.ModuleDict):
    """Two components that are called one after another, one of them within a call of the other at times."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__({name: nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))) for name in "ab"})


def run(pair, nested):
    if not nested:
        return output_of(pair["b"], output_of(pair["a"], X))
    outputs = []
    handle = pair["a"][1].register_forward_hook(lambda *_: outputs.append(output_of(pair["b"], X)))
    try:
        return output_of(pair["a"], X) + outputs[0]
    finally:
        handle.remove()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    technique=st.sampled_from(
        [
            GroupOffload("sim", offload_type="leaf_level"),
            GroupOffload("sim", memory_budget=4000),
            GroupOffload("sim", memory_budget=6000),
            SequentialOffload("sim"),
        ]
    ),
    request_=st.sampled_from(["allocate", "copy", "record_event", "wait_event", "wait_stream"]),
    nth=st.integers(1, 30),
    nested=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_components_that_share_memory_work_after_a_request_that_failed(sim, technique, request_, nth, nested):
    pair = Pair()
    before = ModelSnapshot.take(pair)
    rights = {each: run(pair, each) for each in (False, True)}
    hookcore.apply(dict(pair.items()), [technique])
    run(pair, nested[0])
    error = torch.OutOfMemoryError if request_ == "allocate" else RuntimeError
    try:
        with sim.fail_at(request_, nth, error("injected")):
            run(pair, nested[1])
    except error as raised:
        assert str(raised) == "injected"  # noqa: PT017 -- it need not be raised
    for each in (nested[2], False, True):
        assert same_bits(run(pair, each), rights[each])
    in_another_thread(lambda: hookcore.remove(dict(pair.items())))
    before.assert_restored(pair)
    sim.check()


class Forgiving(nn.Module):
    """Tries a layer again that has failed, as models do that then take smaller batches."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        try:
            return self.inner(x)
        except RuntimeError:
            return self.inner(x)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["leaf_level", "block_level"]),
    st.sampled_from([None, 4000]),
    st.sampled_from(["allocate", "copy", "record_event", "wait_event"]),
    st.integers(1, 25),
)
def test_a_call_that_goes_on_after_a_request_that_failed_is_right(sim, level, budget, request_, nth):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), *(Forgiving(nn.Linear(16, 16)) for _ in range(4)))
    right = output_of(model, X)
    hookcore.apply(model, [GroupOffload("sim", offload_type=level, memory_budget=budget)])
    for _ in range(2):
        try:
            with sim.fail_at(request_, nth, torch.OutOfMemoryError("injected")):
                assert same_bits(output_of(model, X), right)
        except torch.OutOfMemoryError:
            pass
        assert same_bits(output_of(model, X), right)
    sim.check()
