"""What is particular to this technique; `test_contract.py` tests what all techniques promise."""

# ruff: noqa: ANN001, ANN201, D102, D103

from __future__ import annotations

import math

import pytest
import torch
from attrs import evolve
from hookcore_example_plugin import ActivationStatistics, Statistics, statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore

torch.set_num_threads(1)
settings.register_profile("example", deadline=None)
settings.load_profile("example")

elements = st.sampled_from([0.0, math.inf, -math.inf, math.nan]) | st.floats(width=32).map(
    lambda element: element + 0.0  # -0.0 becomes 0.0: which of the two is the minimum is nobody's business
)
tensors = st.lists(elements, max_size=6).map(torch.tensor)


class Answers(nn.Module):
    """Returns what it is given."""

    def forward(self, answer):
        return answer


def observed(outputs: list) -> Statistics:
    """What the technique says of a module that returned these outputs, one a call."""
    model = Answers()
    with hookcore.apply(model, [ActivationStatistics()]):
        for output in outputs:
            assert model(output) is output
        return statistics(model)["Answers"]


@given(st.lists(tensors, max_size=4))
def test_the_figures_are_those_of_all_outputs_together(outputs):
    seen = [element for output in outputs for element in output.tolist()]
    finite = [element for element in seen if math.isfinite(element)]
    found = observed(outputs)
    assert (found.calls, found.count) == (len(outputs), len(seen))
    assert found.non_finite == len(seen) - len(finite)
    if not finite:
        assert all(map(math.isnan, (found.minimum, found.maximum, found.mean_abs, found.rms)))
        return
    assert (found.minimum, found.maximum) == (min(finite), max(finite))
    # Sums of float64 in another order.
    assert found.mean_abs == pytest.approx(math.fsum(map(abs, finite)) / len(finite), rel=1e-12, abs=0)
    squares = math.fsum(element**2 for element in finite)
    assert found.rms == pytest.approx(math.sqrt(squares / len(finite)), rel=1e-12, abs=0)


@given(st.lists(tensors, min_size=1, max_size=3))
def test_tensors_in_any_output_count_and_other_things_do_not(parts):
    others = [None, "text", torch.tensor([1, 2]), torch.empty(3, device="meta")]
    nested = {"first": parts[0], "rest": [tuple(parts[1:]), *others]}
    one_by_one = evolve(observed(parts), calls=1)
    assert repr(observed([nested])) == repr(one_by_one)  # NaN is not equal to itself


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_dtype_is_read(dtype):
    found = observed([torch.tensor([-2.0, 0.0, 1.0, math.nan]).to(dtype)])
    assert found == Statistics(1, 4, 1, -2.0, 1.0, 1.0, math.sqrt(5 / 3))


def test_an_output_of_autograd_is_recorded_and_gives_the_same_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3, requires_grad=True)
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    with hookcore.apply(model, [ActivationStatistics()]):
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        # Of what the first layer put out, before the next one changed it in place.
        assert statistics(model)["0"].minimum < 0 == statistics(model)["1"].minimum
    assert torch.equal(gradient, wanted)


def test_what_is_recorded_under_inference_mode_goes_on_outside():
    model = Answers()
    with hookcore.apply(model, [ActivationStatistics()]):
        with torch.inference_mode():
            model(torch.ones(2))
        model(torch.zeros(2))
        assert statistics(model)["Answers"] == Statistics(2, 4, 0, 0.0, 1.0, 0.5, math.sqrt(0.5))


def test_reset_begins_anew():
    model = Answers()
    applied = hookcore.apply(model, [ActivationStatistics()])
    model(torch.ones(2))
    applied.reset()
    assert repr(statistics(model)) == repr({"Answers": Statistics()})
    model(torch.zeros(1))
    assert statistics(model)["Answers"].count == 1


def test_patterns_choose_modules_and_none_takes_the_layers():
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "b": nn.ModuleList([nn.Linear(2, 2)])}
    )
    chosen = {
        None: ["a.0", "a.1", "b.0"],
        "^a": ["a", "a.0", "a.1"],
        ("1$", "b"): ["a.1", "b.0"],
    }
    for patterns, fqns in chosen.items():
        with hookcore.apply(model, [ActivationStatistics(patterns)]) as applied:
            assert list(statistics(model)) == fqns
            assert ("it has no forward" in str(applied)) == (patterns == ("1$", "b"))
    assert statistics(model) == {}


def test_modules_are_named_as_in_the_target_that_is_asked():
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())
    hookcore.apply(model[0], [ActivationStatistics()])
    assert list(statistics(model)) == ["0.0"]
    assert list(statistics(model[0])) == ["0"]
    assert list(statistics(model[1])) == []
    assert list(statistics({"x": model})) == ["x.0.0"]


def test_the_table_has_a_line_for_each_module():
    model = nn.Sequential(Answers(), Answers())
    with hookcore.apply(model, [ActivationStatistics()]):
        model(torch.tensor([1.0, -3.0, math.inf]))
        heading, *lines = str(statistics(model)).splitlines()
    assert heading.split() == ["module", "calls", "count", "min", "max", "mean", "|x|", "rms", "non-finite"]
    assert [line.split() for line in lines] == [
        [fqn, "1", "3", "-3", "1", "2", "2.236", "1"] for fqn in ("0", "1")
    ]


def test_patterns_that_fit_nothing_are_refused():
    with pytest.raises(hookcore.PlanError, match=r"no module of 'ReLU' matches modules=\('block',\)"):
        hookcore.apply(nn.ReLU(), [ActivationStatistics("block")])
    with pytest.raises(ValueError, match="no regular expression"):
        ActivationStatistics("(")
