"""Tensors in nested values: taken out in order, and put back into a copy of what they were in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def tensors_in(value: object) -> list[Tensor]:
    """The distinct tensors in a value, in order: in sequences, mappings, dataclasses and plain objects."""
    found: dict[int, Tensor] = {}
    _visit(value, lambda tensor: found.setdefault(id(tensor), tensor), {})
    return list(found.values())


def with_tensors(value: Any, replaced: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a value in which each tensor is replaced; what holds no tensor is taken over as it is."""
    return _visit(value, replaced, {})


def plain_values_in(value: object) -> list[object]:
    """Numbers, texts and None in a value, in order, the range of each sequence, the keys of each mapping."""
    found: list[object] = []
    _visit(value, lambda tensor: tensor, {}, found.append)
    return found


def _visit(
    value: Any,
    replaced: Callable[[Tensor], Tensor],
    seen: dict[int, Any],
    plain: Callable[[object], object] = bool,
) -> Any:
    if isinstance(value, Tensor):
        return replaced(value)
    if isinstance(value, _PLAIN):
        plain(value)
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = value  # what refers to itself refers to the original then
    if isinstance(value, list | tuple):
        plain(range(len(value)))
        items = [_visit(item, replaced, seen, plain) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        made = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    else:
        made = value
        if isinstance(value, Mapping):
            plain(tuple(value))
        for name, old, write in _members(value):
            new = _visit(old, replaced, seen, plain)
            if new is not old:
                made = copy.copy(value) if made is value else made
                write(made, name, new)
    seen[id(value)] = made
    return made


def _members(value: Any) -> Iterator[tuple[Any, Any, Callable[[Any, Any, Any], None]]]:
    """Return what a value is made of: name, content, and how a new one is written into a copy."""
    if isinstance(value, Mapping):
        # diffusers' and transformers' outputs are mappings that write their attributes along with the items.
        yield from ((key, item, _set_item) for key, item in list(value.items()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name), object.__setattr__
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        # Such as the distribution that an autoencoder's `encode` returns.
        yield from ((name, item, object.__setattr__) for name, item in list(vars(value).items()))


def _set_item(mapping: Any, key: Any, item: Any) -> None:
    mapping[key] = item
