"""A model that can be built again and again and called: what tests of techniques run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Blueprint(Protocol):
    """What makes a model and the arguments to call it with."""

    @property
    def entries(self) -> tuple[str, ...]:
        """The methods that can be called, `"forward"` among them."""

    def make(self) -> nn.Module:
        """Build the model; draws weights from torch's global random state."""

    def make_inputs(self, entry: str, generator: torch.Generator) -> Arguments:
        """Make the positional and keyword arguments of one call of an entry, on the CPU."""


@frozen
class ModelCase:
    """A small model that can be built again and again, each time the same, and called.

    Attributes:
        blueprint: What to build.
        seed: Seeds the weights.
    """

    blueprint: Blueprint
    seed: int = 0

    @property
    def entries(self) -> tuple[str, ...]:
        """The methods that can be called, `"forward"` among them."""
        return self.blueprint.entries

    def build(self) -> nn.Module:
        """Return a fresh model, equal in every bit to those before; torch's random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.blueprint.make()

    def inputs(self, entry: str = "forward", seed: int = 0) -> Arguments:
        """Return fresh positional and keyword arguments on the CPU; the same for the same seed."""
        return self.blueprint.make_inputs(entry, torch.Generator().manual_seed(seed))

    def call(
        self,
        model: nn.Module,
        entry: str = "forward",
        seed: int = 0,
        *,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, ...]:
        """Call an entry of the model with `inputs(entry, seed)`, brought to a device.

        Gradient mode is the caller's. "forward" is called as `model(...)`, the others by their name.

        Returns:
            All tensors in the result, whatever it is wrapped in (see `tensors_in`).
        """
        args, kwargs = arguments_on(self.inputs(entry, seed), torch.device(device))
        method = model if entry == "forward" else getattr(model, entry)
        return tuple(tensors_in(method(*args, **kwargs)))


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in a result, in order: of a tensor, mapping, sequence, or object with attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__"):  # such as the distribution that AutoencoderKL.encode returns
        yield from tensors_in(vars(value))


def arguments_on(arguments: Arguments, device: torch.device) -> Arguments:
    """Arguments with all tensors in them on a device."""
    moved: Arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)
    return moved
