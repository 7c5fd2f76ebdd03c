"""The arguments of a call: their tensors, and whether a trace of one call fits another."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

if TYPE_CHECKING:
    import inspect
    from collections.abc import Iterator, Sequence

_COMPARED_BY_VALUE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_SHOWN = 100  # characters of a value in a message


@frozen(eq=False)
class Inputs:
    """The arguments of a call, by the names of the parameters, with their defaults.

    So it makes no difference whether an argument was given by position or by name, or equals its default.

    Attributes:
        signature: The parameters.
        arguments: The value of each parameter.
        leaves: What the values consist of.
        spec: The nesting around the leaves.
    """

    signature: inspect.Signature
    arguments: dict[str, Any]
    leaves: list[Any]
    spec: TreeSpec

    @classmethod
    def of(cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Assign arguments to parameters.

        Raises:
            TypeError: They do not fit the signature.
        """
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:  # whose order means nothing
                arguments[parameter.name] = dict(sorted(arguments[parameter.name].items()))
        return cls(signature, arguments, *tree_flatten(arguments))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors among the leaves, in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor))

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments with other tensors.

        Arguments are named where they can be and left out where they are defaults: code around a method often
        looks for some by name.
        """
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        arguments = tree_unflatten(leaves, self.spec)
        parameters = self.signature.parameters.values()
        by_position = any(it.kind is it.VAR_POSITIONAL and arguments[it.name] for it in parameters)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in parameters:
            value = arguments[parameter.name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += value
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= value
            elif parameter.kind is parameter.POSITIONAL_ONLY or (
                by_position and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ):
                args.append(value)
            elif not _is_default(value, parameter.default):
                kwargs[parameter.name] = value
        return tuple(args), kwargs

    def difference(self, other: Inputs) -> str | None:
        """Return the first way in which another call's arguments don't fit a trace of this call, or None."""
        if self.spec == other.spec and all(map(_fit, self.leaves, other.leaves)):
            return None
        found = (_mismatches(value, other.arguments[name], name) for name, value in self.arguments.items())
        return next(itertools.chain.from_iterable(found), "its arguments are nested differently")

    def describe(self) -> list[str]:
        """Return all that a trace relies on as text; the same for each form of a call."""
        leaves, spec = tree_flatten(self.with_tensors(self.tensors))
        return [str(spec), *map(_text, leaves)]


def _fit(expected: Any, found: Any) -> bool:
    """Return whether a trace made with one leaf can be used for another."""
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and (expected.shape, expected.dtype) == (
            found.shape,
            found.dtype,
        )
    return expected is found or (
        type(expected) is type(found) and isinstance(expected, _COMPARED_BY_VALUE) and expected == found
    )


def _mismatches(expected: Any, found: Any, place: str) -> Iterator[str]:
    """Yield how two values differ, in order, each with its place as Python would write it."""
    parts, found_parts = _parts(expected), _parts(found)
    if parts is None or found_parts is None or type(expected) is not type(found):
        if not _fit(expected, found):
            yield f"it has {_shown(found)} where the example has {_shown(expected)}, as {place}"
        return
    keys: Sequence[Any] = range(len(parts))
    if isinstance(expected, dict):
        keys = list(expected)
        yield from (f"it has no {place}[{key!r}]" for key in keys if key not in found)
        yield from (f"the example has no {place}[{key!r}]" for key in found if key not in expected)
        if keys != list(found):
            yield f"the keys of {place} are in another order than in the example"
    if len(parts) != len(found_parts):
        yield f"it has {len(found_parts)} items where the example has {len(parts)}, as {place}"
    for key, part, found_part in zip(keys, parts, found_parts, strict=False):
        yield from _mismatches(part, found_part, f"{place}[{key!r}]")


def _parts(value: Any) -> list[Any] | None:
    """Return the values directly inside a container; None for a leaf."""
    parts, spec = tree_flatten(value, is_leaf=lambda it: it is not value)
    return None if spec.is_leaf() else parts


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    has_tensors = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    return not has_tensors and not any(_mismatches(default, value, ""))


def _text(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"a tensor of {str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf)


def _shown(value: Any) -> str:
    parts = _parts(value)
    text = _text(value) if parts is None else f"a {type(value).__name__} of {len(parts)}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
