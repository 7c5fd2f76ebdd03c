"""Operators with a number in a tensor's place, histograms and operators of lists give the CPU's bits."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookcore.testing.snapshot import same_bits

FOR_EACH_EXAMPLE = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
numbers = st.one_of(
    st.integers(-9, 9).filter(bool), st.floats(-9, 9).filter(lambda it: abs(it) > 0.1), st.just(True)
)
WITH_A_NUMBER = {
    "remainder": torch.remainder,
    "remainder of the number": lambda tensor, number: torch.remainder(number, tensor),
    "fmod": torch.fmod,
    "mod": operator.mod,
    "floordiv": operator.floordiv,
    "add": operator.add,
    "rsub": lambda tensor, number: number - tensor,
    "power": operator.pow,
    "equal": operator.eq,
    "in place": lambda tensor, number: tensor.clone().remainder_(int(number) or 1),
    "into another": lambda tensor, number: torch.fmod(tensor, int(number) or 1, out=torch.empty_like(tensor)),
}


@pytest.mark.parametrize("name", WITH_A_NUMBER)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16], ids=str)
@FOR_EACH_EXAMPLE
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), numbers)
def test_a_number_stands_for_a_tensor(sim, name, dtype, values, number):
    host = torch.tensor(values, dtype=dtype)
    try:
        expected = WITH_A_NUMBER[name](host, number)
    except RuntimeError:  # integers to a negative power
        with pytest.raises(RuntimeError):
            WITH_A_NUMBER[name](host.to("sim"), number)
        return
    found = WITH_A_NUMBER[name](host.to("sim"), number)
    assert found.device.type == "sim"
    assert found.dtype == expected.dtype
    assert same_bits(found.cpu(), expected)


@FOR_EACH_EXAMPLE
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=20), st.integers(1, 8), st.booleans())
def test_histograms(sim, values, bins, bounded):
    host = torch.tensor(values, dtype=torch.float32)
    bounds = (-5, 5) if bounded else ()
    there = host.to("sim")
    assert same_bits(torch.histc(there, bins, *bounds).cpu(), torch.histc(host, bins, *bounds))
    counts = host.abs().long()
    assert same_bits(torch.bincount(counts.to("sim")).cpu(), torch.bincount(counts))


FOR_LISTS = {
    "add": torch._foreach_add,
    "multiply by a number": lambda first, _: torch._foreach_mul(first, 2.5),
    "multiply by numbers": lambda first, _: torch._foreach_mul(first, [1.5] * len(first)),
    "multiply by a tensor": lambda first, _: torch._foreach_mul(first, torch.full_like(first[0][0], 3)),
    "addcmul": lambda first, second: torch._foreach_addcmul(first, first, second, 0.5),
    "lerp": lambda first, second: torch._foreach_lerp(first, second, 0.25),
    "norm": lambda first, _: torch._foreach_norm(first),
    "maximum": torch._foreach_maximum,
    "square root": lambda first, _: torch._foreach_sqrt(first),
}
IN_PLACE = {
    "add": torch._foreach_add_,
    "addcdiv": lambda first, second: torch._foreach_addcdiv_(first, first, second, 0.5),
    "copy": torch._foreach_copy_,
    "zero": lambda first, _: torch._foreach_zero_(first),
}
lists = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.parametrize("name", FOR_LISTS)
@FOR_EACH_EXAMPLE
@given(lists)
def test_operators_of_lists(sim, name, lengths):
    first, second = ([torch.rand(length) + 1 for length in lengths] for _ in range(2))
    expected = FOR_LISTS[name](first, second)
    found = FOR_LISTS[name]([it.to("sim") for it in first], [it.to("sim") for it in second])
    assert all(same_bits(there.cpu(), host) for there, host in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", IN_PLACE)
@FOR_EACH_EXAMPLE
@given(lists)
def test_operators_of_lists_in_place(sim, name, lengths):
    first, second = ([torch.rand(length) + 1 for length in lengths] for _ in range(2))
    there = [it.to("sim") for it in first]
    IN_PLACE[name](there, [it.to("sim") for it in second])
    IN_PLACE[name](first, second)
    assert all(same_bits(found.cpu(), host) for found, host in zip(there, first, strict=True))
