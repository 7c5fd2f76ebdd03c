"""The output of a call: its tensors, and the structure around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hookcore import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

Structure = tuple[Any, ...]
"""`(kind, class or value, children)`; children are pairs of a key and a structure."""

_CONSTANTS = (bool, int, float, str, type(None))


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Structure:
    """Return the structure of an output, and appends its tensors to a list, in order.

    Raises:
        UnsupportedModelError: The output holds an object that could not be put together again.
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
    """Return an output of a structure, with these tensors."""
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
