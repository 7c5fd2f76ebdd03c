"""Sizes, dtypes and devices as people write them: `"8GiB"`, `"bfloat16"`, `"cuda:1"`."""

from __future__ import annotations

import re
import reprlib
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b|b|)\s*", re.IGNORECASE)
_SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_FACTORS = {"": 1, "b": 1} | {
    f"{letter}{infix}b": base**power
    for power, letter in enumerate("kmgt", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}

_SHOWN = 200  # characters of a name
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _SHOWN
_REPR.maxlevel = 3


def parse_bytes(size: int | str) -> int:
    """Read a number of bytes.

    Args:
        size: Bytes as an int, or text with a unit: `"512MiB"` (1024-based), `"8GB"` (1000-based).

    Returns:
        The size in bytes, rounded down.

    Raises:
        ValueError: The text is no size, or the size is negative.
        TypeError: Neither an int nor a str.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"a size is an int (bytes) or a text such as '8GiB', not {size!r}")
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"a size cannot be negative: {size}")
        return size
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"{size!r} is no size: write bytes as a number, or '512MiB', '8GB', '1.5GiB'")
    number, unit = match.groups()
    return int(Fraction(number) * _FACTORS[unit.lower()])  # a float would make 2.3MB a byte less


def format_bytes(size: float) -> str:
    """Write a number of bytes for people: `"1.5 GiB"`, `"12 B"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Read a dtype: `torch.bfloat16`, `"bfloat16"` or `"torch.bfloat16"`.

    Raises:
        ValueError: No dtype of this torch has that name.
        TypeError: Neither a dtype nor a str.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str):
        raise TypeError(f"a dtype is a torch.dtype or its name, not {dtype!r}")
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(  # noqa: TRY004 - the type was right, the name is not
            f"torch {torch.__version__} has no dtype named {dtype!r}"
        )
    return found


def parse_device(device: torch.device | str | int) -> torch.device:
    """Read a device: a torch.device, `"cuda"`, `"cuda:1"`, or the index of an accelerator.

    Raises:
        ValueError: torch knows no such device, or it has no index on this machine.
        TypeError: None of these.
    """
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise TypeError(f"a device is a torch.device, its name or an index, not {device!r}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"torch cannot use {device!r} as a device: {error}") from error


def parse_onload_device(device: torch.device | str | int) -> torch.device:
    """Read a device that weights are moved to.

    Raises:
        ValueError: As `parse_device` would, or it holds no data, or this machine or build of torch lacks it.
        TypeError: As `parse_device` would.
    """
    parsed = parse_device(device)
    if parsed.type == "meta":
        raise ValueError(
            "weights cannot be moved to 'meta', which holds no data; name a device such as 'cuda'"
        )
    if parsed.type != "cpu":
        count = _count_devices(parsed.type)
        if (parsed.index or 0) >= count:
            raise ValueError(
                f"weights cannot be moved to {str(parsed)!r}: torch {torch.__version__} finds "
                f"{count or 'no'} {parsed.type!r} {'device' if count == 1 else 'devices'} here. Name another "
                "one, such as 'cpu', or install a build of torch for it"
            )
    return parsed


def _count_devices(kind: str) -> int:
    """Return how many devices of a kind there are, without beginning to use one."""
    try:
        module: Any = torch.get_device_module(kind)
    except RuntimeError:
        return 0
    if hasattr(module, "is_available") and not module.is_available():
        return 0
    return int(module.device_count()) if hasattr(module, "device_count") else 1


def parse_module_names(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Read an option `exclude_modules`: FQNs, or one FQN.

    Raises:
        TypeError: One of them is no text.
    """
    if names is None:
        return ()
    parsed = (names,) if isinstance(names, str) else tuple(names)
    for name in parsed:
        if not isinstance(name, str):
            raise TypeError(f"exclude_modules has {name!r}, expected FQNs of modules, such as 'blocks.0'")
    return parsed


def parse_kwarg_names(names: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Read an option `exclude_kwargs`: names of keyword inputs, or one name; None stays None.

    Raises:
        TypeError: One of them is no name that a call could use.
    """
    if names is None:
        return None
    parsed = (names,) if isinstance(names, str) else tuple(names)
    for name in parsed:
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(f"exclude_kwargs has {name!r}, expected names of keyword inputs, such as 'cache'")
    return parsed


def is_snake_case(name: object) -> bool:
    """Return whether something is a name such as `"group_offload"`."""
    return isinstance(name, str) and _SNAKE_CASE.fullmatch(name) is not None


def shortened(names: Sequence[str], shown: int = 5) -> str:
    """Write the first of many names for people: `"a, b, c and 7 more"`, or `"none"`."""
    more = len(names) - shown
    cut = [name if len(name) <= _SHOWN else name[: _SHOWN - 3] + "..." for name in names[:shown]]
    return ", ".join(cut) + (f" and {more} more" if more > 0 else "") or "none"


def shown(value: object) -> str:
    """Write a value that others chose for people: `repr`, cut where it is long or deeply nested."""
    return _REPR.repr(value)
