"""Streams groups of weights from the checkpoint that they came from. Nothing is ever written.

Between calls a streamed parameter shows the checkpoint's own tensor, mapped: it takes no memory and reads
true. For a call its group is brought in one of two ways, whichever is faster at that moment:

- what the system has cached is used where it lies: its pages are mapped ahead of use, and let go after it;
- what is not cached is read past the cache into memory of the stream's own, ahead of use.

Both ways a weight has the same address modulo the page size, so that kernels compute the same bits. The
idea of taking weights from a mapping is safetensors'; that of learning the order of use is FSDP's.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from attrs import define, field

from hookcore.errors import CheckpointError
from hookcore.memory import file_weights
from hookcore.memory.arena import Arena, Piece, piece_beside, rounded
from hookcore.memory.direct import DirectReader, aligned_span
from hookcore.memory.file_ranges import (
    FileRange,
    are_aligned,
    cost,
    drop,
    is_cached,
    merged,
    was_written,
)
from hookcore.memory.file_weights import FileWeight, is_as_stored
from hookcore.memory.mover import GroupMover
from hookcore.memory.order import LearnedOrder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hookcore.memory.checkpoint import Checkpoint
    from hookcore.memory.grouping import Group
    from hookcore.memory.origins import Origin
    from hookcore.target import TensorSlot

_WORKERS = 2  # one reads the next group while the other lets go of the last


class _Streamed:
    """What there is to bring for a group: its weights, their places in files, the memory that takes."""

    def __init__(self, weights: list[FileWeight]) -> None:
        self.weights = weights
        origins = [weight.origin for weight in weights if not weight.edited]
        self.ranges = merged(origins)
        self.aligned = are_aligned(origins)
        self.read_bytes = sum(aligned_span(it.start, it.stop) for it in self.ranges)
        self.converted_bytes = cost(origins) - self.read_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of memory in all."""
        return self.read_bytes + self.converted_bytes


@define(eq=False)
class _Load:
    """A group on its way into memory, or there."""

    ranges: tuple[FileRange, ...]
    aligned: bool
    """Whether they may be read into a buffer."""
    nbytes: int
    """Bytes of memory that it takes."""
    during_call: int
    """In which call of the component it was begun."""
    read: Piece | None
    """Memory to read it into; nothing lies there if it is used where it is mapped."""
    converted: Piece | None
    """Memory for what is converted."""
    positions: list[int] = field(factory=list)
    """Where each range begins in `read`; none if it is mapped."""
    converted_used: int = 0
    shown: list[tuple[FileWeight, list[torch.Tensor], list[int]]] = field(factory=list)
    """What the parameters of which weight hold now, and how often torch had counted a change of each."""
    done: Future[None] = field(factory=Future)

    def wait(self) -> None:
        """Waits until it is in memory; raises what reading it raised."""
        self.done.result()


class DiskMover(GroupMover):
    """Brings groups from a checkpoint's files and lets them go again.

    What a user edits between calls is kept: a mapping copies the pages written, and these are never let go.
    A file that changes is found before its weights are used, and again when the outermost call ends.

    Args:
        groups: The groups that come and go, in the order in which they are probably used.
        origins: Where the values of each parameter lie, by slot.
        device: The execution device.
        budget: Bytes that all groups, also the resident ones, may take in memory together.
        read_ahead: Bytes of them that may be ahead of use.
        whole: Bytes that all groups would take together, for the plan.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        origins: Mapping[TensorSlot, Origin],
        device: torch.device,
        budget: int,
        read_ahead: int,
        *,
        whole: int,
    ) -> None:
        self._origins = origins
        self._device = device
        self._budget = budget
        self._read_ahead_limit = read_ahead
        self._whole = whole
        self._order: LearnedOrder[Group] = LearnedOrder(groups)
        self._streamed: dict[Group, _Streamed] = {}
        self._to_stay: list[Group] = []  # residents that the next call brings
        self._resident: dict[Group, _Load] = {}
        self._in_use: dict[Group, _Load] = {}
        self._ahead: dict[Group, _Load] = {}
        self._leaving: list[tuple[Future[None], Piece]] = []  # mapped pages that are being let go
        self._calls = 0
        self._arena = Arena(budget)
        self._files: dict[Path, Checkpoint] = {}
        self._readers: dict[Path, DirectReader] = {}
        self._reader_lock = threading.Lock()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="hookcore-disk")

    def attach(self, group: Group, *, resident: bool) -> None:
        """Has the group's parameters show the checkpoint's tensors; a resident one is read by the next call.

        Raises:
            CheckpointError: A parameter in memory differs from the checkpoint.
        """
        streamed = _Streamed([FileWeight.compare(slot, self._origins[slot]) for slot in group.slots])
        for weight in streamed.weights:
            weight.take_over()
            self._files[weight.origin.entry.path] = weight.origin.checkpoint
        self._streamed[group] = streamed
        if resident:
            self._to_stay.append(group)

    @torch.inference_mode(False)  # what is made here outlives the mode
    def detach(self, group: Group) -> None:
        """Gives each parameter back as it was found: in memory, or showing the checkpoint's tensor.

        Raises:
            CheckpointError: Values have to be read, and a file has changed.
        """
        weights = self._streamed[group].weights
        load = self._resident.get(group)
        shown = []
        if load is not None:
            self._verify()
            _keep_edits(load, compare=True)
            shown = [weight for weight, _, _ in load.shown]
        for weight in weights:
            if weight not in shown:
                weight.adopt()
        try:
            found = [weight.values_to_give_back() for weight in weights]
        except CheckpointError:
            self._discard_all()
            raise
        if load is not None:
            self._let_go(self._resident.pop(group))
        for weight, values in zip(weights, found, strict=True):
            weight.give_back(values)
        del self._streamed[group]
        if group in self._to_stay:
            self._to_stay.remove(group)
        if not self._streamed:
            self._close()

    def settle(self, group: Group) -> None:
        """Has parameters lie in memory, or simply show the checkpoint's tensor, after the last `detach`.

        Raises:
            CheckpointError: Values have to be converted, and a file has changed.
        """
        file_weights.settle(group.slots)

    def needs(self) -> dict[str, int]:
        """As much memory as groups may take, or all of them do."""
        return {str(self._device): min(self._budget, self._whole)}

    def begin(self) -> None:
        """Begins an outermost call.

        Raises:
            CheckpointError: A file has changed.
        """
        self._calls += 1
        self._verify()
        for group in self._to_stay:
            self._start_ahead(group)
        while self._to_stay:
            group = self._to_stay[-1]
            self._resident[group] = self._bring(group, self._load_of(group))
            self._to_stay.pop()
        self._read_ahead()

    def end(self) -> None:
        """Ends an outermost call; what the next one needs first is read meanwhile.

        Raises:
            CheckpointError: A file has changed, so that the call may have used wrong weights.
        """
        self._order.end_pass()
        self._wait_for_leaving()
        self._verify()
        self._read_ahead()

    def onload(self, group: Group) -> None:
        """Has the group's parameters hold their values on the execution device, in the dtype wanted.

        Raises:
            CheckpointError: A file has changed, or cannot be read.
        """
        self._in_use[group] = self._bring(group, self._load_of(group))
        self._order.note(group)
        self._read_ahead()

    def offload(self, group: Group) -> None:
        """Has the group's parameters show the checkpoint's tensors again."""
        self._let_go(self._in_use.pop(group))
        self._read_ahead()

    def reset(self) -> None:
        """Forgets the order of use."""
        self._order.forget()

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """Where the bytes of the group lie."""
        return file_weights.report(
            self._streamed[group].weights, f"resident on {self._device}" if resident else None
        )

    def _bring(self, group: Group, load: _Load) -> _Load:
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
    def _show(self, group: Group, load: _Load) -> None:
        """Rebinds the parameters of a group that is in memory."""
        copies = self._device.type != "cpu"
        weights = self._streamed[group].weights
        for weight in weights:
            weight.adopt()
            place = _place_of(weight, load)
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

    def _converted(self, data: torch.Tensor, dtype: torch.dtype, load: _Load) -> torch.Tensor:
        if self._device.type != "cpu" or not data.numel():
            return data.to(self._device, dtype, copy=True)
        nbytes = data.numel() * dtype.itemsize
        begin, load.converted_used = load.converted_used, load.converted_used + rounded(nbytes)
        if load.converted is None or load.converted_used > load.converted.nbytes:
            return data.to(dtype)  # it was given to the parameter since the group was measured
        target = load.converted.tensor[begin : begin + nbytes].view(dtype).view(data.shape)
        return target.copy_(data)

    @torch.inference_mode(False)
    def _let_go(self, load: _Load) -> None:
        """Unbinds a group and gives back its memory."""
        if any(weight.versions != versions for weight, _, versions in load.shown):
            self._wait_for_leaving()  # what is written must not be let go at that moment
        _unbind(load)
        self._release_read(load)
        if load.converted is not None:
            self._arena.give_back(load.converted)
            load.converted = None

    def _release_read(self, load: _Load) -> None:
        """Gives back the memory of what was read, once it is not needed any more."""
        if load.read is not None:
            if load.positions or load.done.cancelled():
                self._arena.give_back(load.read)
            else:
                self._leaving.append((self._workers.submit(drop, load.ranges), load.read))
            load.nbytes -= load.read.nbytes
        load.read = None
        load.positions.clear()
        load.ranges = ()

    def _load_of(self, group: Group) -> _Load:
        """The load that was begun ahead, or one that begins now."""
        return self._ahead.pop(group) if group in self._ahead else self._start(group)

    def _start(self, group: Group) -> _Load:
        """Has a worker bring a group that is needed now, after making room for it."""
        streamed = self._streamed[group]
        while (room := self._room(streamed)) is None:
            if self._ahead:
                self._discard()
            elif self._leaving:
                self._wait_for_leaving()
            else:  # what calls need at once, or what outputs still show, is more than the budget
                sizes = (streamed.read_bytes, streamed.converted_bytes)
                room = [piece_beside(nbytes) if nbytes else None for nbytes in sizes]
                break
        return self._submit(streamed, room)

    def _start_ahead(self, group: Group) -> bool:
        """Has a worker bring a group that is needed later, if there is room."""
        if group not in self._ahead:
            room = self._room(self._streamed[group])
            if room is None:
                return False
            self._ahead[group] = self._submit(self._streamed[group], room)
        return True

    def _room(self, streamed: _Streamed) -> list[Piece | None] | None:
        """Memory for reading a group and for converting it; None if there is not enough."""
        self._give_back_what_left()
        pieces: list[Piece | None] = []
        for nbytes in (streamed.read_bytes, streamed.converted_bytes):
            piece = self._arena.take(nbytes) if nbytes else None
            if nbytes and piece is None:
                for taken in pieces:
                    if taken is not None:
                        self._arena.give_back(taken)
                return None
            pieces.append(piece)
        return pieces

    def _submit(self, streamed: _Streamed, room: list[Piece | None]) -> _Load:
        read, converted = room
        load = _Load(streamed.ranges, streamed.aligned, streamed.nbytes, self._calls, read, converted)
        load.done = self._workers.submit(self._fetch, load)
        return load

    def _discard(self) -> None:
        """Gives up what was read farthest ahead."""
        _, load = self._ahead.popitem()
        if not load.done.cancel():
            load.done.exception()  # waits for it
        self._let_go(load)

    def _discard_all(self) -> None:
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
            self._discard_all()
            raise

    def _wait_for_leaving(self) -> None:
        """Waits for pages to be let go: until then nobody may write to them."""
        for future, _ in self._leaving:
            future.result()
        self._give_back_what_left()

    def _give_back_what_left(self) -> None:
        still = []
        for future, piece in self._leaving:
            if future.done():
                self._arena.give_back(piece)
            else:
                still.append((future, piece))
        self._leaving = still

    def _read_ahead(self) -> None:
        """Starts reading what is used next, as far as there is room."""
        ahead = sum(load.nbytes for load in self._ahead.values())
        for group in self._order.upcoming():
            if group in self._ahead or group in self._in_use:
                continue
            ahead += self._streamed[group].nbytes
            if ahead > self._read_ahead_limit or not self._start_ahead(group):
                break

    def _fetch(self, load: _Load) -> None:
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
            reader = self._reader(it.mapping.path)
            positions.append(reader.read_range(load.read, it.start, it.stop, at=at))
            at += aligned_span(it.start, it.stop)
        load.positions = positions

    def _reader(self, path: Path) -> DirectReader:
        with self._reader_lock:
            if path not in self._readers:
                self._readers[path] = DirectReader(path)
            return self._readers[path]

    def _close(self) -> None:
        self._discard_all()
        self._wait_for_leaving()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def _place_of(weight: FileWeight, load: _Load) -> torch.Tensor:
    """The tensor that holds a weight's bytes: in a buffer it was read into, or in the mapping."""
    origin = weight.origin
    start, nbytes = origin.entry.offset, origin.entry.nbytes
    for it, position in zip(load.ranges, load.positions, strict=False):  # no positions if it is mapped
        if load.read is not None and it.mapping is origin.mapping and it.start <= start < it.stop:
            begin = position + start - it.start
            return load.read.tensor[begin : begin + nbytes].view(origin.entry.dtype).view(origin.entry.shape)
    return origin.raw


def _unbind(load: _Load) -> None:
    """Has parameters show their homes again. A function, as its names would keep buffers in use."""
    _keep_edits(load, compare=False)
    for weight, _, _ in load.shown:
        weight.show(weight.homes)
    load.shown.clear()


def _keep_edits(load: _Load, *, compare: bool) -> None:
    """Gives what a group that is in memory was edited to a home."""
    for weight, data, versions in load.shown:
        weight.keep_edits(data, versions, compare=compare)
