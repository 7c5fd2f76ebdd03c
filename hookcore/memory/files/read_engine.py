"""Copies from files: what is asked for is read by other threads first, and copied once it is there.

Copies are made in the order in which they were asked for, but for one that is needed at once. The host waits
for the disk where it needs what has not been read yet, and for a copy only where all the memory that is read
into is full of what is still to be copied on.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, cast

import torch
from attrs import define

from hookcore.memory.device.copy_engine import CopyEngine, Transfer
from hookcore.memory.files.file_range import was_written

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hookcore.memory.device.pinned_memory import Staging
    from hookcore.memory.files.file_reader import FileReader
    from hookcore.memory.files.flat_file_group import FlatFileGroup
    from hookcore.memory.files.reader_threads import Task

    Read = Task[tuple[bool, float]]


@define(eq=False)
class _Request:
    """A copy that was asked for.

    Attributes:
        transfer: The copy.
        flat: What is copied.
        after: An event after all use of the memory that it fills.
        during: In which call it was asked for.
        read: Reading it, from when that begins: whether it comes from files, and how long it took.
        room: Where it is read to, until it is copied.
        is_copied: Whether the copy was begun.
    """

    transfer: Transfer
    flat: FlatFileGroup
    after: Any
    during: int
    read: Read | None = None
    room: torch.Tensor | None = None
    is_copied: bool = False


class FileEngine(CopyEngine):
    """Device memory for weights that are read from files.

    Args:
        device: The device.
        nbytes: Bytes of memory that copies may take.
        reader: Reads the weights.
        ring: Page-locked memory to read into, enough for the largest group.
        per_group: Whether memory is allocated for each copy, and not now and once.
    """

    def __init__(
        self, device: torch.device, nbytes: int, reader: FileReader, ring: Staging, *, per_group: bool
    ) -> None:
        super().__init__(device, nbytes, per_group=per_group)
        self._reader = reader
        self.staging = self._ring = ring
        self._calls = 0
        self._requests: dict[Transfer, _Request] = {}  # of all loads that are there or on their way
        self._waiting: deque[_Request] = deque()  # until they are copied
        self._given_up: list[tuple[Read, torch.Tensor]] = []  # while they are still being read

    def begin(self, stream: Any) -> None:
        """Compute on a stream from now on."""
        self._left = self._module.Event()
        super().begin(stream)
        self._calls += 1
        self._go_on()

    def copy(self, transfers: Iterable[Transfer]) -> None:
        """Read these and then copy them, after all use so far of the memory that they fill."""
        if self.allocator.is_shared:  # with what was computed until this moment
            self._left = self._module.Event()
            self._left.record(self._computing)
        for transfer in transfers:
            transfer.flat.note_versions()
            request = _Request(transfer, cast("FlatFileGroup", transfer.flat), self._left, self._calls)
            self._requests[transfer] = request
            self._waiting.append(request)
        self._go_on()

    def wait_for(self, transfer: Transfer) -> None:
        """Order what is computed from now on after a copy.

        Raises:
            CheckpointError: A file has changed, or cannot be read.
        """
        request = self._requests[transfer]
        request.flat.verify()
        if request.during != self._calls and self._is_outdated(request):
            self._forget_read(request)
            request.after, request.is_copied = self._left, False
        if not request.is_copied:
            self._copy_now(request)
        super().wait_for(transfer)
        self._go_on()

    def leave(self, transfer: Transfer) -> None:
        """Order all later copies after what was computed so far, with this transfer among others."""
        self._left = self._module.Event()  # what was asked for earlier goes on waiting for the last one
        super().leave(transfer)
        if transfer.flat not in self.allocator.kept:  # what is kept is used again
            del self._requests[transfer]
        self._go_on()

    def give_back(self, transfer: Transfer) -> None:
        """Give back a transfer's room. What was begun may go on."""
        super().give_back(transfer)
        request = self._requests.pop(transfer)
        if request in self._waiting:
            self._waiting.remove(request)
        self._forget_read(request)

    def end(self) -> None:
        """Wait until the device is done; nothing is read any more that nobody has begun to."""
        for request in self._requests.values():
            if request.read is not None:
                request.read.cancel()
        super().end()

    def _go_on(self) -> None:
        """Copy what has been read, and has more read as far as there is room."""
        self._free_given_up()
        waiting = self._waiting
        while waiting and (read := waiting[0].read) is not None and read.done():
            self._copy_or_forget(waiting.popleft(), read)
        for request in waiting:
            if request.read is None and not self._begin_read(request):
                return

    def _copy_now(self, request: _Request) -> None:
        """Read and copy a request that is needed now before all others."""
        if request in self._waiting:
            self._waiting.remove(request)
        if request.read is not None and request.read.exception() is not None:
            self._forget_read(request)  # what could not be read ahead is tried again
        while request.read is None and not self._begin_read(request):
            self._make_room()
        try:
            cast("Read", request.read).result()
        except BaseException:
            self._forget_read(request)
            raise
        self._begin_copy(request)

    def _begin_read(self, request: _Request) -> bool:
        """Read a request, if there is room for it."""
        nbytes = request.flat.nbytes
        # Larger than all that there was at first it can only be if it was given other data.
        room = torch.empty(nbytes, dtype=torch.uint8) if self._is_beside(nbytes) else self._ring.take(nbytes)
        if room is None:
            return False
        request.room = room
        request.read = self._reader.submit(request.flat.targets, request.flat.ranges, room)
        return True

    def _copy_or_forget(self, request: _Request, read: Read) -> None:
        """Copy what has been read; what could not be is tried again when it is needed."""
        if read.exception() is None:
            self._begin_copy(request)
        else:
            self._forget_read(request)

    def _begin_copy(self, request: _Request) -> None:
        """Copy what has been read."""
        transfer, copying, times, timeline = request.transfer, self._copying, self.times, self.timeline
        marker = times or timeline
        room = cast("torch.Tensor", request.room)
        _, request.flat.read_seconds = cast("Read", request.read).result()
        copying.wait_event(request.after)
        with self._module.stream(copying):
            begun = marker and marker.mark(copying)
            transfer.place.memory.copy_(room, non_blocking=True)
            transfer.ready.record(copying)
        if times is not None:
            times.copy(transfer.flat, begun, times.mark(copying))
        if timeline is not None:
            timeline.add("copy", transfer.flat.name, begun, timeline.mark(copying))
        if not self._is_beside(room.nbytes):
            self._ring.sent(room, transfer.ready)
        request.room = None
        request.is_copied = True

    def _make_room(self) -> None:
        """Wait for the oldest copy; if there is none, for what is read, and not needed now."""
        if self._ring.wait():
            return
        if self._given_up:
            for read, _ in self._given_up:
                if not read.cancelled():
                    read.exception()
            self._free_given_up()
            return
        request = next(it for it in self._waiting if it.read is not None)
        self._waiting.remove(request)
        self._copy_or_forget(request, cast("Read", request.read))

    def _is_outdated(self, request: _Request) -> bool:
        """Whether what was read in an earlier call may be older than an edit in memory, or wasn't read."""
        if request.read is None:
            return False
        if request.read.exception() is not None:
            return True
        from_files, _ = request.read.result()
        return from_files and was_written(request.flat.ranges)

    def _forget_read(self, request: _Request) -> None:
        """Give back the room that a request was read into, at once or when the reading has ended."""
        if request.room is not None and request.read is not None:
            request.read.cancel()
            self._given_up.append((request.read, request.room))
            self._free_given_up()
        request.read = request.room = None

    def _free_given_up(self) -> None:
        still = []
        for read, room in self._given_up:
            if not read.done():
                still.append((read, room))
            elif not self._is_beside(room.nbytes):
                self._ring.give_back(room)
        self._given_up = still

    def _is_beside(self, nbytes: int) -> bool:
        """Return whether something is read into memory beside the ring, as that is too small for it."""
        return nbytes > self._ring.nbytes
