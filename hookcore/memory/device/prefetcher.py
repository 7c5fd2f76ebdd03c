"""Which groups of a mover are on the device, or on their way there, and what is copied next.

What is expected next is copied as long as there is room for it (see `order` and `slab`). What is needed and
isn't there, or isn't what it was when it was copied, is copied at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookcore.memory.device.stream_report import StreamReport
from hookcore.memory.planning.order_of_use import LearnedOrder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from hookcore.memory.device.copy_engine import CopyEngine, Transfer
    from hookcore.memory.device.device_pool import DevicePool
    from hookcore.memory.device.flat_group import FlatGroup
    from hookcore.memory.device.streamed_groups import StreamedGroup, StreamedGroups
    from hookcore.memory.grouping import Group

_AHEAD_OF_A_GUESS = 4  # groups; modules are often registered in another order than they run


class Prefetcher:
    """The copies of a mover's groups on the device.

    Args:
        members: The groups.
        pool: The memory on the device.
        most_ahead: How many groups may be copied ahead of use; None for as many as there is room for.

    Attributes:
        most_ahead: As given.
        counts: Of what is copied.
        ahead: Those that were copied ahead of use, in the order in which they are expected.
        kept: Those that are there to stay, until they are given up.
        order: The order of use.
    """

    def __init__(self, members: StreamedGroups, pool: DevicePool, most_ahead: int | None) -> None:
        self._members = members
        self._pool = pool
        self.most_ahead = most_ahead
        self.counts = StreamReport()
        self.ahead: dict[Group, Transfer] = {}
        self.kept: dict[Group, Transfer] = {}
        self.order: LearnedOrder[Group] = LearnedOrder(())
        self._reach = 0  # how many of what is expected next are there; 0 if that has to be found out

    @property
    def engine(self) -> CopyEngine:
        """What copies. There is one from the first call on."""
        if self._pool.engine is None:
            raise RuntimeError("groups can be moved during a call only")
        return self._pool.engine

    def get(self, group: Group) -> Transfer | None:
        """A group's copy, used or not."""
        return self.ahead.get(group) or self.kept.get(group)

    # Uses

    def bring(self, group: Group, member: StreamedGroup) -> Transfer | None:
        """The copy, which may be under way, of the values of a group that is used now; None without room.

        While gradients are recorded there is none, as no memory is used again.
        """
        if not self.order.note(group):
            self._drop_unexpected(group)
        elif self._reach:
            self._reach -= 1
        flat, needs_memory = member.flat, torch.is_grad_enabled()
        transfer = self.get(group)
        if transfer is not None:
            if flat.is_untouched(flat.addresses) and not needs_memory:
                self.ahead.pop(group, None)
                if transfer.is_new:
                    transfer.is_new = False
                    self.counts.hits += 1
                return transfer
            self.give_back(group, transfer)
        return None if needs_memory else self._bring_at_once(group, member)

    def _bring_at_once(self, group: Group, member: StreamedGroup) -> Transfer | None:
        """Begin to copy a group that is needed now; None if there is no room."""
        if not member.flat.is_home:  # somebody gave a tensor other data, as `weight.data = ...` does
            self.pack_again(member)
        transfer = self._make_room_for(member.flat)
        if transfer is not None:
            if member.flat in self.engine.allocator.kept:
                self.kept[group] = transfer
            self.engine.copy([transfer])
            self.count_demand(member.flat.nbytes)
            transfer.is_new = False
        return transfer

    def count_demand(self, nbytes: int) -> None:
        """Count a group that was copied only when it was needed."""
        counts = self.counts
        counts.on_demand += 1
        counts.copies += 1
        counts.moved_bytes += nbytes

    def pack_again(self, member: StreamedGroup) -> None:
        """Take the data over that tensors were given."""
        if member.flat.copied is not None:
            member.flat.copied.synchronize()
        self.engine.allocator.forget(member.flat)
        member.flat = self._members.store.take_again(member.flat)

    def _make_room_for(self, flat: FlatGroup) -> Transfer | None:
        """Find room for a group that is needed now; None if all else is in use."""
        transfer = self.engine.take(flat)
        if transfer is None:
            self._pool.drop_ahead()
            transfer = self.engine.take(flat)
        while transfer is None and self._pool.evict_one():
            transfer = self.engine.take(flat)
        return transfer

    # Ahead of use

    def prefetch(self, *, wraps: bool = True, is_guess: bool = False) -> bool:
        """Begin to copy what is used next, as far as there is room; return whether that was all of a pass.

        Args:
            wraps: Whether another pass like this one follows.
            is_guess: Whether it is not sure that this comes next.
        """
        transfers: list[Transfer] = []
        nbytes = 0
        engine, members = self.engine, self._members.groups
        order, ahead, kept = self.order, self.ahead, self.kept
        most = len(members) if self.most_ahead is None else self.most_ahead
        if is_guess or order.is_guess:
            most = min(most, _AHEAD_OF_A_GUESS)
        known = set() if self._reach else set(ahead)
        while (group := order.ahead(self._reach, wraps=wraps)) is not None:
            if group in known:
                known.remove(group)
            elif group not in kept:
                if group in ahead or len(ahead) >= most:
                    break
                member = members[group]
                transfer = None if member.in_use else engine.take(member.flat)
                if transfer is None:
                    break
                (kept if member.flat in engine.allocator.kept else ahead)[group] = transfer
                transfers.append(transfer)
                nbytes += member.flat.nbytes
            self._reach += 1
        if transfers:
            engine.copy(transfers)
            self.counts.copies += len(transfers)
            self.counts.moved_bytes += nbytes
        return group is None and not order.is_lost

    # Dropping

    def give_back(self, group: Group, transfer: Transfer) -> None:
        """Drop a group's copy, which nobody uses."""
        self.ahead.pop(group, None)
        self.kept.pop(group, None)
        self._reach = 0
        self.engine.give_back(transfer)

    def drop(self, groups: Iterable[Group]) -> None:
        """Drop the copies that there are of some groups."""
        for group in groups:
            transfer = self.get(group)
            if transfer is not None:
                self.give_back(group, transfer)

    def drop_ahead(self) -> None:
        """Drop what was copied ahead of use."""
        self.drop(list(self.ahead))

    def drop_all(self) -> None:
        """Drop all that is there, used or not."""
        self.drop([*self.ahead, *self.kept])

    def forget(self) -> list[Transfer]:
        """Forget all that is there, as the memory is given back; return what that was."""
        forgotten = [*self.ahead.values(), *self.kept.values()]
        self.ahead.clear()
        self.kept.clear()
        self._reach = 0
        return forgotten

    def evict(self, leaving: Collection[FlatGroup]) -> bool:
        """Drop what is kept of these groups, but for what is in use; return whether nothing is."""
        found = [group for group, transfer in self.kept.items() if transfer.flat in leaving]
        if any(self._members.groups[group].in_use for group in found):
            return False
        self.drop(found)
        return True

    def _drop_unexpected(self, used: Group) -> None:
        """Keep, of what was copied ahead, only what is still expected next."""
        expected = {used}
        distance = 0
        while (group := self.order.ahead(distance)) is not None and (
            group in self.kept or (group in self.ahead and group not in expected)
        ):
            expected.add(group)
            distance += 1
        self.drop(self.ahead.keys() - expected)
        self._reach = 0
