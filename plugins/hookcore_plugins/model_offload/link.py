"""Copies from host memory to a device, on a stream of their own where it has streams."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import define

from hookcore.memory import PinnedMemory, free_device_bytes, has_streams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookcore.memory import FlatGroup, Recorder


@define(eq=False)
class Transfer:
    """A copy of a component's weights on the device, or on its way there.

    When the last reference to it goes, the stream that its memory belongs to waits for all that fills or uses
    it, also if that is because nobody keeps the model any more.

    Attributes:
        memory: All of it, uint8.
        views: What each tensor is there.
        name: For people.
        ready: Recorded after the copy; None where the host has waited for it.
        made_on: The stream to which its memory belongs.
        used_on: The stream that computed with it last; None as long as none has.
    """

    memory: torch.Tensor
    views: Sequence[torch.Tensor]
    name: str = ""
    ready: Any = None
    made_on: Any = None
    used_on: Any = None

    def __del__(self) -> None:
        """Order the next use of the memory after its copy and its use."""
        if self.made_on is None or sys.is_finalizing():
            return
        self.made_on.wait_event(self.ready)
        if self.used_on is not None and self.used_on != self.made_on:
            self.made_on.wait_stream(self.used_on)


class Link:
    """The way to a device.

    Memory belongs to the stream that computes: what is freed there can be used again without waiting. So the
    stream that copies waits for it before it fills memory, and it waits for that stream's copies before
    memory is freed (see `Transfer`). The host waits for neither.

    Args:
        device: The device.

    Attributes:
        copies_ahead: Whether copies run beside computing.
        recorder: Times copies and waits for them; None for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copies_ahead = has_streams(device)
        self._module: Any = torch.get_device_module(device) if self.copies_ahead else None
        self.recorder: Recorder | None = None
        self._host: PinnedMemory | None = None
        self._copying: Any = None

    @property
    def host(self) -> PinnedMemory:
        """Makes memory to copy from, locked where there is a use for that."""
        if self._host is None:
            self._host = PinnedMemory(self._device, None if self.copies_ahead else 0)
        return self._host

    @torch.inference_mode(False)  # what is made here outlives the mode
    def copy(self, flat: FlatGroup) -> Transfer:
        """Begin a copy.

        Raises:
            torch.OutOfMemoryError: The device has no room for it.
        """
        memory = torch.empty(flat.nbytes, dtype=torch.uint8, device=self._device)
        transfer = Transfer(memory, flat.views(memory), flat.name)
        if not self.copies_ahead:
            memory.copy_(flat.host)
            return transfer
        stream = self._module.current_stream(self._device)
        if self._copying is None:
            self._copying = self._module.Stream(self._device)
        self._copying.wait_stream(stream)
        begun = self.mark(self._copying)
        with self._module.stream(self._copying):
            memory.copy_(flat.host, non_blocking=True)
        transfer.ready = self._module.Event()
        transfer.ready.record(self._copying)
        self.add("copy", flat.name, begun, self._copying)
        transfer.made_on = stream
        return transfer

    def use(self, transfer: Transfer) -> None:
        """Order what is computed from now on after the copy and after what used it before."""
        if not self.copies_ahead:
            return
        stream = self._module.current_stream(self._device)
        if transfer.used_on is None:
            asked = self.mark(stream)
            stream.wait_event(transfer.ready)
            self.add("stall", transfer.name, asked, stream)
        elif transfer.used_on != stream:
            stream.wait_stream(transfer.used_on)
        transfer.used_on = stream

    @property
    def stream(self) -> Any:
        """The stream that computes."""
        return self._module.current_stream(self._device)

    def mark(self, stream: Any) -> Any:
        """An event on a stream, where times are recorded."""
        return None if self.recorder is None else self.recorder.mark(stream)

    def add(self, kind: Literal["copy", "compute", "stall"], name: str, begun: Any, stream: Any) -> None:
        """Record, where times are recorded, what took from an event until now on a stream."""
        if self.recorder is not None and begun is not None:
            self.recorder.add(kind, name, begun, self.recorder.mark(stream))

    @property
    def allocated(self) -> int:
        """Bytes of the device that tensors take."""
        return int(self._module.memory_allocated(self._device))

    @property
    def peak(self) -> int:
        """The most bytes that tensors have taken."""
        return int(self._module.max_memory_allocated(self._device))

    @property
    def room(self) -> int:
        """Bytes of the device that tensors of this process could take besides."""
        return free_device_bytes(self._device) or 0
