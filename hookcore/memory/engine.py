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

from hookcore.memory.packed import ALIGNMENT
from hookcore.memory.slab import Slab
from hookcore.memory.timing import PassTimes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hookcore.memory.host import Staging
    from hookcore.memory.packed import Packed
    from hookcore.memory.slab import Place
    from hookcore.memory.timeline import Recorder


@define(eq=False)
class Load:
    """A copy of a group on its way to the device, or there.

    Attributes:
        packed: What is copied.
        place: Where it goes.
        ready: Recorded after the copy.
        asked: Recorded before its use, and before the wait for it, where a timeline is recorded.
        used: Recorded at the beginning of its use, where times are measured.
    """

    packed: Packed
    place: Place
    ready: Any
    asked: Any = None
    used: Any = None


class CopyEngine:
    """Device memory for weights, and the streams that fill and use it.

    Args:
        device: The device.
        nbytes: Bytes of memory to allocate, now and once.

    Attributes:
        slab: The memory.
        times: Where uses and copies are timed; None for nowhere.
        timeline: Where they are recorded for people; None for nowhere.
        staging: Through which memory that isn't locked is copied; None if all of it is.

    Raises:
        torch.OutOfMemoryError: The device has less memory.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._computing = self._module.current_stream(device)
        self._copying = self._module.Stream(device)
        self._left = self._module.Event()
        self.slab = self._make_slab(nbytes)
        self.times: PassTimes | None = None
        self.timeline: Recorder | None = None
        self.staging: Staging | None = None

    def replace_slab(self, nbytes: int) -> None:
        """Allocates other memory; the old one, in which nothing may be lent any more, is freed before."""
        self.synchronize()  # freed memory goes back to the stream that it was allocated for
        del self.slab
        self.slab = self._make_slab(nbytes)

    def _make_slab(self, nbytes: int) -> Slab:
        with torch.inference_mode(False):
            memory = torch.empty(nbytes // ALIGNMENT * ALIGNMENT, dtype=torch.uint8, device=self._device)
        self._left.record(self._computing)  # for which it was allocated
        return Slab(memory)

    def measure(self) -> None:
        """Times uses and copies from now on."""
        # What makes the events must not refer to the engine: in a cycle its memory would outlive it.
        self.times = PassTimes(partial(self._module.Event, enable_timing=True))

    def begin(self) -> None:
        """Has the caller's stream compute from now on."""
        stream = self._module.current_stream(self._device)
        if stream != self._computing:
            stream.wait_stream(self._computing)
            self._computing = stream
        self._left.record(stream)

    def take(self, packed: Packed) -> Load | None:
        """Finds room for a group, whose copy is not begun yet; None if there is none."""
        start = self.slab.ranges.take(packed.nbytes)
        if start is None:
            return None
        is_timed = self.times is not None or self.timeline is not None
        if packed.copied is None or is_timed:
            packed.copied = self._module.Event(enable_timing=is_timed)
        return Load(packed, self.slab.place(packed, start), packed.copied)

    def give_back(self, load: Load) -> None:
        """Gives back a load's room. What was begun may go on: copies run one after another."""
        self.slab.ranges.give_back(load.place.start, load.packed.nbytes)

    def copy(self, loads: Iterable[Load]) -> None:
        """Begins copies, after all use so far of the memory that they fill."""
        copying, times, timeline = self._copying, self.times, self.timeline
        marker = times or timeline
        copying.wait_event(self._left)
        with self._module.stream(copying):
            for load in loads:
                packed = load.packed
                begun = marker and marker.mark(copying)
                staging = self._staging_for(packed)
                source = packed.host if staging is None else staging.fill(packed.host)
                load.place.memory.copy_(source, non_blocking=True)
                load.ready.record(copying)
                if staging is not None:
                    staging.sent(source, load.ready)
                packed.note_versions()
                if times is not None:
                    times.copy(packed, begun, load.ready)
                if timeline is not None:
                    timeline.add("copy", packed.name, begun, load.ready)

    def _staging_for(self, packed: Packed) -> Staging | None:
        """What a group has to be copied through, if it has to be and has room there."""
        staging = None if packed.is_locked else self.staging
        return None if staging is None or staging.nbytes < packed.nbytes else staging

    def wait_for(self, load: Load) -> None:
        """Has what is computed from now on come after a copy."""
        if self.timeline is not None:
            load.asked = self.timeline.mark(self._computing)
        self._computing.wait_event(load.ready)
        if (marker := self.times or self.timeline) is not None:
            load.used = marker.mark(self._computing)

    def leave(self, load: Load) -> None:
        """Has all later copies come after what was computed so far, with this load among others."""
        self._left.record(self._computing)
        if self.times is not None:
            self.times.use(load.packed, load.packed.nbytes, load.used, self.times.mark(self._computing))
        if self.timeline is not None:
            self.timeline.add("stall", load.packed.name, load.asked, load.used)
            self.used(load.packed, load.used)
        self.give_back(load)

    def mark(self) -> Any:
        """An event on the computing stream, if a timeline is recorded."""
        return None if self.timeline is None else self.timeline.mark(self._computing)

    def used(self, packed: Packed, begun: Any) -> None:
        """Takes down, if a timeline is recorded, that a group was used from an event until now."""
        if self.timeline is not None:
            self.timeline.add("compute", packed.name, begun, self.mark())

    def synchronize(self) -> None:
        """Has the host wait for all copies and for all that was computed."""
        self._copying.synchronize()
        self._computing.synchronize()
