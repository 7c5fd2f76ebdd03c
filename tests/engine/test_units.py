"""Sizes, dtypes and devices as people write them."""

from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookcore import format_bytes, parse_bytes, parse_device, parse_dtype, parse_onload_device
from hookcore_plugins import DiskOffload, GroupOffload, ModelOffload, SequentialOffload

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def spelled(unit):
    return st.sampled_from([unit, unit.upper(), unit.title(), unit.upper().replace("I", "i")])


@given(
    st.decimals(0, 10**20, allow_nan=False, places=3),
    st.sampled_from(list(UNITS)).flatmap(lambda unit: st.tuples(st.just(unit), spelled(unit))),
    st.sampled_from(["", " ", "  "]),
)
def test_every_size_is_exact_and_rounded_down(number, unit, space):
    unit, written = unit
    assert parse_bytes(f"{space}{number:f}{space}{written}{space}") == int(Fraction(number) * UNITS[unit])


@given(st.integers(0, 2**70))
def test_bytes_are_taken_as_they_are(size):
    assert parse_bytes(size) == parse_bytes(str(size)) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e3", "1 000", "8 G B", "1.GB", ".5GB", "8GBs", "nan", "1,5GB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(
        ValueError, match="is no size: write bytes as a number, or '512MiB', '8GB', '1.5GiB'$"
    ):
        parse_bytes(text)


def test_sizes_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="^a size cannot be negative: -1$"):
        parse_bytes(-1)
    for wrong in (1.5, True, None, b"1GB"):
        with pytest.raises(TypeError, match=r"^a size is an int \(bytes\) or a text such as '8GiB', not "):
            parse_bytes(wrong)


@given(st.integers(0, 2**52))
def test_a_written_size_is_right_to_its_last_digit(size):
    text = format_bytes(size)
    number, unit = text.split()
    step = Decimal(1).scaleb(-len(number.partition(".")[2])) * UNITS[unit.lower()]
    assert abs(parse_bytes(text) - size) <= step / 2 + 1
    assert Decimal(number) <= 1024 or unit == "TiB"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (100 * 1024, "100 KiB"), (-2048, "-2.0 KiB"),
        (3 * 2**29, "1.5 GiB"), (2**50, "1024.0 TiB"), (0.5, "0 B"),
    ],
)  # fmt: skip
def test_sizes_are_written_for_people(size, text):
    assert format_bytes(size) == text


DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@given(st.sampled_from(sorted(DTYPES)))
def test_every_dtype_can_be_named(name):
    assert parse_dtype(name) is parse_dtype(f"torch.{name}") is parse_dtype(DTYPES[name]) is DTYPES[name]


@pytest.mark.parametrize("name", ["float7", "nn", "Tensor", ""])
def test_unknown_dtypes_are_refused(name):
    with pytest.raises(ValueError, match=rf"^torch .* has no dtype named '{name}'$"):
        parse_dtype(name)


def test_dtypes_of_other_kinds_are_refused():
    with pytest.raises(TypeError, match="^a dtype is a torch.dtype or its name, not 8$"):
        parse_dtype(8)


@given(st.sampled_from(["cpu", "meta", "cuda"]), st.none() | st.integers(0, 99))
def test_devices_can_be_named(kind, index):
    name = kind if index is None else f"{kind}:{index}"
    assert parse_device(name) == parse_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("wrong", ["gpu", "cuda:x", ""])
def test_unknown_devices_are_refused(wrong):
    with pytest.raises(ValueError, match=f"^torch cannot use '{wrong}' as a device: "):
        parse_device(wrong)


def test_devices_of_other_kinds_are_refused():
    for other in (True, None, 1.0):
        with pytest.raises(TypeError, match="^a device is a torch.device, its name or an index, not "):
            parse_device(other)


@pytest.mark.parametrize("technique", [GroupOffload, SequentialOffload, ModelOffload])
@pytest.mark.parametrize(("device", "found"), [("hip", "no 'hip' devices"), ("mtia:3", "no 'mtia' devices")])
def test_a_device_that_this_machine_lacks_is_refused_when_a_technique_is_made(technique, device, found):
    with pytest.raises(
        ValueError, match=f"^weights cannot be moved to '{device}': torch .* finds {found} here"
    ):
        technique(device)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5))
def test_an_index_that_no_device_has_is_refused(sim, index):
    count = torch.get_device_module("sim").device_count()
    if index < count:
        assert parse_onload_device(f"sim:{index}") == torch.device("sim", index)
    else:
        with pytest.raises(ValueError, match=f"to 'sim:{index}': torch .* finds {count} 'sim' devices here"):
            parse_onload_device(f"sim:{index}")


def test_a_build_without_a_device_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for made in (lambda: GroupOffload("cuda"), lambda: DiskOffload(execution_device="cuda")):
        with pytest.raises(
            ValueError, match="weights cannot be moved to 'cuda'.* finds no 'cuda' devices here"
        ):
            made()
