"""Streams and events of the simulated device, with the methods of torch's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from hookcore.testing.simulator import state
from hookcore.testing.simulator.errors import SimulatorError

if TYPE_CHECKING:
    from hookcore.testing.simulator.devices import Mark, StreamState
    from hookcore.testing.simulator.machine import Machine

# torch's own, also after `install` has given these names to others.
NativeStream = torch.Stream
NativeEvent = torch.Event
_PRIVATE_USE_1 = 20  # c10::DeviceType::PrivateUse1


class Stream(torch.Stream):
    """A stream of a simulated device.

    Args:
        device: Where; the current device if it is left out.
        priority: Taken and ignored: all streams are alike.
        number: An existing stream; a new one if it is left out.
    """

    def __new__(
        cls,
        device: torch.device | str | int | None = None,
        priority: int = 0,  # noqa: ARG004
        *,
        number: int | None = None,
    ) -> Self:
        """Make a stream, or a further object for one that there is.

        Raises:
            RuntimeError: The device has no streams; torch's own words.
        """
        index = state.device_index(device)
        if number is None:
            machine = state.get_machine()
            if "Stream" in machine.devices[index].profile.lacks:
                raise RuntimeError("Backend doesn't support create a new Stream.")
            with machine.lock:
                number = machine.devices[index].add_stream().key[1]
        return super().__new__(cls, stream_id=number, device_index=index, device_type=_PRIVATE_USE_1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._entered: list[tuple[int, int]] = []

    @property
    def state(self) -> StreamState:
        """What the machine knows of it."""
        return _state_of(self)

    def synchronize(self) -> None:
        """Let the host wait for all that the stream was given."""
        machine = state.get_machine()
        with machine.lock:
            machine.reach("synchronize")
            machine.captures.host_waits_for(self.state)
            machine.host_waits(self.state.clock, self.state.free_at)
            machine.findings.raise_found()

    def query(self) -> bool:
        """Return whether all is done that the stream was given."""
        machine = state.get_machine()
        with machine.lock:
            machine.captures.host_waits_for(self.state)
            return machine.host_asks(self.state.clock, self.state.free_at)

    def wait_event(self, event: torch.Event) -> None:
        """Let what the stream is given from now on wait for an event."""
        event.wait(self)

    def wait_stream(self, stream: torch.Stream) -> None:
        """Let what this stream is given from now on wait for all that another one was given so far."""
        machine = state.get_machine()
        with machine.lock:
            machine.reach("wait_stream")
            machine.wait(self.state, machine.mark(_state_of(stream)))

    def is_capturing(self) -> bool:
        """Return whether what the stream is given is captured."""
        return self.state.capture is not None

    def record_event(self, event: torch.Event | None = None) -> torch.Event:
        """Mark the end of what the stream was given so far."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> Self:
        current = state.current
        self._entered.append((current.device, current.streams.get(self.device_index, 0)))
        current.device = self.device_index
        current.streams[self.device_index] = self.stream_id
        return self

    def __exit__(self, *error: object) -> None:
        device, number = self._entered.pop()
        state.current.device = device
        state.current.streams[self.device_index] = number

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NativeStream) or other.device_type != self.device_type:
            return False
        return (self.device_index, self.stream_id) == (other.device_index, other.stream_id)

    def __hash__(self) -> int:
        return hash((self.device_index, self.stream_id))

    def __repr__(self) -> str:
        return f"<stream {self.stream_id} of sim:{self.device_index}>"


class Event(torch.Event):
    """A mark in a stream, for other streams and the host to wait for.

    Args:
        device: Taken and ignored: an event belongs to the stream that records it.
        enable_timing: Whether `elapsed_time` may be asked.
        blocking: Taken and ignored.
        interprocess: Must be False.
    """

    def __new__(
        cls,
        device: torch.device | str | int | None = None,  # noqa: ARG004
        *,
        enable_timing: bool = False,
        blocking: bool = False,  # noqa: ARG004
        interprocess: bool = False,
    ) -> Self:
        """Make an event that is not recorded yet.

        Raises:
            SimulatorError: It is to be shared between processes.
        """
        if interprocess:
            raise SimulatorError("events of a simulated device cannot be shared between processes")
        made: Self = super().__new__(cls, state.DEVICE_TYPE, enable_timing=enable_timing)
        return made

    def __init__(self, *args: Any, enable_timing: bool = False, **kwargs: Any) -> None:
        self._times = enable_timing
        self._mark: Mark | None = None

    def record(self, stream: torch.Stream | None = None) -> None:
        """Mark the end of what a stream, or the current one, was given so far.

        Raises:
            RuntimeError: The device has no events; torch's own words.
        """
        machine = state.get_machine()
        if "Event" in machine.devices[state.current.device].profile.lacks:
            raise RuntimeError("Backend doesn't support events.")
        with machine.lock:
            machine.reach("record_event")
            self._mark = machine.mark(_state_of(stream))

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Let what a stream, or the current one, is given from now on wait for the event."""
        machine = state.get_machine()
        with machine.lock:
            machine.reach("wait_event")
            if self._mark is not None:
                machine.wait(_state_of(stream), self._mark)

    def query(self) -> bool:
        """Return whether all is done that comes before the event; so too before it is recorded."""
        if self._mark is None:
            return True
        machine = state.get_machine()
        with machine.lock:
            return _is_done(machine, self._mark)

    def synchronize(self) -> None:
        """Let the host wait for the event."""
        machine = state.get_machine()
        with machine.lock:
            machine.reach("synchronize")
            if self._mark is not None:
                machine.captures.host_waits_for_event(self._mark.capture)
                machine.host_waits(self._mark.clock, self._mark.time)
                machine.findings.raise_found()

    def elapsed_time(self, end_event: torch.Event) -> float:
        """Virtual milliseconds from this event to another one.

        Raises:
            SimulatorError: One of them is not recorded, or was made without enable_timing=True.
            RuntimeError: One of them is not done, and the profile has it raise then; torch's own words.
        """
        if not (isinstance(end_event, Event) and self._times and end_event._times):
            raise SimulatorError("only events that were made with enable_timing=True can be compared")
        if self._mark is None or end_event._mark is None:
            raise SimulatorError("both events must be recorded before the time between them is asked")
        machine = state.get_machine()
        if machine.devices[0].profile.times_only_done_events:
            with machine.lock:
                done = [_is_done(machine, mark) for mark in (self._mark, end_event._mark)]
            if not all(done):
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (end_event._mark.time - self._mark.time) * 1e3

    def __repr__(self) -> str:
        return f"<event of sim, {'not recorded' if self._mark is None else 'recorded'}>"


def _is_done(machine: Machine, mark: Mark) -> bool:
    machine.captures.host_waits_for_event(mark.capture)
    return machine.host_asks(mark.clock, mark.time)


def _state_of(stream: torch.Stream | None) -> StreamState:
    if stream is None:
        return state.current_stream_state(state.current.device)
    if not isinstance(stream, NativeStream) or stream.device.type != state.DEVICE_TYPE:
        raise SimulatorError(f"{stream} is no stream of a simulated device")
    return state.get_machine().devices[stream.device_index].streams[stream.stream_id]
