"""A technique on a component, planned or attached: the view that ordering, conflicts and tables share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hookcore.target import Component
    from hookcore.technique import Binding, Skipped, Technique


class Placed(Protocol):
    """One technique on one component: planned, or already attached."""

    @property
    def technique(self) -> Technique:
        """The technique."""

    @property
    def component(self) -> Component:
        """The component it is on."""

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """Its hooks."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What it leaves alone, and why."""

    @property
    def joint(self) -> object:
        """An object that those have in common that were bound jointly; None where it was bound alone."""


def share_modules(first: Component, second: Component) -> bool:
    """Return whether two components have a module or a tensor in common."""
    return first.module is second.module or not first.identities.isdisjoint(second.identities)
