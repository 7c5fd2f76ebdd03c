"""The inputs of a component's outermost calls, moved to where it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import PackedSequence

if TYPE_CHECKING:
    from collections.abc import Collection

    from hookcore.target import Component


class InputMover:
    """Moves the inputs of calls, but for some keyword inputs.

    Args:
        component: What is called.
        device: Where it computes.
        exclude_kwargs: Names of keyword inputs that are not moved; None for what the model's library says.
    """

    def __init__(
        self, component: Component, device: torch.device, exclude_kwargs: Collection[str] | None = None
    ) -> None:
        self._device = device
        unmoved = component.conventions.unmoved_kwargs if exclude_kwargs is None else exclude_kwargs
        self._unmoved = frozenset(unmoved)

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move the inputs of one call."""
        device, unmoved = self._device, self._unmoved
        if unmoved.isdisjoint(kwargs):
            return _moved(args, device), _moved(kwargs, device)
        return _moved(args, device), {
            name: value if name in unmoved else _moved(value, device) for name, value in kwargs.items()
        }


def _moved(value: Any, device: torch.device) -> Any:
    """The value with all tensors in it on the device; a container in which none moves is the same object."""
    if isinstance(value, torch.Tensor | PackedSequence):
        return value.to(device)  # type: ignore[arg-type]  # PackedSequence is typed too narrowly
    if isinstance(value, list | tuple):
        items = [_moved(item, device) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        new = {key: _moved(item, device) for key, item in value.items()}
        return value if all(new[key] is value[key] for key in value) else type(value)(new)
    return value
