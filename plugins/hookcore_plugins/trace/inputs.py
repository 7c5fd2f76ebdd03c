"""What a call takes and gives, taken apart into tensors and the structure around them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hookcore import UnsupportedModelError

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable, Sequence

_CONSTANTS = (bool, int, float, str, type(None))


# Inputs


@frozen(eq=False)
class Inputs:
    """The arguments of a call.

    Attributes:
        tensors: Those in them, in order.
        others: What else there is; None where a tensor is.
        spec: The structure around them.
    """

    tensors: tuple[torch.Tensor, ...]
    others: tuple[Any, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Takes arguments apart.

        Whether one was given by position or by name makes no difference, nor whether a default was given.

        Raises:
            TypeError: They do not fit the signature.
        """
        leaves, spec = tree_flatten(_normalized(signature, args, kwargs))
        return cls(
            tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)),
            tuple(None if isinstance(leaf, torch.Tensor) else _Other(leaf) for leaf in leaves),
            spec,
        )

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the same structure with other tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if other is None else other.value for other in self.others]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return tuple(args), kwargs

    def difference(self, other: Inputs) -> str | None:
        """How others differ from these in what a trace relies on, or None."""
        if self.spec != other.spec or len(self.others) != len(other.others):
            return "its arguments are nested differently"
        for mine, theirs in zip(self.others, other.others, strict=True):
            if mine != theirs:
                return f"it has {_shown(theirs)} where the example has {_shown(mine)}"
        for expected, found in zip(self.tensors, other.tensors, strict=True):
            if (expected.shape, expected.dtype) != (found.shape, found.dtype):
                return f"it has {_described(found)} where the example has {_described(expected)}"
        return None

    def describe(self) -> list[str]:
        """What a trace relies on, as text."""
        tensors = iter(self.tensors)
        parts = [_described(next(tensors)) if other is None else _shown(other) for other in self.others]
        return [str(self.spec), *parts]


def _normalized(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, by name where that can be, in order, without those that are defaults anyway."""
    given = signature.bind(*args, **kwargs).arguments
    parameters = signature.parameters.values()
    by_position = any(it.kind is it.VAR_POSITIONAL and given.get(it.name) for it in parameters)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.name not in given:
            continue
        value = given[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            named |= value
        elif parameter.kind is parameter.POSITIONAL_ONLY or (
            by_position and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ):
            positional.append(value)
        elif _Other(value) != _Other(parameter.default):
            named[parameter.name] = value
    return tuple(positional), dict(sorted(named.items()))


class _Other:
    """An argument that is no tensor; equal to another of its type if their values are, or are one object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Other) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or (
            isinstance(self.value, (*_CONSTANTS, torch.dtype, torch.device)) and self.value == other.value
        )

    def __hash__(self) -> int:
        return hash(type(self.value))


def _described(tensor: torch.Tensor) -> str:
    return f"a tensor of {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _shown(other: _Other | None) -> str:
    return "a tensor" if other is None else repr(other.value)


# Outputs

Structure = tuple[Any, ...]
"""`(kind, class or value, children)`; children are pairs of a key and a structure."""


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Structure:
    """Describes an output, and adds the tensors in it to a list, in order.

    Raises:
        UnsupportedModelError: It holds something that could not be put together again.
    """
    kind = type(value)
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return "tensor", None, ()
    if kind in _CONSTANTS:
        return "value", value, ()
    if isinstance(value, Mapping):
        # The outputs of diffusers and transformers are dicts with a class of their own.
        return "mapping", kind, tuple((key, take_apart(item, tensors)) for key, item in value.items())
    if isinstance(value, tuple | list):
        how = "named" if hasattr(value, "_fields") else "sequence"
        return how, kind, tuple((None, take_apart(item, tensors)) for item in value)
    if hasattr(value, "__dict__") and not callable(value):  # such as the distribution of an autoencoder
        return "object", kind, tuple((key, take_apart(item, tensors)) for key, item in vars(value).items())
    raise UnsupportedModelError(f"its output holds a {kind.__qualname__}, which a trace cannot give back")


def put_together(structure: Structure, tensors: Sequence[torch.Tensor]) -> Any:
    """The value that was taken apart, with these tensors."""
    rest = iter(tensors)

    def build(part: Structure) -> Any:
        how, what, children = part
        if how == "tensor":
            return next(rest)
        if how == "value":
            return what
        items = [(key, build(child)) for key, child in children]
        if how == "mapping":
            return what(items) if what is dict else what(**dict(items))
        if how == "named":
            return what(*(item for _, item in items))
        if how == "sequence":
            return what(item for _, item in items)
        made = object.__new__(what)
        vars(made).update(items)
        return made

    return build(structure)


def with_classes(structure: Any, named: Callable[[Any], Any]) -> Any:
    """A structure in which each class is replaced by something else."""
    how, what, children = structure
    if how not in ("tensor", "value"):
        what = named(what)
    return [how, what, [[key, with_classes(child, named)] for key, child in children]]


def name_of(kind: type) -> str:
    """By which name a class can be found again."""
    return f"{kind.__module__}:{kind.__qualname__}"


def class_named(name: str) -> type:
    """The class of that name, of what is imported.

    Raises:
        LookupError: There is none.
    """
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise LookupError(name)  # noqa: TRY004 -- there is nothing of this name
    return found
