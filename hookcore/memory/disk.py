"""Streams groups of weights from the checkpoint that they came from. Nothing is ever written.

Between calls a streamed parameter shows the checkpoint's own tensor, mapped: it takes no memory and reads
true. For a call its group is brought in one of two ways, whichever is faster at that moment:

- what the system has cached is used where it lies: its pages are mapped ahead of use, and let go after it;
- what is not cached is read past the cache into memory of the stream's own, ahead of use.

Both ways a weight has the same address modulo the page size, so that kernels compute the same bits. The
idea of taking weights from a mapping is safetensors'; that of learning the order of use is FSDP's.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from attrs import define, field, frozen

from hookcore.errors import CheckpointError
from hookcore.memory.direct import AlignedBuffer, DirectReader, aligned_span
from hookcore.memory.order import LearnedOrder
from hookcore.memory.origins import Origin, origin_of, set_origin
from hookcore.memory.placement import GroupMover

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hookcore.memory.checkpoint import Checkpoint
    from hookcore.memory.grouping import Group
    from hookcore.memory.mapping import MappedFile
    from hookcore.target import TensorSlot

_CACHED = 0.9
"""From this part of a group on in the system's cache, mapping it is faster than reading it directly."""

_NEIGHBOURS = 64 * 1024
"""Bytes between two tensors in a file that are read along rather than read around."""

_WORKERS = 2  # one reads the next group while the other lets go of the last

_use_count = torch._C._storage_Use_Count


@frozen
class FileRange:
    """Bytes of a mapped file, `[start, stop)`."""

    mapping: MappedFile
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Length."""
        return self.stop - self.start


@define(eq=False)
class _Weight:
    """One streamed parameter: a slot, the tensor objects in it, and where their values come from."""

    slot: TensorSlot
    origin: Origin
    was_in_memory: bool
    edited: bool = False
    """Its values are no longer those of the checkpoint: it stays in memory."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.slot.tensors

    @property
    def version(self) -> int:
        """How often torch counted a change in place."""
        return sum(tensor._version for tensor in self.tensors)

    @property
    def converts(self) -> bool:
        return self.origin.dtype != self.origin.entry.dtype

    def show(self, data: torch.Tensor) -> None:
        for tensor in self.tensors:
            tensor.data = data

    def shows(self, data: torch.Tensor) -> bool:
        return self.tensors[0].data_ptr() == data.data_ptr()


class _Streamed:
    """What there is to bring for a group: its weights, their places in files, the memory that takes."""

    def __init__(self, weights: list[_Weight]) -> None:
        self.weights = weights
        origins = [weight.origin for weight in weights if not weight.edited]
        self.ranges = _merged(origins)
        self.nbytes = cost(origins)


@define(eq=False)
class _Load:
    """A group on its way into memory, or there."""

    ranges: tuple[FileRange, ...]
    nbytes: int
    """Bytes of memory that it takes."""
    during_call: int
    """In which call of the component it was begun."""
    buffers: list[tuple[FileRange, AlignedBuffer, int]] = field(factory=list)
    """What was read past the cache: where to, and the position of its first byte there."""
    converted: list[AlignedBuffer] = field(factory=list)
    shown: list[tuple[_Weight, torch.Tensor, int]] = field(factory=list)
    """What the parameters of which weight hold now, and how often torch had counted a change of them."""
    done: Future[None] = field(factory=Future)

    def wait(self) -> None:
        """Waits until it is in memory; raises what reading it raised."""
        self.done.result()


class _Buffers:
    """Aligned memory that is used again, but never while anybody still looks at it.

    Args:
        limit: Bytes to which memory that is free is given back before there is more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: list[AlignedBuffer] = []
        self._lent = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> AlignedBuffer:
        """Gives memory of at least this size."""
        with self._lock:
            fitting = [it for it in self._free if nbytes <= it.nbytes <= 2 * nbytes]
            if fitting:
                chosen = min(fitting, key=lambda it: it.nbytes)
                self._free.remove(chosen)
            else:
                free = sum(it.nbytes for it in self._free)
                while self._free and self._lent + free + nbytes > self._limit:
                    free -= self._free[0].nbytes
                    self._free.pop(0).close()
                chosen = AlignedBuffer(nbytes)
            self._lent += chosen.nbytes
            return chosen

    def give_back(self, buffer: AlignedBuffer) -> None:
        """Takes memory back; if autograd or an output still uses it, it is theirs from now on."""
        with self._lock:
            self._lent -= buffer.nbytes
            if _use_count(buffer.tensor.untyped_storage()._cdata) == _UNUSED:
                self._free.append(buffer)
            else:
                buffer.close()

    def clear(self) -> None:
        """Gives all free memory back to the system."""
        with self._lock:
            for buffer in self._free:
                buffer.close()
            self._free.clear()


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
    """

    def __init__(
        self,
        groups: Sequence[Group],
        origins: Mapping[TensorSlot, Origin],
        device: torch.device,
        budget: int,
        read_ahead: int,
    ) -> None:
        self._origins = origins
        self._device = device
        self._budget = budget
        self._read_ahead_limit = read_ahead
        self._order: LearnedOrder[Group] = LearnedOrder(groups)
        self._streamed: dict[Group, _Streamed] = {}
        self._resident: dict[Group, _Load] = {}
        self._in_use: dict[Group, _Load] = {}
        self._ahead: dict[Group, _Load] = {}
        self._leaving: list[tuple[Future[None], int]] = []
        self._calls = 0
        self._buffers = _Buffers(budget)
        self._readers: dict[Path, DirectReader] = {}
        self._reader_lock = threading.Lock()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="hookcore-disk")

    def attach(self, group: Group, *, resident: bool) -> None:
        """Has the group's parameters show the checkpoint's tensors; a resident group is read for good.

        Raises:
            CheckpointError: A parameter in memory differs from the checkpoint.
        """
        streamed = _Streamed([self._weight(slot) for slot in group.slots])
        for weight in streamed.weights:
            for tensor in weight.tensors:
                set_origin(tensor, weight.origin)
            if not weight.edited:
                weight.show(weight.origin.raw)
        self._streamed[group] = streamed
        if resident:
            try:
                self._resident[group] = self._bring(group, self._start(group, needed=False))
            except BaseException:
                self.detach(group)
                raise

    def detach(self, group: Group) -> None:
        """Gives each parameter back as it was found: in memory, or showing the checkpoint's tensor."""
        found = [(weight, self._value_to_give_back(weight)) for weight in self._streamed[group].weights]
        if group in self._resident:
            self._let_go(self._resident.pop(group))
        for weight, value in found:
            weight.show(value)
            if weight.was_in_memory:
                for tensor in weight.tensors:
                    set_origin(tensor, None)
        del self._streamed[group]
        if not self._streamed:
            self._close()

    def settle(self, group: Group) -> None:
        """Makes parameters that came from the checkpoint simply lie in memory, after the last `detach`."""
        for slot in group.slots:
            origin = origin_of(slot.tensors[0])
            if origin is None:
                continue
            if slot.tensors[0].dtype != origin.dtype:
                value = slot.tensors[0].data.to(origin.dtype)
                for tensor in slot.tensors:
                    tensor.data = value
            for tensor in slot.tensors:
                set_origin(tensor, None)

    def begin(self) -> None:
        """Begins an outermost call.

        Raises:
            CheckpointError: A file has changed.
        """
        self._calls += 1
        self._checkpoint.verify()
        self._read_ahead()

    def end(self) -> None:
        """Ends an outermost call; what the next one needs first is read meanwhile.

        Raises:
            CheckpointError: A file has changed, so that the call may have used wrong weights.
        """
        self._order.end_pass()
        self._checkpoint.verify()
        self._read_ahead()

    def onload(self, group: Group) -> None:
        """Has the group's parameters hold their values on the execution device, in the dtype wanted.

        Raises:
            CheckpointError: A file has changed, or cannot be read.
        """
        load = self._ahead.pop(group, None) or self._start(group, needed=True)
        self._in_use[group] = self._bring(group, load)
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
        weights = self._streamed[group].weights
        on_disk = sum(weight.origin.entry.nbytes for weight in weights if not weight.edited)
        in_memory = sum(weight.slot.nbytes for weight in weights if weight.edited)
        where = f"resident on {self._device}" if resident else "on disk"
        return {where: on_disk} | (
            {"in memory, as they differ from the disk": in_memory} if in_memory else {}
        )

    def _bring(self, group: Group, load: _Load) -> _Load:
        """Waits for a load and shows it."""
        try:
            load.wait()
            if load.buffers and load.during_call != self._calls and _was_written(load.ranges):
                self._let_go(load)  # edited since it was read
                load = self._start(group, needed=True)
                load.wait()
            for path in {it.mapping.path for it in load.ranges}:
                self._checkpoint.verify_file(path)
            self._show(group, load)
        except BaseException:
            self._let_go(load)
            raise
        return load

    @property
    def _checkpoint(self) -> Checkpoint:
        return next(iter(self._origins.values())).checkpoint

    def _weight(self, slot: TensorSlot) -> _Weight:
        """Compares a parameter with the checkpoint, unless it shows the checkpoint's own tensor."""
        origin = self._origins[slot]
        tensor = slot.tensors[0]
        known = origin_of(tensor) is not None
        if known and tensor.data_ptr() == origin.raw.data_ptr():
            return _Weight(slot, origin, was_in_memory=False)
        value = origin.raw.to(tensor.dtype)
        differs = not _same_bits(value, tensor.data)
        if differs and not known:
            raise CheckpointError(
                f"{slot.name!r} in memory differs from {origin.entry.key!r} in '{origin.entry.path}', which "
                "it would be replaced with. Save the model and give the path of what was saved as checkpoint="
            )
        origin.mapping.drop(origin.entry.offset, origin.entry.nbytes)
        if not known:
            origin.dtype = tensor.dtype
        return _Weight(slot, origin, was_in_memory=not known, edited=differs)

    def _value_to_give_back(self, weight: _Weight) -> torch.Tensor:
        origin, current = weight.origin, weight.tensors[0].data
        resident = any(it is weight for load in self._resident.values() for it, _, _ in load.shown)
        if weight.edited or not (resident or weight.shows(origin.raw)):
            return current
        if weight.was_in_memory:
            return (current if resident else origin.raw).to("cpu", origin.dtype, copy=True)
        if not resident or _same_bits(current.cpu(), origin.raw.to(current.dtype)):
            return origin.raw
        return current.to("cpu", copy=True)

    def _show(self, group: Group, load: _Load) -> None:
        """Rebinds the parameters of a group that is in memory."""
        copies = self._device.type != "cpu"
        weights = self._streamed[group].weights
        for weight in weights:
            if weight.edited or not weight.shows(weight.origin.raw):
                weight.edited = True  # somebody gave it other data: that is its value from now on
                continue
            data = _place_of(weight, load)
            if weight.converts or copies:
                data = self._converted(data, weight.origin.dtype, load)
            if data is not weight.origin.raw:
                weight.show(data)
                load.shown.append((weight, data, weight.version))
        if copies or all(weight.converts for weight in weights):
            self._release_read(load)

    def _converted(self, data: torch.Tensor, dtype: torch.dtype, load: _Load) -> torch.Tensor:
        if self._device.type != "cpu":
            return data.to(self._device, dtype, copy=True)
        buffer = self._buffers.take(data.numel() * dtype.itemsize)
        load.converted.append(buffer)
        target = buffer.tensor[: data.numel() * dtype.itemsize].view(dtype).view(data.shape)
        return target.copy_(data)

    def _let_go(self, load: _Load) -> None:
        """Unbinds a group and gives back its memory."""
        for weight, data, version in load.shown:
            if not weight.shows(data):
                weight.edited = True
                continue
            if weight.version != version:  # the call changed it in place
                weight.origin.raw.copy_(data)
            weight.show(weight.origin.raw)
        load.shown.clear()
        self._release_read(load)
        for buffer in load.converted:
            self._buffers.give_back(buffer)
        load.converted.clear()

    def _release_read(self, load: _Load) -> None:
        """Gives back the memory of what was read, once it is not needed any more."""
        for _, buffer, _ in load.buffers:
            self._buffers.give_back(buffer)
        if load.ranges and not load.buffers:
            nbytes = sum(aligned_span(it.start, it.stop) for it in load.ranges)
            self._leaving.append((self._workers.submit(_drop, load.ranges), nbytes))
        load.buffers.clear()
        load.ranges = ()
        load.nbytes = sum(buffer.nbytes for buffer in load.converted)

    def _start(self, group: Group, *, needed: bool) -> _Load:
        """Has a worker bring a group, after making room for it if it is needed now."""
        streamed = self._streamed[group]
        while needed and self._taken() + streamed.nbytes > self._budget:
            if self._ahead:
                self._discard()
            elif self._leaving:
                self._leaving[0][0].result()
            else:
                break
        load = _Load(streamed.ranges, streamed.nbytes, self._calls)
        load.done = self._workers.submit(self._fetch, load)
        return load

    def _discard(self) -> None:
        """Gives up what was read farthest ahead."""
        _, load = self._ahead.popitem()
        if not load.done.cancel():
            load.done.exception()  # waits for it
            self._let_go(load)

    def _taken(self) -> int:
        self._leaving = [(future, nbytes) for future, nbytes in self._leaving if not future.done()]
        here = itertools.chain(self._resident.values(), self._in_use.values(), self._ahead.values())
        return sum(load.nbytes for load in here) + sum(nbytes for _, nbytes in self._leaving)

    def _read_ahead(self) -> None:
        """Starts reading what is used next, as far as there is room."""
        ahead = sum(load.nbytes for load in self._ahead.values())
        for group in self._order.upcoming():
            if group in self._ahead or group in self._in_use:
                continue
            nbytes = self._streamed[group].nbytes
            if ahead + nbytes > self._read_ahead_limit or self._taken() + nbytes > self._budget:
                break
            self._ahead[group] = self._start(group, needed=False)
            ahead += nbytes

    def _fetch(self, load: _Load) -> None:
        """Brings a group's bytes into memory, the faster way. Runs in a worker."""
        if _is_cached(load.ranges) or _was_written(load.ranges):
            for it in load.ranges:
                it.mapping.populate(it.start, it.nbytes)
            return
        buffers = []
        for it in load.ranges:
            buffer = self._buffers.take(aligned_span(it.start, it.stop))
            position = self._reader(it.mapping.path).read_range(buffer, it.start, it.stop)
            buffers.append((it, buffer, position))
        load.buffers = buffers

    def _reader(self, path: Path) -> DirectReader:
        with self._reader_lock:
            if path not in self._readers:
                self._readers[path] = DirectReader(path)
            return self._readers[path]

    def _close(self) -> None:
        while self._ahead:
            self._discard()
        for future, _ in self._leaving:
            future.result()
        self._leaving.clear()
        self._buffers.clear()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def cost(origins: Sequence[Origin]) -> int:
    """Bytes of memory that parameters take together while they are used."""
    read = sum(aligned_span(it.start, it.stop) for it in _merged(origins))
    converted = [it.raw.numel() * it.dtype.itemsize for it in origins if it.dtype != it.entry.dtype]
    return read + sum(aligned_span(0, nbytes) for nbytes in converted)  # buffers are whole pages


def _merged(origins: Sequence[Origin]) -> tuple[FileRange, ...]:
    """The file ranges that hold these tensors; neighbours are read in one go."""
    ranges: list[FileRange] = []
    for origin in sorted(origins, key=lambda it: (it.entry.path, it.entry.offset)):
        start, stop = origin.entry.offset, origin.entry.offset + origin.entry.nbytes
        last = ranges[-1] if ranges else None
        if last is not None and last.mapping is origin.mapping and start - last.stop <= _NEIGHBOURS:
            ranges[-1] = FileRange(last.mapping, last.start, max(stop, last.stop))
        elif start < stop:
            ranges.append(FileRange(origin.mapping, start, stop))
    return tuple(ranges)


def _place_of(weight: _Weight, load: _Load) -> torch.Tensor:
    """The tensor that holds a weight's bytes: in a buffer it was read into, or in the mapping."""
    origin = weight.origin
    start, nbytes = origin.entry.offset, origin.entry.nbytes
    for it, buffer, position in load.buffers:
        if it.mapping is origin.mapping and it.start <= start < it.stop:
            begin = position + start - it.start
            return buffer.tensor[begin : begin + nbytes].view(origin.entry.dtype).view(origin.entry.shape)
    return origin.raw


def _is_cached(ranges: Sequence[FileRange]) -> bool:
    for it in ranges:
        fraction = it.mapping.cached_fraction(it.start, it.nbytes)
        if fraction is not None and fraction < _CACHED:
            return False
    return True


def _was_written(ranges: Sequence[FileRange]) -> bool:
    return any(it.mapping.was_written(it.start, it.nbytes) for it in ranges)


def _drop(ranges: Sequence[FileRange]) -> None:
    for it in ranges:
        it.mapping.drop(it.start, it.nbytes)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    flat = (first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
    return torch.equal(*flat)


_probe = torch.empty(1)
_UNUSED = _use_count(_probe.untyped_storage()._cdata)
"""What the count says of memory that only one tensor uses."""
