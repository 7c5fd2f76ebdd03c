"""Groups copied ahead of use, on a stream of their own, into device memory that is allocated once.

Weights lie in a store (see `store`), which is host memory or files, and are never copied back. The order of
use is learned; whatever is expected next is copied as soon as there is room for it (see `prefetcher`).

Once a pass has shown the order and the times of use, the memory that streaming doesn't need goes to groups
that stay (see `layout`). Of a component that has the memory for itself, these have their home on the device
from then on. Several components have it in turn (see `room`): what stays of one can be given up for another.

Streaming weights for each pass is FlexGen's idea (Sheng et al., 2023), prefetching them in a learned order
FSDP's and DeepSpeed ZeRO-Infinity's (Rajbhandari et al., 2021).
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import torch
from attrs import evolve

from hookcore.memory.device.device_pool import DevicePool, with_index
from hookcore.memory.device.prefetcher import Prefetcher
from hookcore.memory.device.stream_report import StreamReport
from hookcore.memory.device.streamed_groups import StreamedGroups
from hookcore.memory.device.timeline import Recorder
from hookcore.memory.mover import GroupMover
from hookcore.memory.planning.order_of_use import LearnedOrder
from hookcore.memory.planning.pool_layout import choose_layout
from hookcore.memory.store import PinnedStore, Store

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from hookcore.memory.device.copy_engine import CopyEngine, Transfer
    from hookcore.memory.device.flat_group import FlatGroup
    from hookcore.memory.device.pass_times import PassTimes
    from hookcore.memory.device.streamed_groups import StreamedGroup
    from hookcore.memory.device.timeline import Timeline
    from hookcore.memory.grouping import Group
    from hookcore.memory.mover import ComponentGroups
    from hookcore.memory.planning.budget_split import BudgetShare
    from hookcore.memory.planning.schedule import Use


def has_streams(device: torch.device) -> bool:
    """Return whether a device runs copies and computing side by side, and lets one wait for the other."""
    if device.type in ("cpu", "meta"):
        return False
    module = torch.get_device_module(device)
    return all(hasattr(module, name) for name in ("Stream", "Event", "current_stream", "stream"))


class StreamMover(GroupMover):
    """Streams groups from a store to a device that has streams.

    Buffers stay on the device, where calls may change them, but for weights of quantized layers; so do
    groups that are held while others come and go. While gradients are recorded, nothing is copied ahead and
    no memory is used again: autograd keeps what it needs.

    Args:
        onload_device: Where groups are used.
        budget: Bytes of the device that all weights may take; None for as little as the prefetch needs.
        prefetch: For how many groups ahead of use there is room, where there is no budget to fill.
        lock_limit: Bytes of host memory that may be locked; None for a share of what is free.
        store: Where parameters lie between calls; None for host memory that is locked within that limit.
        most_ahead: How many groups may be copied ahead of use; None for as many as there is room for.
        per_group: Whether memory is there only while a group is; it is anyway where there is room for few.
        pool: The memory, with a budget of its own, that it has in turn with others; None for one of its own.

    Attributes:
        number: Its number in the pool.
        per_group: As given.
        allowed_ahead: `most_ahead`, as given.
        recorder: Times what it does; None for nothing.
        transfers: What is on the device, or on its way there.
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
        per_group: bool = False,
        pool: DevicePool | None = None,
    ) -> None:
        self._device = with_index(onload_device)
        self._pool = DevicePool(self._device, budget) if pool is None else pool
        self._own = StreamedGroups(
            PinnedStore(self._device, lock_limit) if store is None else store, self._device, prefetch
        )
        self.number = self._pool.number()
        self.allowed_ahead = most_ahead
        self.per_group = per_group
        self.recorder: Recorder | None = None
        self.prefetcher = Prefetcher(self._own, self._pool, most_ahead)
        self._exposed: set[Group] = set()
        self._times: PassTimes | None = None
        self._is_divided = False  # by what they showed, where the memory is its own
        self._is_trained = False

    def __del__(self) -> None:
        # A model that goes away with its hooks on: copies to memory that goes with it may still be under way.
        # As the interpreter ends, torch aborts where it is asked to wait, and the process takes all with it.
        engine = self._pool.engine
        if engine is not None and not sys.is_finalizing():
            engine.synchronize()
            for group, member in self._own.groups.items():
                transfer = self.prefetcher.get(group) or member.in_use
                engine.allocator.leave(member.flat, None if transfer is None else transfer.place)

    # Between calls

    def attach(self, group: Group, *, resident: bool) -> None:
        """Give a group's weights to the store, and its buffers to the device."""
        self._dissolve()
        self._own.attach(group, resident=resident)
        self._pool.register(self)

    def detach(self, group: Group) -> None:
        """Put a group back where it came from."""
        self._dissolve()
        self._own.detach(group)
        if not self._own.fixed:
            self._pool.unregister(self)

    def _dissolve(self) -> None:
        """Give the memory on the device back, since what it is for changes."""
        self._pool.dissolve()
        if self._pool.engine is not None:  # others are being called
            self._drop_all()

    def _drop_all(self) -> None:
        """Drop what is on the device of groups that come and go."""
        pool = self._pool
        if pool.is_sound:
            pool.is_sound = False
            self.prefetcher.drop_all()
            pool.is_sound = True
        else:
            pool.left += self.prefetcher.forget()

    def finalize(self, group: Group) -> None:
        """Finalize a group that was detached for good."""
        self._own.store.finalize(group.divided(self._own.store.moves)[0])

    def reset(self) -> None:
        """Forget the order of use and what was counted; all that others don't use is copied anew."""
        self.prefetcher.counts = StreamReport()
        self.prefetcher.order.forget()
        self._pool.forget()
        if self._pool.is_shared:
            self._times = None
        self._drop_all()

    def train(self) -> None:
        """Let no more groups get their home on the device."""
        self._is_trained = True

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """Return where the bytes of the group lie."""
        return self._own.report(group, resident=resident)

    def expect(self, needed: ComponentGroups) -> None:
        """Record what a component needs."""
        self._own.expect(needed)
        self._pool.expect(needed.component, self)

    def needs(self) -> dict[str, int]:
        """What the first call will allocate, said by the first of those in a pool: memory that stays or not.

        What autograd keeps comes besides, as does what is used outside of the calls that hold it.

        Raises:
            BudgetError: The budget is too small.
        """
        return self._pool.needs(self)

    def run_report(self) -> StreamReport:
        """Return what was counted since the last reset, with the bytes that are taken now."""
        resident, ring, staged = self._own.staying_bytes, 0, 0
        if (engine := self._pool.engine) is not None:
            kept = engine.allocator.kept
            resident += sum(it.flat.nbytes for it in self._own.groups.values() if it.flat in kept)
            if self._pool.last == self.number:
                ring = engine.allocator.allocated - sum(flat.nbytes for flat in kept)
                staged = 0 if engine.staging is None else engine.staging.nbytes
        return evolve(
            self.prefetcher.counts,
            resident_bytes=resident,
            ring_bytes=ring,
            locked_bytes=self._own.store.locked + staged,
        )

    @contextlib.contextmanager
    def recording(self, timeline: Timeline) -> Iterator[None]:
        """Time copies, uses and stalls until the end of the block."""
        recorder = self.recorder = Recorder(self._device)
        timeline.recorders.append(recorder)
        passes = self.prefetcher.counts.passes
        try:
            yield
        finally:
            self.recorder = None
            self._pool.stop_recording(recorder)
            recorder.close()
            counts = self.prefetcher.counts
            counts.timed_passes += counts.passes - passes
            counts.stalled_seconds = (counts.stalled_seconds or 0.0) + recorder.stalled

    def invalidate(self, group: Group) -> None:
        """Make a group's tensors safe to change: no copy reads them, and none has read them."""
        member = self._own.groups.get(group)
        if member is not None and not member.stays:
            self._own.store.check_readable(member.flat)
            if not self._pool.is_sound:
                self._pool.dissolve()
            if member.flat.copied is not None:
                member.flat.copied.synchronize()
                self._exposed.add(group)

    # Calls

    def begin(self) -> None:
        """Begin an outermost call.

        Raises:
            BudgetError: The budget is too small.
            CheckpointError: A file that weights are read from has changed.
            ConcurrentCallError: Another thread calls what shares memory on the device.
            torch.OutOfMemoryError: The device has less memory than the budget.
        """
        pool = self._pool
        self._verify()
        if self._own.store.is_outdated:
            self._dissolve()
        pool.enter(self)
        if pool.is_sound:
            pool.is_sound = False
            self._prefetch()
            pool.is_sound = True

    def end(self) -> None:
        """End an outermost call; what the next one needs first is copied meanwhile.

        Raises:
            CheckpointError: A file has changed, so that the call may have used wrong weights.
        """
        self.prefetcher.counts.passes += 1
        self.prefetcher.order.end_pass()
        self._pool.leave(self)
        self._verify()

    def onload(self, group: Group) -> None:
        """Put the group's values on the device, once its stream gets there."""
        member = self._own.groups.get(group)
        if member is None:
            self._own.plain.onload(group)
            self.prefetcher.count_demand(group.nbytes)
            return
        if member.stays:
            member.flat.bring_given(self._device)
            if self.recorder is not None:
                member.used = self._engine.mark()
            return
        pool = self._pool
        if pool.is_sound:
            pool.is_sound = False
            engine = self._engine
            asked = None if engine.marker is None else engine.mark()
            transfer = self.prefetcher.bring(group, member)
            if transfer is not None:
                transfer.asked = asked
                engine.wait_for(transfer)
                member.in_use = transfer  # before any of its tensors show it
                member.flat.show(transfer.place.views)
                if self.prefetcher.most_ahead:  # one less is ahead now
                    self._prefetch()
                pool.is_sound = True
                return
            pool.is_sound = True
        self._own.store.bring(member.flat, self._device)
        self.prefetcher.count_demand(member.flat.nbytes)

    def offload(self, group: Group) -> None:
        """Show host memory in the group's parameters again, and copy what is used next."""
        member = self._own.groups.get(group)
        if member is None:
            self._own.plain.offload(group)
            return
        transfer = member.in_use
        if transfer is None:
            if not member.stays:
                self._wait_unless_sound()
                self._own.store.drop(member.flat)
            elif member.used is not None:
                self._engine.used(member.flat, member.used)
                member.used = None
            return
        pool = self._pool
        if not pool.is_sound:
            self._leave_in_memory(member, transfer)
            return
        pool.is_sound = False
        flat, place = member.flat, transfer.place
        is_as_copied = flat.is_untouched(place.addresses)
        if is_as_copied:
            flat.show_host()
        else:
            flat.come_home(place.views, place.addresses)
        self._engine.leave(transfer)
        member.in_use = None
        if not is_as_copied and group in self.prefetcher.kept:
            self.prefetcher.give_back(group, transfer)
        del transfer, place  # memory of its own is free before more is allocated
        self._prefetch()
        pool.is_sound = True

    def _leave_in_memory(self, member: StreamedGroup, transfer: Transfer) -> None:
        """End a use of memory in which nothing is sure any more."""
        self._wait_unless_sound()
        member.flat.come_home(transfer.place.views, transfer.place.addresses)
        self._pool.left.append(transfer)
        member.in_use = None

    def _wait_unless_sound(self) -> None:
        """Wait for copies of which no event may tell, before what they read is changed."""
        engine = self._pool.engine
        if engine is not None and not self._pool.is_sound:
            engine.synchronize()

    # What the pool asks

    @property
    def what(self) -> str:
        """The components, for messages."""
        return self._own.what

    @property
    def store(self) -> Store:
        """Where parameters lie between calls."""
        return self._own.store

    @property
    def own(self) -> StreamedGroups:
        """Its groups."""
        return self._own

    @property
    def coming(self) -> list[FlatGroup]:
        """The groups that don't stay in memory of their own."""
        return [self._own.groups[group].flat for group in self._own.coming]

    @property
    def held(self) -> list[FlatGroup]:
        """Those that calls hold while others come and go."""
        found = (self._own.groups.get(group) for group in self._own.spanning)
        return [member.flat for member in found if member is not None and not member.stays]

    @property
    def largest(self) -> int:
        """Bytes of the largest group that comes and goes."""
        held = set(self.held)
        return max((flat.nbytes for flat in self.coming if flat not in held), default=0)

    @property
    def all_packed(self) -> list[FlatGroup]:
        """All groups, in an order that lasts until one is attached or detached."""
        return [member.flat for member in self._own.groups.values()]

    def move_in(
        self, staying: Collection[Group], share: BudgetShare[Group], *, lingers: bool, one_by_one: bool
    ) -> None:
        """Keep groups from the start; all others come and go in new memory.

        Args:
            staying: Groups that stay, of all movers.
            share: What it needs, as `own` said.
            lingers: Whether groups are dropped only when others are needed.
            one_by_one: Whether nothing is to be copied ahead.
        """
        mine = [group for group in share.sizes if group in staying]
        self._own.keep_on_device(mine)
        self.lingers = lingers
        self.prefetcher.most_ahead = 0 if one_by_one else self.allowed_ahead
        self.prefetcher.order = LearnedOrder([group for group in share.sizes if group not in staying])
        self._times = None
        self._is_divided = False

    def begin_measuring(self, engine: CopyEngine) -> bool:
        """Time this pass if there is a use for that, and none has been; return whether it does."""
        if self._times is not None or self._pool.budget is None or self.prefetcher.most_ahead == 0:
            return False
        if not self.largest:
            return False
        self.prefetcher.drop_all()  # so that all is copied in this pass
        engine.measure()
        self._times = engine.times
        return True

    def end_measuring(self, engine: CopyEngine) -> None:
        """End a pass."""
        if self._times is None:
            return
        self._times.end_pass()
        if engine.times is self._times:
            engine.times = None
            if not self._times.passes:  # nothing was used
                self._times = None

    @property
    def is_measured(self) -> bool:
        """Whether it is known how long a pass took."""
        return self._times is not None and self._times.is_known

    def measured_uses(self) -> list[Use[FlatGroup]]:
        """Return what was measured of groups that come and go."""
        held = set(self.held)
        return [] if self._times is None else self._times.uses({it for it in self.coming if it not in held})

    def learn_layout(self) -> None:
        """Divide memory that it has for itself by what the first pass has shown."""
        if self._is_divided or self._is_trained or not self.is_measured:
            return
        self._is_divided = True
        self.prefetcher.drop_ahead()
        for member in self._own.groups.values():
            if not member.stays and not member.flat.is_home:
                self.prefetcher.pack_again(member)
        passing = {self._own.groups[group].flat: group for group in self._own.coming}
        uses = self.measured_uses()
        unseen = passing.keys() - {use.group for use in uses}
        pool, least = self._engine.allocator.size, max((it.nbytes for it in unseen), default=0)
        layout = choose_layout(
            uses, pool, least, ahead=self.prefetcher.most_ahead, anywhere=self._engine.allocator.is_shared
        )
        if layout is not None and (layout.resident or layout.large):
            self._engine.replace_allocator(0)
            self._own.keep_on_device([passing[flat] for flat in layout.resident])
            ring = pool - sum(flat.nbytes for flat in layout.resident)
            self._engine.replace_allocator(ring, layout.large)
            self.prefetcher.order.leave_out({passing[flat] for flat in layout.resident})

    def discard(self) -> None:
        """Leave all groups in the store only, and give back all memory on the device."""
        for member in self._own.groups.values():
            if member.in_use is not None:
                self._leave_in_memory(member, member.in_use)
        self.prefetcher.forget()
        self._exposed.clear()

    def drop_exposed(self) -> None:
        """Drop what may be other than it is in its home by now."""
        self.prefetcher.drop(self._exposed)
        self._exposed.clear()

    # How it is done

    @property
    def _engine(self) -> CopyEngine:
        return self.prefetcher.engine

    def _verify(self) -> None:
        """Verify the store; if that fails, discard what was copied ahead."""
        try:
            self._own.store.verify()
        except BaseException:
            self._pool.is_sound = False
            raise

    def _prefetch(self) -> None:
        """Begin to copy what is used next, as far as there is room."""
        if torch.is_grad_enabled():
            return
        if not self._pool.is_shared:
            self.prefetcher.prefetch()
            return
        following, is_sure = self._pool.following(self), self._pool.is_sure
        at_end = self.prefetcher.prefetch(wraps=is_sure and following is self)
        if at_end and following is not None and not (is_sure and following is self):
            following.prefetcher.prefetch(wraps=following is self, is_guess=not is_sure)
