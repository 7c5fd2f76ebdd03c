"""Techniques that stand beside the tested one: one that watches, one that raises, one that conflicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch

import hookcore
from hookcore.hook import Hook
from hookcore.technique import Binding, Claim, Phase, Technique
from hookcore.testing.promises.base import REFUSALS, SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from hookcore.target import Component
    from hookcore.testing.cases import ModelCase

ENTRIES = ("forward", "encode", "decode")


def entries_of(module: nn.Module) -> Iterator[str]:
    """The entries that a module has."""
    return (entry for entry in ENTRIES if callable(getattr(module, entry, None)))


# Watching


class _RecordingHook(Hook):
    """Writes down where it was called, and has something to prepare, which must be undone in order."""

    def __init__(self, calls: set[str], where: str) -> None:
        self._calls = calls
        self._where = where
        self._attribute = f"_recorded at {where}"

    def attach(self, module: nn.Module) -> None:
        module.__dict__[self._attribute] = self

    def detach(self, module: nn.Module) -> None:
        del module.__dict__[self._attribute]

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.add(self._where)


def make_recording(in_phase: Phase) -> Callable[[set[str]], Technique]:
    """Make a technique class that hooks every entry of every module, at a phase."""

    @attrs.frozen
    class Recording(Technique):
        name: ClassVar[str] = "contract_recording"
        phase: ClassVar[Phase] = in_phase

        calls: set[str] = attrs.field(eq=False)

        def bind(self, component: Component) -> Iterator[Binding]:
            for fqn, module in component.modules.items():
                for entry in entries_of(module):
                    yield Binding(fqn, _RecordingHook(self.calls, f"{fqn}.{entry}"), entry)

    return Recording


def calls_of(
    case: ModelCase, model: nn.Module, make: Callable[[set[str]], Technique], device: str
) -> set[str]:
    """Return where hooks are called in a model that has no other technique."""
    calls: set[str] = set()
    hookcore.apply(model, [make(calls)])
    with torch.no_grad():
        for entry in case.entries:
            case.call(model, entry, SEED, device=device)
    return calls


# Raising


class DeliberateError(Exception):
    """Raised inside a forward to see what happens."""


class _RaisingHook(Hook):
    def __init__(self, error: DeliberateError) -> None:
        self._error = error

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise self._error


@attrs.frozen
class Raising(Technique):
    """Raises in the innermost place: inside of all hooks of a module, as if its forward did.

    Attributes:
        fqn: At which module.
        error: What it raises.
    """

    name: ClassVar[str] = "contract_raising"
    phase: ClassVar[Phase] = Phase.COMPUTE

    fqn: str
    error: DeliberateError = attrs.field(eq=False)

    def bind(self, component: Component) -> Iterator[Binding]:
        """List one hook for each entry of the module."""
        for entry in entries_of(component.modules[self.fqn]):
            yield Binding(self.fqn, _RaisingHook(self.error), entry)


# Conflicting


def make_rival(technique: Technique, model: nn.Module, *, claims: bool) -> Technique | None:
    """Make a technique that cannot be on the model beside the given one; None if there is nothing to hook.

    Args:
        technique: The other.
        model: The model.
        claims: Whether it conflicts because it claims the same, where the other claims anything, and not
            because it says that it does.
    """
    try:
        (step,) = hookcore.plan(model, [technique]).steps
    except REFUSALS:
        return None
    if not step.bindings:
        return None
    wanted: list[tuple[str, str, tuple[Claim, ...]]] = [
        (item.fqn, item.entry, item.claims if claims else ()) for item in step.bindings
    ]
    says_so = not any(claimed for _, _, claimed in wanted)

    @attrs.frozen
    class Rival(Technique):
        name: ClassVar[str] = "contract_rival"
        phase: ClassVar[Phase] = Phase.COMPUTE
        incompatible_with: ClassVar[tuple[str, ...]] = (technique.name,) if says_so else ()

        def bind(self, component: Component) -> Iterator[Binding]:
            for fqn, entry, claimed in wanted:
                yield Binding(fqn, Hook(), entry, claimed)

    return Rival()
