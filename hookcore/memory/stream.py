"""Groups copied ahead of use, on a stream of their own, into device memory that is allocated once.

Weights lie in a store (see `store`), which is host memory or files, and are never copied back. The order of
use is learned; whatever is expected next is copied as soon as there is room for it (see `engine`).

Once a pass has shown the order and the times of use, the memory that streaming doesn't need goes to groups
that stay (see `schedule`). These have their home on the device from then on.

Streaming weights for each pass is FlexGen's idea (Sheng et al., 2023), prefetching them in a learned order
FSDP's and DeepSpeed ZeRO-Infinity's (Rajbhandari et al., 2021).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve

from hookcore.memory.allotment import Allotment, allot
from hookcore.memory.budget import largest_held
from hookcore.memory.counts import StreamReport
from hookcore.memory.device import DeviceMover
from hookcore.memory.grouping import Group, spanning_groups
from hookcore.memory.layout import choose_layout
from hookcore.memory.mover import GroupMover
from hookcore.memory.order import LearnedOrder
from hookcore.memory.store import MemoryStore, Store
from hookcore.memory.timeline import Recorder

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping

    from hookcore.memory.engine import CopyEngine, Load
    from hookcore.memory.mover import Needed
    from hookcore.memory.packed import Packed
    from hookcore.memory.timeline import Timeline
    from hookcore.memory.timing import PassTimes

_CPU = torch.device("cpu")
_AHEAD_OF_A_GUESS = 4  # groups; modules are often registered in another order than they run


def has_streams(device: torch.device) -> bool:
    """Whether a device runs copies and computing side by side, and lets one wait for the other."""
    if device.type in ("cpu", "meta"):
        return False
    module = torch.get_device_module(device)
    return all(hasattr(module, name) for name in ("Stream", "Event", "current_stream", "stream"))


@define(eq=False)
class _Member:
    """A group and where it is.

    Attributes:
        parameters: Its parameters, as a group for the plain mover.
        buffers: Its buffers, which always stay on the device.
        packed: Its parameters.
        in_use: Where it is while it is used, unless it stays or was brought by the plain mover.
        stays: Whether it stays on the device, in memory of its own.
        used: An event at the beginning of its use, if it stays and a timeline is recorded.
    """

    parameters: Group
    buffers: Group
    packed: Packed
    in_use: Load | None = None
    stays: bool = False
    used: Any = None


class StreamMover(GroupMover):
    """Streams groups from a store to a device that has streams.

    Buffers stay on the device, where calls may change them; so do groups that are held while others come and
    go. While gradients are recorded, nothing is copied ahead and no memory is used again: autograd keeps what
    it needs.

    Args:
        onload_device: Where groups are used.
        budget: Bytes of the device that all weights may take; None for as little as the prefetch needs.
        prefetch: For how many groups ahead of use there is room, where there is no budget to fill.
        lock_limit: Bytes of host memory that may be locked; None for a share of what is free.
        store: Where parameters lie between calls; None for host memory that is locked within that limit.
        most_ahead: How many groups may be copied ahead of use; None for as many as there is room for.
        in_pieces: Whether memory is there only while a group is; it is anyway where there is room for hardly
            two.
    """

    def __init__(
        self,
        onload_device: torch.device,
        budget: int | None = None,
        prefetch: int = 1,
        *,
        lock_limit: int | None = None,
        store: Store | None = None,
        most_ahead: int | None = None,
        in_pieces: bool = False,
    ) -> None:
        index = onload_device.index
        if index is None:
            index = torch.get_device_module(onload_device).current_device()
        self._device = torch.device(onload_device.type, index)
        self._budget = budget
        self._prefetched = prefetch
        self._store = MemoryStore(self._device, lock_limit) if store is None else store
        self._allowed_ahead = self._most_ahead = most_ahead
        self._in_pieces = in_pieces
        self._plain = DeviceMover(self._device, _CPU)
        self._members: dict[Group, _Member] = {}
        self._fixed: dict[Group, int] = {}  # bytes on the device that the engine does not manage
        self._order: LearnedOrder[Group] = LearnedOrder(())
        self._ahead: dict[Group, Load] = {}
        self._set_up: CopyEngine | None = None  # by the first call
        self._expected: dict[str, Needed] = {}
        self._counts = StreamReport()
        self._recorder: Recorder | None = None

    def __del__(self) -> None:
        # A model that goes away with its hooks on: copies to memory that goes with it may still be under way.
        if self._set_up is not None:
            with contextlib.suppress(Exception):  # as the interpreter ends, there may be no device any more
                self._set_up.synchronize()

    # Between calls

    def attach(self, group: Group, *, resident: bool) -> None:
        """Gives a group's parameters to the store, and its buffers to the device."""
        self._dissolve()
        if resident or group.is_inference:
            self._plain.attach(group, resident=resident)
            self._fixed[group] = group.nbytes if resident else 0
            return
        parameters, buffers = group.divided()
        self._plain.attach(buffers, resident=True)
        try:
            packed = self._store.take(parameters)
        except BaseException:
            self._plain.detach(buffers)
            raise
        self._fixed[group] = buffers.nbytes
        self._members[group] = _Member(parameters, buffers, packed, stays=not packed.tensors)

    def detach(self, group: Group) -> None:
        """Puts a group back where it came from."""
        self._dissolve()
        member = self._members.get(group)
        if member is None:
            self._plain.detach(group)
        else:
            self._store.give_back(member.packed)
            self._plain.detach(member.buffers)
            del self._members[group]
        del self._fixed[group]

    def _dissolve(self) -> None:
        """Gives the memory on the device back, since what it is for changes."""
        if self._set_up is not None:
            self._set_up.synchronize()
            self._drop_ahead()
            self._set_up = None

    def settle(self, group: Group) -> None:
        """Is told that the group was detached for good."""
        self._store.settle(group.divided()[0])

    def reset(self) -> None:
        """Forgets the order of use, what was copied ahead, and what was counted."""
        self._counts = StreamReport()
        self._order.forget()
        if self._set_up is not None:
            self._drop_ahead()

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """Where the bytes of the group lie."""
        here = f"resident on {self._device}"
        if (member := self._members.get(group)) is None:
            return self._plain.report(group, resident=resident)
        found = dict(self._store.report(member.packed, here if member.stays else None))
        if member.buffers.slots:
            found[here] = found.get(here, 0) + member.buffers.nbytes
        return found

    def expect(self, needed: Needed) -> None:
        """Takes down what a component needs."""
        self._expected[needed.component] = needed

    def needs(self) -> dict[str, int]:
        """What the first call will allocate: the ring, what stays, and buffers.

        What autograd keeps comes besides, as does what is used outside of the calls that hold it.

        Raises:
            BudgetError: The budget is too small.
        """
        groups = [group for needed in self._expected.values() for group in needed.groups]
        uncounted = {group: group.nbytes for group in groups if group.is_inference}
        parts = {group: group.divided() for group in groups if group not in uncounted}
        fixed = sum(buffers.nbytes for _, buffers in parts.values())
        fixed += sum(group.nbytes for needed in self._expected.values() for group in needed.resident)
        sizes = {group: self._store.nbytes(mine) for group, (mine, _) in parts.items() if mine.slots}
        allotment = self._allot(sizes, fixed)
        staying = sum(self._store.nbytes(parts[group][0], stays=True) for group in allotment.staying)
        return {str(self._device): fixed + staying + allotment.ring + largest_held(uncounted)[0]}

    def run_report(self) -> StreamReport:
        """What was counted since the last reset, with the bytes that are taken now."""
        engine = self._set_up
        staging = None if engine is None else engine.staging
        return evolve(
            self._counts,
            resident_bytes=sum(self._fixed.values())
            + sum(it.parameters.nbytes for it in self._members.values() if it.stays),
            ring_bytes=0 if engine is None else engine.slab.allocated,
            locked_bytes=self._store.locked + (0 if staging is None else staging.nbytes),
        )

    @contextlib.contextmanager
    def recording(self, timeline: Timeline) -> Iterator[None]:
        """Times copies, uses and stalls until the end of the block."""
        recorder = self._recorder = Recorder(self._device)
        timeline.recorders.append(recorder)
        passes = self._counts.passes
        try:
            if self._set_up is not None:
                self._set_up.timeline = recorder
            yield
        finally:
            self._recorder = None
            if self._set_up is not None:
                self._set_up.timeline = None
            recorder.close()
            self._counts.timed_passes += self._counts.passes - passes
            self._counts.stalled_seconds = (self._counts.stalled_seconds or 0.0) + recorder.stalled

    def expose(self, group: Group) -> None:
        """Sees to it that a group's tensors can be changed: no copy reads them, and none has read them."""
        member = self._members.get(group)
        if member is not None and member.packed.copied is not None and not member.stays:
            member.packed.copied.synchronize()
            if group in self._ahead:
                self._engine.give_back(self._ahead.pop(group))

    # Calls

    def begin(self) -> None:
        """Begins an outermost call.

        Raises:
            BudgetError: The budget is too small.
            CheckpointError: A file that weights are read from has changed.
            torch.OutOfMemoryError: The device has less memory than the budget.
        """
        self._verify()
        if self._store.is_outdated:
            self._dissolve()
        try:
            if self._set_up is None:
                self._set_up = self._make_engine()
            self._engine.begin()
            times = self._engine.times
            if times is not None and times.is_known:
                self._learn_layout(times)
        except BaseException:
            self._dissolve()
            raise
        self._prefetch()

    def end(self) -> None:
        """Ends an outermost call; what the next one needs first is copied meanwhile.

        Raises:
            CheckpointError: A file has changed, so that the call may have used wrong weights.
        """
        self._counts.passes += 1
        self._order.end_pass()
        if self._set_up is not None and self._set_up.times is not None:
            self._set_up.times.end_pass()
        self._verify()

    def onload(self, group: Group) -> None:
        """Has the group's parameters hold their values on the device, once its stream gets there."""
        member = self._members.get(group)
        if member is None:
            self._plain.onload(group)
            self._count_demand(group.nbytes)
            return
        if member.stays:
            member.packed.bring_given(self._device)
            if self._recorder is not None:
                member.used = self._engine.mark()
            return
        asked = self._engine.mark()
        if not self._order.note(group):
            self._drop_unexpected(group)
        load = self._load_of(group, member)
        if load is None:
            self._store.bring(member.packed, self._device)
            self._count_demand(member.packed.nbytes)
            return
        load.asked = asked
        try:
            self._engine.wait_for(load)
        except BaseException:  # reading its file failed
            self._engine.give_back(load)
            self._drop_ahead()
            raise
        member.packed.show(load.place.views)
        member.in_use = load
        if self._most_ahead:  # one less is ahead now
            self._prefetch()

    def offload(self, group: Group) -> None:
        """Has the group's parameters show host memory again, and copies what is used next."""
        member = self._members.get(group)
        if member is None:
            self._plain.offload(group)
            return
        load, member.in_use = member.in_use, None
        if load is None:
            if not member.stays:
                self._store.drop(member.packed)
            elif member.used is not None:
                self._engine.used(member.packed, member.used)
                member.used = None
            return
        self._end_use(member.packed, load)
        del load  # memory of its own is free before more is allocated
        self._prefetch()

    # How it is done

    def _end_use(self, packed: Packed, load: Load) -> None:
        place = load.place
        changed, replaced = packed.is_changed, packed.replaced(place.addresses)
        packed.show_host()
        if changed:
            packed.keep(place.views)
        for tensor, data in replaced:  # the call gave it other data, as `weight.data = ...` does
            tensor.data = data.to(_CPU)
        self._engine.leave(load)

    @property
    def _engine(self) -> CopyEngine:
        if self._set_up is None:
            raise RuntimeError("groups can be moved during a call only")
        return self._set_up

    def _make_engine(self) -> CopyEngine:
        """Allocates the memory on the device, and decides what stays from the start."""
        for member in self._members.values():
            # It stays since other groups were there, or is wanted in another dtype than then.
            if member.packed.tensors and (member.stays or member.packed.is_outdated):
                member.packed = self._store.take_again(member.packed)
                member.stays = False
        sizes = {group: member.packed.nbytes for group, member in self._members.items() if not member.stays}
        allotment = self._allot(sizes, sum(self._fixed.values()))
        self._keep_on_device(allotment.staying)
        coming = [member.packed for member in self._members.values() if not member.stays]
        in_pieces = self._in_pieces or allotment.in_pieces
        engine = self._store.make_engine(self._device, allotment.ring, coming, in_pieces=in_pieces)
        engine.timeline = self._recorder
        self.lingers = not in_pieces
        self._most_ahead = 0 if allotment.one_by_one else self._allowed_ahead
        self._order = LearnedOrder([group for group in sizes if group not in allotment.staying])
        if self._budget is not None and len(allotment.staying) < len(sizes) and self._most_ahead != 0:
            engine.measure()
        return engine

    def _allot(self, sizes: Mapping[Group, int], fixed: int) -> Allotment[Group]:
        return allot(
            sizes,
            [group for group in sizes if group in self._spanning(sizes)],
            fixed=fixed,
            budget=self._budget,
            prefetch=self._prefetched,
            device=self._device,
        )

    def _spanning(self, passing: Container[Group]) -> set[Group]:
        """The groups that a call of any component holds while others of these come and go."""
        found: set[Group] = set()
        for needed in self._expected.values():
            home = {group: group for group in needed.groups} | dict(needed.borrowed)
            groups = spanning_groups(group for group in home if home[group] in passing)
            found.update(home[group] for group in groups)
        return found

    def _learn_layout(self, times: PassTimes) -> None:
        """Divides memory by what the first pass has shown."""
        self._engine.times = None
        self._drop_ahead()
        for member in self._members.values():
            if not member.stays and not member.packed.is_home:
                self._pack_again(member)
        passing = {member.packed: group for group, member in self._members.items() if not member.stays}
        uses = [use for use in times.uses() if use.group in passing]
        unseen = passing.keys() - {use.group for use in uses}
        room, least = self._engine.slab.size, max((it.nbytes for it in unseen), default=0)
        layout = choose_layout(
            uses, room, least, ahead=self._most_ahead, anywhere=self._engine.slab.is_shared
        )
        if layout is not None and (layout.resident or layout.large):
            self._engine.replace_slab(0)
            self._keep_on_device([passing[packed] for packed in layout.resident])
            ring = room - sum(packed.nbytes for packed in layout.resident)
            self._engine.replace_slab(ring, layout.large)
            self._order.leave_out({passing[packed] for packed in layout.resident})

    def _keep_on_device(self, groups: Iterable[Group]) -> None:
        """Has groups stay on the device, in memory of their own."""
        for group in groups:
            member = self._members[group]
            self._store.keep_on(member.packed, self._device)
            member.stays = True

    def _verify(self) -> None:
        """Has the store look whether all is as it was; if not, what was copied ahead isn't used either."""
        try:
            self._store.verify()
        except BaseException:
            self._drop_ahead()
            raise

    def _load_of(self, group: Group, member: _Member) -> Load | None:
        """The copy of a group's values as they are now; None if the plain mover has to bring it."""
        load = self._ahead.pop(group, None)
        is_home = member.packed.is_home
        if load is not None and (torch.is_grad_enabled() or not is_home or member.packed.is_changed):
            self._engine.give_back(load)
            load = None
        if load is None and not torch.is_grad_enabled():
            if not is_home:  # somebody gave a tensor other data, as `weight.data = ...` does
                self._pack_again(member)
            load = self._engine.take(member.packed)
            if load is None:
                self._drop_ahead()
                load = self._engine.take(member.packed)
            if load is not None:
                self._engine.copy([load])
                self._count_demand(member.packed.nbytes)
        elif load is not None:
            self._counts.hits += 1
        return load

    def _count_demand(self, nbytes: int) -> None:
        counts = self._counts
        counts.on_demand += 1
        counts.copies += 1
        counts.moved_bytes += nbytes

    def _pack_again(self, member: _Member) -> None:
        """Takes the data over that tensors were given."""
        if member.packed.copied is not None:
            member.packed.copied.synchronize()
        self._engine.slab.forget(member.packed)
        member.packed = self._store.take_again(member.packed)

    def _prefetch(self) -> None:
        """Begins to copy what is used next, as far as there is room."""
        if torch.is_grad_enabled():
            return
        loads = []
        engine, order, ahead = self._engine, self._order, self._ahead
        most = _AHEAD_OF_A_GUESS if order.is_guess else len(self._members)
        if self._most_ahead is not None:
            most = min(most, self._most_ahead)
        while (group := order.ahead(len(ahead))) is not None and group not in ahead and len(ahead) < most:
            member = self._members[group]
            load = None if member.in_use else engine.take(member.packed)
            if load is None:
                break
            ahead[group] = load
            loads.append(load)
        if loads:
            engine.copy(loads)
            self._counts.copies += len(loads)
            self._counts.moved_bytes += sum(load.packed.nbytes for load in loads)

    def _drop_ahead(self) -> None:
        for load in self._ahead.values():
            self._engine.give_back(load)
        self._ahead.clear()

    def _drop_unexpected(self, used: Group) -> None:
        """Keeps, of what was copied ahead, only what is still expected next."""
        expected = {used}
        while (group := self._order.ahead(len(expected) - 1)) in self._ahead and group not in expected:
            expected.add(group)
        for group in self._ahead.keys() - expected:
            self._engine.give_back(self._ahead.pop(group))
