"""Components that one technique is put on together, some of whose weights may be the same.

Weights that several components use have one home, a group of the component that was bound first. The calls of
the others bring that group, too. All placements on components that share weights count who needs which group
in common, and have one mover.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookcore.errors import UnsupportedModelError
from hookcore.memory.grouping import Group, make_groups
from hookcore.memory.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from hookcore.memory.grouping import Unit
    from hookcore.memory.mover import GroupMover
    from hookcore.target import Component, TensorSlot


_CPU = torch.device("cpu")


class SharedWeights:
    """The placements of components that are bound jointly."""

    def __init__(self) -> None:
        self._placements: list[Placement] = []

    def place(
        self,
        component: Component,
        units: Sequence[Unit],
        moving: Collection[TensorSlot],
        *,
        resident: Sequence[Group],
        make_mover: Callable[[], GroupMover],
        onload_device: torch.device,
        exclude_kwargs: Collection[str] | None = None,
        offload_device: torch.device = _CPU,
    ) -> Placement:
        """Make a placement, which joins those on components that share weights with this one.

        Args:
            component: What is placed.
            units: Modules that move together.
            moving: The tensors that come and go.
            resident: The groups that stay on the onload device.
            make_mover: Makes what brings and drops groups, unless a component that shares weights has one.
            onload_device: Where the inputs of the outermost call are moved to.
            exclude_kwargs: Names of keyword inputs that are not moved; None for what its library says.
            offload_device: Where the weights lie between calls.

        Raises:
            UnsupportedModelError: A tensor is tied to one of another component in a way that is none there.
        """
        homes: dict[TensorSlot, Group] = {}
        joined: list[Placement] = []
        for other in self._placements:
            if found := _shared(component, other):
                homes |= found
                joined.append(other)
        groups = list(make_groups(component, units, [slot for slot in moving if slot not in homes]))
        aliases: dict[Group, Group] = {}
        for slot, home in homes.items():  # a group of its own for each, that stands for its home
            (alias,) = make_groups(component, units, [slot])
            stays = any(home in other.resident for other in joined)
            aliases[Group(alias.name, alias.slots, ()) if stays else alias] = home
        kept = [
            Group(group.name, slots, ())
            for group in resident
            if (slots := tuple(slot for slot in group.slots if slot not in homes))
        ]
        mover = joined[0].mover if joined else make_mover()
        made = Placement(
            component,
            groups,
            kept,
            mover,
            onload_device,
            aliases=aliases,
            exclude_kwargs=exclude_kwargs,
            offload_device=offload_device,
        )
        for other in joined:
            other.join(joined[0])
        if joined:
            made.join(joined[0])
        self._placements.append(made)
        return made


def _shared(component: Component, other: Placement) -> dict[TensorSlot, Group]:
    """The slots of a component whose tensors have their home in another placement, with their groups."""
    own = (*other.resident, *other.groups)
    group_of = {id(it): group for group in own for slot in group.slots for it in slot.tensors}
    homes: dict[TensorSlot, Group] = {}
    for slot in component.slots:
        found = {group_of.get(id(tensor)) for tensor in slot.tensors}
        if found == {None}:
            continue
        if len(found) > 1 or (home := found.pop()) is None:
            raise UnsupportedModelError(
                f"{component.label(slot.name)!r} is a weight of another component, too, but only here tied "
                "to a further one that shares its memory. Have all of them be one parameter"
            )
        homes[slot] = home
    return homes
