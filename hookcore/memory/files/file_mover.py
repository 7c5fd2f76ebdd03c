"""Streams groups of weights from the checkpoint that they came from. Nothing is ever written.

Between calls a streamed parameter shows the checkpoint's own tensor, mapped: it takes no memory and reads
true. For a call its group is brought in one of two ways, whichever is faster at that moment:

- what the system has cached is used where it lies: its pages are mapped ahead of use, and let go after it;
- what is not cached is read past the cache into memory of the stream's own, ahead of use.

Both ways a weight has the same address modulo the page size, so that kernels compute the same bits. The
idea of taking weights from a mapping is safetensors'; that of learning the order of use is FSDP's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookcore.errors import CheckpointError
from hookcore.memory.counting import Uncounted, count_changes, stop_counting
from hookcore.memory.files import file_weight as file_weights
from hookcore.memory.files.direct_reader import aligned_span
from hookcore.memory.files.file_group import FileGroup, Transfer, place_of
from hookcore.memory.files.file_range import drop, is_cached, was_written
from hookcore.memory.files.file_weight import FileWeight, is_as_stored
from hookcore.memory.files.page_arena import PageRange, rounded, separate_pages
from hookcore.memory.files.reader_threads import ReaderThreads
from hookcore.memory.mover import GroupMover
from hookcore.memory.planning.order_of_use import LearnedOrder
from hookcore.memory.planning.residency import largest_held

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from hookcore.memory.files.checkpoint import Checkpoint
    from hookcore.memory.files.host_pool import HostPool
    from hookcore.memory.files.origins_of_model import FileOrigins
    from hookcore.memory.grouping import Group
    from hookcore.memory.mover import ComponentGroups


class FileMover(GroupMover):
    """Brings groups from a checkpoint's files and lets them go again.

    What a user edits between calls is kept: a mapping copies the pages written, and these are never let go.
    A file that changes is found before its weights are used, and again when the outermost call ends.

    Several components have the memory in turn (see `host_pool`). What stays of one is shown to its parameters
    until it is given up for another.

    Args:
        groups: The groups that come and go, in the order in which they are probably used.
        origins: Where the values of each parameter lie, by slot.
        device: The execution device.
        pool: The memory, which several movers may have in turn.
        costs: Bytes of memory that each group takes, also the resident ones.
        what: The component, for messages.

    Attributes:
        number: Its number in the pool.
        costs: As given.
        whole: Bytes that all groups would take together.
        least: The most bytes that one call holds at once.
        where: The module where that is, and the component.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        origins: FileOrigins,
        device: torch.device,
        pool: HostPool,
        *,
        costs: Mapping[Group, int],
        what: str,
    ) -> None:
        self._pool = pool
        self._resident: dict[Group, Transfer] = {}
        self._in_use: dict[Group, Transfer] = {}
        self._ahead: dict[Group, Transfer] = {}
        self._kept: dict[Group, Transfer] = {}  # not in use, but there until they are given up
        self._to_stay: list[Group] = []  # residents that the next call brings
        self._to_keep: frozenset[Group] = frozenset()  # those that are kept after their next use
        self._origins = origins
        self._device = device
        self.number = pool.number()
        self.costs = costs
        self.whole = sum(costs.values())
        self.least, fqn = largest_held(costs)
        self.where = fqn, what
        self._order: LearnedOrder[Group] = LearnedOrder(groups)
        self._streamed: dict[Group, FileGroup] = {}
        self._uncounted: dict[Group, list[Uncounted]] = {}
        self._calls = 0
        self._is_running = False
        self._files: dict[Path, Checkpoint] = {}
        self._workers = ReaderThreads("hookcore-disk")

    def __del__(self) -> None:
        # A model that goes away with its hooks on. What is being read keeps it alive until that is done.
        transfers = (self._resident, self._in_use, self._ahead, self._kept)
        self._pool.leave_behind(
            pages for them in transfers for transfer in them.values() for pages in transfer.page_ranges
        )

    def expect(self, needed: ComponentGroups) -> None:
        """Tell the pool of the component."""
        self._pool.expect(needed.component, self)

    def attach(self, group: Group, *, resident: bool) -> None:
        """Show the checkpoint's tensors in the group's parameters; the next call reads a resident one.

        Raises:
            CheckpointError: A parameter in memory differs from the checkpoint.
        """
        if group in self._streamed:
            return  # what has been given back of it counts as given other data
        streamed = FileGroup([FileWeight.compare(slot, self._origins[slot]) for slot in group.slots])
        self._uncounted[group] = count_changes(it for slot in group.slots for it in slot.tensors)
        for weight in streamed.weights:
            weight.take_over()
            self._files[weight.origin.entry.path] = weight.origin.checkpoint
        self._origins.take(group.slots)
        self._streamed[group] = streamed
        if resident:
            self._to_stay.append(group)
        self._pool.register(self)

    @torch.inference_mode(False)  # what is made here outlives the mode
    def detach(self, group: Group) -> None:
        """Give each parameter back as it was found: in memory, or showing the checkpoint's tensor.

        Raises:
            CheckpointError: Values have to be read, and a file has changed.
            ConcurrentCallError: Another thread calls a component that shares the memory.
        """
        if group not in self._streamed:
            return  # it is back already, or never came
        with self._pool.changing():
            self._detach(group)

    def _detach(self, group: Group) -> None:
        weights = self._streamed[group].weights
        staying = self._kept if group in self._kept else self._resident
        transfer = staying.get(group)
        shown = []
        if transfer is not None:
            self._verify()
            transfer.keep_edits(compare=True)
            shown = [weight for weight, _, _ in transfer.shown]
        for weight in weights:
            if weight not in shown:
                weight.adopt()
        try:
            found = [weight.values_to_give_back() for weight in weights]
        except CheckpointError:
            self.discard_ahead()
            raise
        if transfer is not None:
            self._let_go(staying.pop(group))
        for weight, values in zip(weights, found, strict=True):
            weight.give_back(values)
        stop_counting(self._uncounted.pop(group))
        del self._streamed[group]
        if group in self._to_stay:
            self._to_stay.remove(group)
        if not self._streamed:
            self._close()
            self._pool.unregister(self)

    def finalize(self, group: Group) -> None:
        """Leave parameters in memory, or showing the checkpoint's tensor, after the last `detach`.

        Raises:
            CheckpointError: Values have to be converted, and a file has changed.
        """
        self._origins.finalize(group.slots)

    def needs(self) -> dict[str, int]:
        """As much memory as groups of all components may take, said by the first of them.

        Raises:
            BudgetError: The budget is too small.
        """
        nbytes = self._pool.needs(self)
        return {str(self._device): nbytes} if nbytes else {}

    def begin(self) -> None:
        """Begin an outermost call.

        Raises:
            CheckpointError: A file has changed.
            ConcurrentCallError: Another thread calls a component that shares the memory.
        """
        self._pool.enter(self)
        self._is_running = True
        self._calls += 1
        self._verify()
        for group in self._to_stay:
            self._start_ahead(group)
        while self._to_stay:
            group = self._to_stay[-1]
            self._resident[group] = self._bring(group, self._load_of(group))
            self._to_stay.pop()
        self.read_ahead()

    def end(self) -> None:
        """End an outermost call; what the next one needs first is read meanwhile.

        Raises:
            CheckpointError: A file has changed, so that the call may have used wrong weights.
        """
        if not self._is_running:
            return  # its begin was refused
        try:
            self._order.end_pass()
            following = self._pool.following(self)
            if following is not self:
                self.discard_ahead()
            self._pool.wait_for_leaving()
            self._verify()
            following.read_ahead()
        finally:
            self._is_running = False
            self._pool.leave()

    def onload(self, group: Group) -> None:
        """Put the group's values on the execution device, in the dtype wanted.

        Raises:
            CheckpointError: A file has changed, or cannot be read.
        """
        transfer = self._kept.pop(group, None)
        if transfer is not None and not transfer.is_replaced:
            self._in_use[group] = transfer
            self._order.note(group)
            return
        if transfer is not None:
            self._let_go(transfer)
        self._in_use[group] = self._bring(group, self._load_of(group))
        self._order.note(group)
        self.read_ahead()

    def offload(self, group: Group) -> None:
        """Show the checkpoint's tensors in the group's parameters again, unless it is to stay."""
        transfer = self._in_use.pop(group, None)
        if transfer is None:
            return
        if group in self._to_keep:
            self._kept[group] = transfer
        else:
            self._let_go(transfer)
            self.read_ahead()

    def reset(self) -> None:
        """Forget the order of use."""
        self._order.forget()
        self._pool.forget()

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """Return where the bytes of the group lie."""
        there = resident or group in self._kept
        return file_weights.report(
            self._streamed[group].weights, f"resident on {self._device}" if there else None
        )

    def invalidate(self, group: Group) -> None:
        """See to it that a group can be read: to read a mapping beyond its file's end would end the process.

        Raises:
            CheckpointError: A file is cut short.
        """
        for weight in self._streamed[group].weights:
            weight.check_readable()

    # What the pool asks

    @property
    def kept(self) -> dict[Group, int]:
        """The groups that are kept, and their bytes of memory."""
        return {group: self.costs[group] for group in self._kept}

    @property
    def ahead_bytes(self) -> int:
        """Bytes of memory of what was read ahead."""
        return sum(transfer.nbytes for transfer in self._ahead.values())

    def keep(self, groups: Collection[Group]) -> None:
        """Set which groups, of those of all components, stay from now on."""
        self._to_keep = frozenset(group for group in self.costs if group in groups)
        for group in [group for group in self._kept if group not in self._to_keep]:
            self._evict(group)

    def evict_one(self) -> bool:
        """Give up a group that is kept and not in use; False if there is none that can be."""
        return any(self._evict(group) for group in reversed(list(self._kept)))

    @torch.inference_mode(False)  # what was edited outlives the mode
    def _evict(self, group: Group) -> bool:
        transfer = self._kept[group]
        try:
            self._verify()
        except CheckpointError:
            return False  # nobody could tell what was edited; its next call says so
        transfer.keep_edits(compare=True)
        for weight, _, _ in transfer.shown:  # compared with the file
            weight.origin.mapping.drop(weight.origin.entry.offset, weight.origin.entry.nbytes)
        self._let_go(self._kept.pop(group))
        self._pool.wait_for_leaving()
        return True

    # How it is done

    def _bring(self, group: Group, transfer: Transfer) -> Transfer:
        """Wait for a transfer and shows it."""
        try:
            transfer.wait()
            if transfer.positions and transfer.during_call != self._calls and was_written(transfer.ranges):
                self._let_go(transfer)  # edited since it was read
                transfer = self._start(group)
                transfer.wait()
            for path in {it.mapping.path for it in transfer.ranges}:
                self._verify(path)
            self._show(group, transfer)
        except BaseException:
            self._let_go(transfer)
            raise
        return transfer

    @torch.inference_mode(False)  # as parameters take over from data whether it was made in the mode
    def _show(self, group: Group, transfer: Transfer) -> None:
        """Rebind the parameters of a group that is in memory."""
        copies = self._device.type != "cpu"
        weights = self._streamed[group].weights
        for weight in weights:
            weight.adopt()
            place = place_of(weight, transfer)
            data: list[torch.Tensor] = []
            made: dict[int, torch.Tensor] = {}  # tied objects go on sharing memory
            for home in weight.homes:
                if id(home) not in made:
                    value = place if home is weight.origin.raw else home
                    dtype = weight.origin.dtype if is_as_stored(home, weight.origin) else home.dtype
                    if copies or dtype != home.dtype:
                        value = self._converted(value, dtype, transfer)
                    made[id(home)] = value
                data.append(made[id(home)])
            if any(value is not home for value, home in zip(data, weight.homes, strict=True)):
                weight.show(data)
                transfer.shown.append((weight, data, weight.versions))
        if copies or all(weight.converts for weight in weights):
            self._release_read(transfer)

    def _converted(self, data: torch.Tensor, dtype: torch.dtype, transfer: Transfer) -> torch.Tensor:
        if self._device.type != "cpu" or not data.numel():
            return data.to(self._device, dtype, copy=True)
        nbytes = data.numel() * dtype.itemsize
        begin, transfer.converted_used = transfer.converted_used, transfer.converted_used + rounded(nbytes)
        if transfer.converted is None or transfer.converted_used > transfer.converted.nbytes:
            return data.to(dtype)  # it was given to the parameter since the group was measured
        target = transfer.converted.tensor[begin : begin + nbytes].view(dtype).view(data.shape)
        return target.copy_(data)

    @torch.inference_mode(False)
    def _let_go(self, transfer: Transfer) -> None:
        """Unbind a group and give back its memory."""
        if any(weight.versions != versions for weight, _, versions in transfer.shown):
            self._pool.wait_for_leaving()  # what is written must not be let go at that moment
        transfer.unbind()
        self._release_read(transfer)
        if transfer.converted is not None:
            self._pool.give_back(transfer.converted)
            transfer.converted = None

    def _release_read(self, transfer: Transfer) -> None:
        """Give back the memory of what was read, once it is not needed any more."""
        if transfer.read is not None:
            if transfer.positions or transfer.done.cancelled():
                self._pool.give_back(transfer.read)
            else:
                self._pool.give_back_after(self._workers.submit(drop, transfer.ranges), transfer.read)
            transfer.nbytes -= transfer.read.nbytes
        transfer.read = None
        transfer.positions.clear()
        transfer.ranges = ()

    def _load_of(self, group: Group) -> Transfer:
        """The transfer that was begun ahead, or one that begins now: also if what was begun has failed."""
        transfer = self._ahead.pop(group, None)
        if transfer is not None and transfer.done.done() and transfer.done.exception() is not None:
            self._let_go(transfer)
            transfer = None
        return self._start(group) if transfer is None else transfer

    def _start(self, group: Group) -> Transfer:
        """Start reading a group that is needed now, after making room for it."""
        streamed = self._streamed[group]
        sizes = (streamed.read_bytes, streamed.converted_bytes)
        while (page_ranges := self._pool.take(sizes)) is None:
            if self._ahead:
                self._discard()
            elif self._pool.is_leaving:
                self._pool.wait_for_leaving()
            elif not self._pool.evict_one():
                # What calls need at once, or what outputs still show, is more than the budget.
                page_ranges = [separate_pages(nbytes) if nbytes else None for nbytes in sizes]
                break
        return self._submit(streamed, page_ranges)

    def _start_ahead(self, group: Group) -> bool:
        """Start reading a group that is needed later, if there is room."""
        if group not in self._ahead:
            streamed = self._streamed[group]
            page_ranges = self._pool.take((streamed.read_bytes, streamed.converted_bytes))
            if page_ranges is None:
                return False
            self._ahead[group] = self._submit(streamed, page_ranges)
        return True

    def _submit(self, streamed: FileGroup, page_ranges: list[PageRange | None]) -> Transfer:
        read, converted = page_ranges
        transfer = Transfer(streamed.ranges, streamed.aligned, streamed.nbytes, self._calls, read, converted)
        transfer.done = self._workers.submit(self._fetch, transfer)
        return transfer

    def _discard(self) -> None:
        """Give up what was read farthest ahead."""
        _, transfer = self._ahead.popitem()
        if not transfer.done.cancel():
            transfer.done.exception()  # waits for it
        self._let_go(transfer)

    def discard_ahead(self) -> None:
        """Give up all that was read ahead."""
        while self._ahead:
            self._discard()

    def _verify(self, path: Path | None = None) -> None:
        """Check a file, or all; what was read ahead may be of one changed, even if it is put back later."""
        try:
            if path is None:
                for checkpoint in set(self._files.values()):
                    checkpoint.verify()
            else:
                self._files[path].verify_file(path)
        except CheckpointError:
            self.discard_ahead()
            raise

    def read_ahead(self) -> None:
        """Start reading what is used next, as far as there is room."""
        ahead = self.ahead_bytes
        wraps = self._pool.following(self) is self
        for group in self._order.upcoming(wraps=wraps):
            if group in self._ahead or group in self._in_use or group in self._kept:
                continue
            if (streamed := self._streamed.get(group)) is None:
                return  # another thread is taking it off
            ahead += streamed.nbytes
            if ahead > self._pool.read_ahead or not self._start_ahead(group):
                break

    def _fetch(self, transfer: Transfer) -> None:
        """Bring a group's bytes into memory, the faster way. Runs in a worker."""
        if transfer.read is None:
            return
        if not transfer.aligned or is_cached(transfer.ranges) or was_written(transfer.ranges):
            transfer.read.forget()  # these bytes of the budget are in the mapping now
            for it in transfer.ranges:
                it.mapping.populate(it.start, it.nbytes)
            return
        at = 0
        positions = []
        for it in transfer.ranges:
            reader = self._workers.reader(it.mapping.path)
            positions.append(reader.read_range(transfer.read, it.start, it.stop, at=at))
            at += aligned_span(it.start, it.stop)
        transfer.positions = positions

    def _close(self) -> None:
        self.discard_ahead()
        self._pool.wait_for_leaving()
        self._workers.close()
