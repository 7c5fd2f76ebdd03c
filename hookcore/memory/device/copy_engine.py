"""Copies to a device on a stream of their own, and the events that keep them right.

There are two rules. A copy waits for the end of all use of the memory that it fills: whoever has used a
group leaves an event on the computing stream, and copies that are begun later wait for the last of these. A
use waits for its copy: each copy is followed by an event. The host waits for neither, but for when memory is
freed or changes its size. So no tensor needs `record_stream`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import define

from hookcore.memory.device.allocators import ArenaAllocator, PerGroupAllocator
from hookcore.memory.device.pass_times import PassTimes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hookcore.memory.device.allocators import DeviceRange
    from hookcore.memory.device.flat_group import FlatGroup
    from hookcore.memory.device.pinned_memory import Staging
    from hookcore.memory.device.timeline import Recorder


@define(eq=False)
class Transfer:
    """A copy of a group on its way to the device, or there.

    Attributes:
        flat: What is copied.
        place: Where it goes.
        ready: Recorded after the copy.
        lent_to: The stream that computed when the place was taken, to which its memory goes back.
        asked: Recorded when it was needed, where times are measured or a timeline is recorded.
        used: Recorded after the wait for it, likewise.
        is_new: Whether nothing has used it yet.
    """

    flat: FlatGroup
    place: DeviceRange
    ready: Any
    lent_to: Any
    asked: Any = None
    used: Any = None
    is_new: bool = True


class CopyEngine:
    """Device memory for weights, and the streams that fill and use it.

    Args:
        device: The device.
        nbytes: Bytes of memory that copies may take.
        per_group: Whether it is allocated for each of them, and not now and once.

    Attributes:
        allocator: The memory.
        marker: Makes events that are timed, for `times` or `timeline`; None if neither wants any.
        staging: Through which memory that isn't locked is copied; None if all of it is.

    Raises:
        torch.OutOfMemoryError: The device has less memory.
    """

    def __init__(self, device: torch.device, nbytes: int, *, per_group: bool = False) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._computing = self._module.current_stream(device)
        self._copying = self._module.Stream(device)
        self._left = self._module.Event()
        self._per_group = per_group
        self.allocator = self._make_allocator(nbytes)
        self._times: PassTimes | None = None
        self._timeline: Recorder | None = None
        self.marker: PassTimes | Recorder | None = None
        self.staging: Staging | None = None

    def replace_allocator(self, nbytes: int, large: int | None = None) -> None:
        """Allocate other memory; the old one, in which nothing may be lent any more, is freed before.

        Args:
            nbytes: Bytes.
            large: Bytes from which groups lie at its end; None for all at its beginning.
        """
        self.synchronize()  # freed memory goes back to the stream that it was allocated for
        self.allocator = self._make_allocator(0)
        self.allocator = self._make_allocator(nbytes, large)

    def _make_allocator(self, nbytes: int, large: int | None = None) -> ArenaAllocator | PerGroupAllocator:
        if self._per_group:
            return PerGroupAllocator(self._device, nbytes)
        return ArenaAllocator(self._device, nbytes, large)

    @property
    def times(self) -> PassTimes | None:
        """Where uses and copies are timed; None for nowhere."""
        return self._times

    @times.setter
    def times(self, times: PassTimes | None) -> None:
        self._times = times
        self.marker = times or self._timeline

    @property
    def timeline(self) -> Recorder | None:
        """Where uses and copies are recorded for people; None for nowhere."""
        return self._timeline

    @timeline.setter
    def timeline(self, timeline: Recorder | None) -> None:
        self._timeline = timeline
        self.marker = self._times or timeline

    def measure(self) -> None:
        """Time uses and copies from now on."""
        # What makes the events must not refer to the engine: in a cycle its memory would outlive it.
        self.times = PassTimes(partial(self._module.Event, enable_timing=True))

    def begin(self, stream: Any) -> None:
        """Compute on a stream from now on."""
        if stream != self._computing:
            stream.wait_stream(self._computing)
            self._computing = stream
        self._left.record(stream)

    @property
    def stream(self) -> Any:
        """The stream that computes."""
        return self._computing

    @property
    def stream_of_caller(self) -> Any:
        """The stream that will compute if a call begins now."""
        return self._module.current_stream(self._device)

    def take(self, flat: FlatGroup) -> Transfer | None:
        """Find room for a group, whose copy is not begun yet; None if there is none."""
        allocator = self.allocator
        if flat.nbytes > allocator.lender.free and flat not in allocator.kept:  # most often so
            return None
        place = allocator.take(flat)
        if place is None:
            return None
        if flat.copied is None or self.marker is not None:
            flat.copied = self._module.Event(enable_timing=self.marker is not None)
        return Transfer(flat, place, flat.copied, self._computing)

    def give_back(self, transfer: Transfer) -> None:
        """Give back the room of a transfer that was not used. Its copy may still be under way."""
        if self.allocator.is_shared:  # copies run one after another, but others may have the memory next
            transfer.lent_to.wait_event(transfer.ready)
        self.allocator.give_back(transfer.flat, transfer.place)

    def copy(self, transfers: Iterable[Transfer]) -> None:
        """Begin copies, after all use so far of the memory that they fill."""
        copying, times, timeline, marker = self._copying, self._times, self._timeline, self.marker
        if self.allocator.is_shared:  # with what was computed until this moment
            self._left.record(self._computing)
        copying.wait_event(self._left)
        with self._module.stream(copying):
            for transfer in transfers:
                flat = transfer.flat
                begun = marker and marker.mark(copying)
                staging = None if flat.is_locked else self._staging_for(flat)
                source = flat.host if staging is None else staging.fill(flat.host)
                transfer.place.memory.copy_(source, non_blocking=True)
                transfer.ready.record(copying)
                if staging is not None:
                    staging.sent(source, transfer.ready)
                flat.note_versions()
                if times is not None:
                    times.copy(flat, begun, times.mark(copying))
                if timeline is not None:
                    timeline.add("copy", flat.name, begun, transfer.ready)

    def _staging_for(self, flat: FlatGroup) -> Staging | None:
        """Return what a group that isn't locked is copied through, if it has room there."""
        staging = self.staging
        return None if staging is None or staging.nbytes < flat.nbytes else staging

    def wait_for(self, transfer: Transfer) -> None:
        """Order what is computed from now on after a copy."""
        self._computing.wait_event(transfer.ready)
        if self.marker is not None:
            transfer.used = self.mark()

    def leave(self, transfer: Transfer) -> None:
        """Order all later copies after what was computed so far, with this transfer among others."""
        self._left.record(self._computing)
        if self._times is not None:
            self._times.use(transfer.flat, transfer.asked, transfer.used, self._times.mark(self._computing))
        if self._timeline is not None:
            self._timeline.add("stall", transfer.flat.name, transfer.asked, transfer.used)
            self.used(transfer.flat, transfer.used)
        if self.allocator.is_shared and transfer.lent_to != self._computing:
            transfer.lent_to.wait_stream(self._computing)
        self.allocator.give_back(transfer.flat, transfer.place)

    def mark(self) -> Any:
        """An event on the computing stream, where times are measured or a timeline is recorded."""
        return None if self.marker is None else self.marker.mark(self._computing)

    def used(self, flat: FlatGroup, begun: Any) -> None:
        """Take down, if a timeline is recorded, that a group was used from an event until now."""
        if self.timeline is not None:
            self.timeline.add("compute", flat.name, begun, self.mark())

    def end(self) -> None:
        """Wait until the device is done, before all memory is given back, whatever was lent."""
        self.synchronize()

    def synchronize(self) -> None:
        """Make the host wait for all copies and for all that was computed."""
        self._copying.synchronize()
        self._computing.synchronize()
