"""Checks, when a plugin's class is made, that what it overrides exists and can be called."""

from __future__ import annotations

import inspect
from types import FunctionType, MemberDescriptorType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_Parameter = inspect.Parameter
_BY_POSITION = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)
_SHORTEST = 5  # letters of a name that others are compared with: "find" is no misspelt "bind"


def check_overrides(kind: type, base: type) -> None:
    """Refuse a subclass with a misspelt name, or with a method that cannot be called as its base's is.

    A name with an underscore in front is the subclass's own, and so is an annotated one that is no ClassVar,
    which is an option.

    Args:
        kind: The subclass.
        base: The class whose public names may be overridden.

    Raises:
        TypeError: Says which name or signature was found, and which one was expected.
    """
    where = f"{kind.__module__}.{kind.__qualname__}"
    for owner, name, found in _brought(kind, base):
        expected = vars(base).get(name)
        if isinstance(expected, FunctionType | classmethod) and not _can_be_called_as(expected, found):
            raise TypeError(
                f"hookcore cannot call {where}.{name}: found {_written(name, found)}, expected "
                f"{_written(name, expected)}"
            )
        if not hasattr(base, name) and not _is_option(owner, name, found):
            near = [it for it in vars(base) if it[0] != "_" and len(it) >= _SHORTEST and _is_slip(name, it)]
            if near:
                raise TypeError(
                    f"{where} has {name!r}, which hookcore does not use, expected {near[0]!r}. Rename it, or "
                    f"write _{name} if it is of the class's own"
                )


def _brought(kind: type, base: type) -> Iterator[tuple[type, str, Any]]:
    """The public attributes of a class, and of mixins that know nothing of the base, each with its owner."""
    for owner in kind.__mro__:
        if owner is kind or not (issubclass(owner, base) or issubclass(base, owner)):
            yield from ((owner, name, it) for name, it in vars(owner).items() if name[0] != "_")


def _is_slip(name: str, other: str) -> bool:
    """Return whether two names differ by one letter left out, added or changed, or by two swapped.

    Case and underscores do not count.
    """
    first, second = (it.replace("_", "").lower() for it in (name, other))
    while first and second and first[0] == second[0]:
        first, second = first[1:], second[1:]
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    return (len(first) <= 1 and len(second) <= 1) or (len(first) == 2 and first == second[::-1])


def _is_option(owner: type, name: str, found: object) -> bool:
    annotation = vars(owner).get("__annotations__", {}).get(name)
    is_annotated = annotation is not None and "ClassVar" not in str(annotation)
    return is_annotated or isinstance(found, MemberDescriptorType)


def _can_be_called_as(expected: FunctionType | classmethod[Any, Any, Any], found: object) -> bool:
    """Return whether a method takes the positional arguments that the base's does."""
    wanted = inspect.signature(_function(expected)).parameters.values()
    function = _function(found)
    if not callable(function) or (isinstance(expected, classmethod) and isinstance(found, FunctionType)):
        return False
    own = 0 if isinstance(found, staticmethod) else 1  # self, or the class
    count = sum(it.kind in _BY_POSITION for it in wanted) - 1 + own
    parameters = inspect.signature(function).parameters.values()
    named = [it for it in parameters if it.kind in _BY_POSITION]
    kinds = {it.kind for it in parameters}
    passes_on = len(named) <= own and _Parameter.VAR_POSITIONAL in kinds
    if any(it.kind is _Parameter.VAR_POSITIONAL for it in wanted):
        return passes_on or len(named) >= count  # what comes after is the call's own
    if any(it.kind is it.KEYWORD_ONLY and it.default is it.empty for it in parameters):
        return False
    needed = [it for it in named if it.default is it.empty]
    return passes_on or len(needed) <= count <= len(named)


def _function(found: Any) -> Any:
    return found.__func__ if isinstance(found, staticmethod | classmethod) else found


def _written(name: str, found: object) -> str:
    """A method for people: its parameters without their types."""
    function = _function(found)
    if not callable(function):
        return f"{name} = {function!r}"
    parameters = inspect.signature(function).parameters.values()
    decorator = "" if function is found else f"@{type(found).__name__} "
    return f"{decorator}{name}{inspect.Signature([it.replace(annotation=it.empty) for it in parameters])}"
