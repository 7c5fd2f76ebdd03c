"""The groups that a `StreamMover` has: where they lie between calls, and what they take of the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field

from hookcore.memory.counting import Uncounted, count_changes, stop_counting
from hookcore.memory.device.flat_group import FlatGroup
from hookcore.memory.device.synchronous_mover import SynchronousMover
from hookcore.memory.grouping import Group, spanning_groups
from hookcore.memory.planning.budget_split import BudgetShare
from hookcore.memory.tensor_memory import current_tensors
from hookcore.storage import planned_nbytes

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Mapping

    from hookcore.memory.device.copy_engine import Transfer
    from hookcore.memory.mover import ComponentGroups
    from hookcore.memory.store import Store

_CPU = torch.device("cpu")
_NOTHING = FlatGroup(())


@define(eq=False)
class StreamedGroup:
    """A group and where it is.

    Attributes:
        weights: What moves, as a group for the plain mover.
        buffers: What always stays on the device.
        flat: What moves, side by side, from when the store has it until it is given back.
        uncounted: Of what moves, what was made in inference mode.
        in_use: Where it is while it is used, unless it stays or was brought by the plain mover.
        stays: Whether it stays on the device, in memory of its own.
        used: An event at the beginning of its use, if it stays and a timeline is recorded.
    """

    weights: Group
    buffers: Group
    flat: FlatGroup = _NOTHING
    uncounted: list[Uncounted] = field(factory=list)
    in_use: Transfer | None = None
    stays: bool = False
    used: Any = None


class StreamedGroups:
    """Groups whose weights lie in a store, and whose buffers stay on the device.

    Args:
        store: Where weights lie between calls.
        device: Where groups are used.
        prefetch: For how many groups ahead of use there is room, where there is no budget to fill.

    Attributes:
        store: As given.
        plain: Moves what is not streamed.
        groups: The groups that are streamed, or were until there was room for them.
        fixed: Bytes on the device that aren't copied for calls, by group.
        spanning: The groups that a call holds while others come and go, as `share` found them.
    """

    def __init__(self, store: Store, device: torch.device, prefetch: int) -> None:
        self.store = store
        self.plain = SynchronousMover(device, _CPU)
        self.groups: dict[Group, StreamedGroup] = {}
        self.fixed: dict[Group, int] = {}
        self.spanning: list[Group] = []
        self._device = device
        self._prefetch = prefetch
        self._expected: dict[str, ComponentGroups] = {}

    @property
    def what(self) -> str:
        """The components, for messages."""
        return ", ".join(filter(None, self._expected)) or "the model"

    def attach(self, group: Group, *, resident: bool) -> None:
        """Give a group's weights to the store, and its buffers to the device, as far as it hasn't yet."""
        if resident:
            self.plain.attach(group, resident=True)
            self.fixed[group] = group.nbytes
            return
        member = self.groups.get(group)
        if member is None:
            member = self.groups[group] = StreamedGroup(*group.divided(self.store.moves))
        self.fixed[group] = member.buffers.nbytes
        self.plain.attach(member.buffers, resident=True)
        if member.flat is _NOTHING:
            tensors = (it for slot in member.weights.slots for it in current_tensors(slot))
            member.uncounted += count_changes(tensors)
            member.flat = self.store.take(member.weights)
            member.stays = not member.flat.tensors

    def detach(self, group: Group) -> None:
        """Put a group back where it came from, as far as it isn't there."""
        member = self.groups.get(group)
        if member is None:
            self.plain.detach(group)
        else:
            if member.flat is not _NOTHING:
                self.store.give_back(member.flat)
                member.flat = _NOTHING
            stop_counting(member.uncounted)
            self.plain.detach(member.buffers)
            del self.groups[group]
        self.fixed.pop(group, None)

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """Return where the bytes of a group lie."""
        here = f"resident on {self._device}"
        if (member := self.groups.get(group)) is None:
            return self.plain.report(group, resident=resident)
        found = dict(self.store.report(member.flat, here if member.stays else None))
        if member.buffers.slots:
            found[here] = found.get(here, 0) + member.buffers.nbytes
        return found

    def keep_on_device(self, groups: Iterable[Group]) -> None:
        """Keep groups on the device, in memory of their own."""
        for group in groups:
            member = self.groups[group]
            member.stays = True  # so that it is taken anew if this fails
            self.store.keep_on(member.flat, self._device)

    @property
    def coming(self) -> list[Group]:
        """Those that don't stay."""
        return [group for group, member in self.groups.items() if not member.stays]

    @property
    def staying_bytes(self) -> int:
        """Bytes on the device that stay: groups, buffers, excluded modules."""
        return sum(self.fixed.values()) + sum(
            member.weights.nbytes for member in self.groups.values() if member.stays
        )

    # What they take of the device

    def expect(self, needed: ComponentGroups) -> None:
        """Record what a component needs."""
        self._expected[needed.component] = needed

    def share(self) -> BudgetShare[Group]:
        """Return what they need from now on; nothing stays as yet."""
        for member in self.groups.values():
            # It stays since other groups were there, or is wanted in another dtype than then.
            if member.flat.tensors and (member.stays or member.flat.is_outdated):
                member.flat = self.store.take_again(member.flat)
                member.stays = False
        sizes = {group: self.groups[group].flat.nbytes for group in self.coming}
        self.spanning = self._spanning(sizes)
        return BudgetShare(self.what, sizes, self.spanning, sum(self.fixed.values()), self._prefetch)

    def expected_share(self) -> BudgetShare[Group]:
        """Return what they will need, before anything is attached."""
        parts = {group: group.divided(self.store.moves) for group in self._expected_groups()}
        fixed = sum(planned_nbytes(buffers.slots) for _, buffers in parts.values())
        resident = [group for needed in self._expected.values() for group in needed.resident]
        fixed += sum(planned_nbytes(group.slots) for group in resident)
        sizes = {group: self.store.nbytes(mine) for group, (mine, _) in parts.items() if mine.slots}
        return BudgetShare(self.what, sizes, self._spanning(sizes), fixed, self._prefetch)

    def expected_staying_bytes(self, staying: Container[Group]) -> int:
        """Bytes of those of their groups that will stay."""
        stay = [group for group in self._expected_groups() if group in staying]
        return sum(self.store.nbytes(group.divided(self.store.moves)[0], stays=True) for group in stay)

    def _expected_groups(self) -> list[Group]:
        return [group for needed in self._expected.values() for group in needed.groups]

    def _spanning(self, passing: Collection[Group] | Mapping[Group, int]) -> list[Group]:
        """The groups that a call of any component holds while others of these come and go."""
        found: set[Group] = set()
        for needed in self._expected.values():
            home = {group: group for group in needed.groups} | dict(needed.aliases)
            groups = spanning_groups(group for group in home if home[group] in passing)
            found.update(home[group] for group in groups)
        return [group for group in passing if group in found]
