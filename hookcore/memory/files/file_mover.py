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
from hookcore.memory.files import file_weight as file_weights
from hookcore.memory.files.direct_reader import aligned_span
from hookcore.memory.files.file_group import Load, Streamed, place_of
from hookcore.memory.files.file_range import drop, is_cached, was_written
from hookcore.memory.files.file_weight import FileWeight, is_as_stored
from hookcore.memory.files.page_arena import Piece, piece_beside, rounded
from hookcore.memory.files.reader_threads import Workers
from hookcore.memory.mover import GroupMover
from hookcore.memory.planning.order_of_use import LearnedOrder
from hookcore.memory.planning.residency import largest_held

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from hookcore.memory.files.checkpoint import Checkpoint
    from hookcore.memory.files.host_pool import DiskRoom
    from hookcore.memory.files.origins_of_model import FileOrigins
    from hookcore.memory.grouping import Group
    from hookcore.memory.mover import Needed


class DiskMover(GroupMover):
    """Brings groups from a checkpoint's files and lets them go again.

    What a user edits between calls is kept: a mapping copies the pages written, and these are never let go.
    A file that changes is found before its weights are used, and again when the outermost call ends.

    Several components have the memory in turn (see `disk_room`). What stays of one is shown to its parameters
    until it is given up for another.

    Args:
        groups: The groups that come and go, in the order in which they are probably used.
        origins: Where the values of each parameter lie, by slot.
        device: The execution device.
        room: The memory, which several movers may have in turn.
        costs: Bytes of memory that each group takes, also the resident ones.
        what: The component, for messages.

    Attributes:
        number: Its number in the room.
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
        room: DiskRoom,
        *,
        costs: Mapping[Group, int],
        what: str,
    ) -> None:
        self._room = room
        self._resident: dict[Group, Load] = {}
        self._in_use: dict[Group, Load] = {}
        self._ahead: dict[Group, Load] = {}
        self._kept: dict[Group, Load] = {}  # not in use, but there until they are given up
        self._to_stay: list[Group] = []  # residents that the next call brings
        self._to_keep: frozenset[Group] = frozenset()  # those that are kept after their next use
        self._origins = origins
        self._device = device
        self.number = room.number()
        self.costs = costs
        self.whole = sum(costs.values())
        self.least, fqn = largest_held(costs)
        self.where = fqn, what
        self._order: LearnedOrder[Group] = LearnedOrder(groups)
        self._streamed: dict[Group, Streamed] = {}
        self._calls = 0
        self._is_running = False
        self._files: dict[Path, Checkpoint] = {}
        self._workers = Workers("hookcore-disk")

    def __del__(self) -> None:
        # A model that goes away with its hooks on. What is being read keeps it alive until that is done.
        loads = (self._resident, self._in_use, self._ahead, self._kept)
        self._room.leave_behind(piece for them in loads for load in them.values() for piece in load.pieces)

    def expect(self, needed: Needed) -> None:
        """Tells the room of the component."""
        self._room.expect(needed.component, self)

    def attach(self, group: Group, *, resident: bool) -> None:
        """Has the group's parameters show the checkpoint's tensors; a resident one is read by the next call.

        Raises:
            CheckpointError: A parameter in memory differs from the checkpoint.
        """
        streamed = Streamed([FileWeight.compare(slot, self._origins[slot]) for slot in group.slots])
        for weight in streamed.weights:
            weight.take_over()
            self._files[weight.origin.entry.path] = weight.origin.checkpoint
        self._origins.take(group.slots)
        self._streamed[group] = streamed
        if resident:
            self._to_stay.append(group)
        self._room.register(self)

    @torch.inference_mode(False)  # what is made here outlives the mode
    def detach(self, group: Group) -> None:
        """Gives each parameter back as it was found: in memory, or showing the checkpoint's tensor.

        Raises:
            CheckpointError: Values have to be read, and a file has changed.
            ConcurrentCallError: Another thread calls a component that shares the memory.
        """
        with self._room.changing():
            self._detach(group)

    def _detach(self, group: Group) -> None:
        weights = self._streamed[group].weights
        staying = self._kept if group in self._kept else self._resident
        load = staying.get(group)
        shown = []
        if load is not None:
            self._verify()
            load.keep_edits(compare=True)
            shown = [weight for weight, _, _ in load.shown]
        for weight in weights:
            if weight not in shown:
                weight.adopt()
        try:
            found = [weight.values_to_give_back() for weight in weights]
        except CheckpointError:
            self.discard_ahead()
            raise
        if load is not None:
            self._let_go(staying.pop(group))
        for weight, values in zip(weights, found, strict=True):
            weight.give_back(values)
        del self._streamed[group]
        if group in self._to_stay:
            self._to_stay.remove(group)
        if not self._streamed:
            self._close()
            self._room.unregister(self)

    def settle(self, group: Group) -> None:
        """Has parameters lie in memory, or simply show the checkpoint's tensor, after the last `detach`.

        Raises:
            CheckpointError: Values have to be converted, and a file has changed.
        """
        self._origins.settle(group.slots)

    def needs(self) -> dict[str, int]:
        """As much memory as groups of all components may take, said by the first of them.

        Raises:
            BudgetError: The budget is too small.
        """
        nbytes = self._room.needs(self)
        return {str(self._device): nbytes} if nbytes else {}

    def begin(self) -> None:
        """Begins an outermost call.

        Raises:
            CheckpointError: A file has changed.
            ConcurrentCallError: Another thread calls a component that shares the memory.
        """
        self._room.enter(self)
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
        """Ends an outermost call; what the next one needs first is read meanwhile.

        Raises:
            CheckpointError: A file has changed, so that the call may have used wrong weights.
        """
        if not self._is_running:
            return  # its begin was refused
        try:
            self._order.end_pass()
            following = self._room.following(self)
            if following is not self:
                self.discard_ahead()
            self._room.wait_for_leaving()
            self._verify()
            following.read_ahead()
        finally:
            self._is_running = False
            self._room.leave()

    def onload(self, group: Group) -> None:
        """Has the group's parameters hold their values on the execution device, in the dtype wanted.

        Raises:
            CheckpointError: A file has changed, or cannot be read.
        """
        load = self._kept.pop(group, None)
        if load is not None and not load.is_replaced:
            self._in_use[group] = load
            self._order.note(group)
            return
        if load is not None:
            self._let_go(load)
        self._in_use[group] = self._bring(group, self._load_of(group))
        self._order.note(group)
        self.read_ahead()

    def offload(self, group: Group) -> None:
        """Has the group's parameters show the checkpoint's tensors again, unless it is to stay."""
        load = self._in_use.pop(group)
        if group in self._to_keep:
            self._kept[group] = load
        else:
            self._let_go(load)
            self.read_ahead()

    def reset(self) -> None:
        """Forgets the order of use."""
        self._order.forget()
        self._room.forget()

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """Where the bytes of the group lie."""
        there = resident or group in self._kept
        return file_weights.report(
            self._streamed[group].weights, f"resident on {self._device}" if there else None
        )

    # What the room asks

    @property
    def kept(self) -> dict[Group, int]:
        """The groups that are kept, and their bytes of memory."""
        return {group: self.costs[group] for group in self._kept}

    @property
    def ahead_bytes(self) -> int:
        """Bytes of memory of what was read ahead."""
        return sum(load.nbytes for load in self._ahead.values())

    def keep(self, groups: Collection[Group]) -> None:
        """Is told what is to stay from now on: of the groups of all components."""
        self._to_keep = frozenset(group for group in self.costs if group in groups)
        for group in [group for group in self._kept if group not in self._to_keep]:
            self._give_up(group)

    def give_up_one(self) -> bool:
        """Gives up a group that is kept and not in use; False if there is none that can be."""
        return any(self._give_up(group) for group in reversed(list(self._kept)))

    @torch.inference_mode(False)  # what was edited outlives the mode
    def _give_up(self, group: Group) -> bool:
        load = self._kept[group]
        try:
            self._verify()
        except CheckpointError:
            return False  # nobody could tell what was edited; its next call says so
        load.keep_edits(compare=True)
        for weight, _, _ in load.shown:  # compared with the file
            weight.origin.mapping.drop(weight.origin.entry.offset, weight.origin.entry.nbytes)
        self._let_go(self._kept.pop(group))
        self._room.wait_for_leaving()
        return True

    # How it is done

    def _bring(self, group: Group, load: Load) -> Load:
        """Waits for a load and shows it."""
        try:
            load.wait()
            if load.positions and load.during_call != self._calls and was_written(load.ranges):
                self._let_go(load)  # edited since it was read
                load = self._start(group)
                load.wait()
            for path in {it.mapping.path for it in load.ranges}:
                self._verify(path)
            self._show(group, load)
        except BaseException:
            self._let_go(load)
            raise
        return load

    @torch.inference_mode(False)  # as parameters take over from data whether it was made in the mode
    def _show(self, group: Group, load: Load) -> None:
        """Rebinds the parameters of a group that is in memory."""
        copies = self._device.type != "cpu"
        weights = self._streamed[group].weights
        for weight in weights:
            weight.adopt()
            place = place_of(weight, load)
            data: list[torch.Tensor] = []
            made: dict[int, torch.Tensor] = {}  # tied objects go on sharing memory
            for home in weight.homes:
                if id(home) not in made:
                    value = place if home is weight.origin.raw else home
                    dtype = weight.origin.dtype if is_as_stored(home, weight.origin) else home.dtype
                    if copies or dtype != home.dtype:
                        value = self._converted(value, dtype, load)
                    made[id(home)] = value
                data.append(made[id(home)])
            if any(value is not home for value, home in zip(data, weight.homes, strict=True)):
                weight.show(data)
                load.shown.append((weight, data, weight.versions))
        if copies or all(weight.converts for weight in weights):
            self._release_read(load)

    def _converted(self, data: torch.Tensor, dtype: torch.dtype, load: Load) -> torch.Tensor:
        if self._device.type != "cpu" or not data.numel():
            return data.to(self._device, dtype, copy=True)
        nbytes = data.numel() * dtype.itemsize
        begin, load.converted_used = load.converted_used, load.converted_used + rounded(nbytes)
        if load.converted is None or load.converted_used > load.converted.nbytes:
            return data.to(dtype)  # it was given to the parameter since the group was measured
        target = load.converted.tensor[begin : begin + nbytes].view(dtype).view(data.shape)
        return target.copy_(data)

    @torch.inference_mode(False)
    def _let_go(self, load: Load) -> None:
        """Unbinds a group and gives back its memory."""
        if any(weight.versions != versions for weight, _, versions in load.shown):
            self._room.wait_for_leaving()  # what is written must not be let go at that moment
        load.unbind()
        self._release_read(load)
        if load.converted is not None:
            self._room.give_back(load.converted)
            load.converted = None

    def _release_read(self, load: Load) -> None:
        """Gives back the memory of what was read, once it is not needed any more."""
        if load.read is not None:
            if load.positions or load.done.cancelled():
                self._room.give_back(load.read)
            else:
                self._room.give_back_after(self._workers.submit(drop, load.ranges), load.read)
            load.nbytes -= load.read.nbytes
        load.read = None
        load.positions.clear()
        load.ranges = ()

    def _load_of(self, group: Group) -> Load:
        """The load that was begun ahead, or one that begins now: also if what was begun has failed."""
        load = self._ahead.pop(group, None)
        if load is not None and load.done.done() and load.done.exception() is not None:
            self._let_go(load)
            load = None
        return self._start(group) if load is None else load

    def _start(self, group: Group) -> Load:
        """Has a worker bring a group that is needed now, after making room for it."""
        streamed = self._streamed[group]
        sizes = (streamed.read_bytes, streamed.converted_bytes)
        while (pieces := self._room.take(sizes)) is None:
            if self._ahead:
                self._discard()
            elif self._room.is_leaving:
                self._room.wait_for_leaving()
            elif not self._room.make_way():
                # What calls need at once, or what outputs still show, is more than the budget.
                pieces = [piece_beside(nbytes) if nbytes else None for nbytes in sizes]
                break
        return self._submit(streamed, pieces)

    def _start_ahead(self, group: Group) -> bool:
        """Has a worker bring a group that is needed later, if there is room."""
        if group not in self._ahead:
            streamed = self._streamed[group]
            pieces = self._room.take((streamed.read_bytes, streamed.converted_bytes))
            if pieces is None:
                return False
            self._ahead[group] = self._submit(streamed, pieces)
        return True

    def _submit(self, streamed: Streamed, pieces: list[Piece | None]) -> Load:
        read, converted = pieces
        load = Load(streamed.ranges, streamed.aligned, streamed.nbytes, self._calls, read, converted)
        load.done = self._workers.submit(self._fetch, load)
        return load

    def _discard(self) -> None:
        """Gives up what was read farthest ahead."""
        _, load = self._ahead.popitem()
        if not load.done.cancel():
            load.done.exception()  # waits for it
        self._let_go(load)

    def discard_ahead(self) -> None:
        """Gives up all that was read ahead."""
        while self._ahead:
            self._discard()

    def _verify(self, path: Path | None = None) -> None:
        """Checks a file, or all; what was read ahead may be of one changed, even if it is put back later."""
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
        """Starts reading what is used next, as far as there is room."""
        ahead = self.ahead_bytes
        wraps = self._room.following(self) is self
        for group in self._order.upcoming(wraps=wraps):
            if group in self._ahead or group in self._in_use or group in self._kept:
                continue
            if (streamed := self._streamed.get(group)) is None:
                return  # another thread is taking it off
            ahead += streamed.nbytes
            if ahead > self._room.read_ahead or not self._start_ahead(group):
                break

    def _fetch(self, load: Load) -> None:
        """Brings a group's bytes into memory, the faster way. Runs in a worker."""
        if load.read is None:
            return
        if not load.aligned or is_cached(load.ranges) or was_written(load.ranges):
            load.read.forget()  # these bytes of the budget are in the mapping now
            for it in load.ranges:
                it.mapping.populate(it.start, it.nbytes)
            return
        at = 0
        positions = []
        for it in load.ranges:
            reader = self._workers.reader(it.mapping.path)
            positions.append(reader.read_range(load.read, it.start, it.stop, at=at))
            at += aligned_span(it.start, it.stop)
        load.positions = positions

    def _close(self) -> None:
        self.discard_ahead()
        self._room.wait_for_leaving()
        self._workers.close()
