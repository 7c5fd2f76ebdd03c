"""What a machine is made of: devices, their streams, and copies that are on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from attrs import define, field

if TYPE_CHECKING:
    from hookcore.testing.simulator.memory import MemoryPool
    from hookcore.testing.simulator.ordering import Clock, Operation, StreamKey
    from hookcore.testing.simulator.profiles import DeviceProfile


@define(eq=False)
class StreamState:
    """What one stream does.

    Attributes:
        key: Its device and number.
        clock: What is done before its next operation.
        tick: How many operations it was given.
        heard: The wait of the host, by its number, up to which the clock knows what the host knows.
        free_at: When its next operation can start, for what it has been told to wait for; seconds.
        end: When its last operation ends; seconds.
    """

    key: StreamKey
    clock: Clock = field(factory=dict)
    tick: int = 0
    heard: int = 0
    free_at: float = 0.0
    end: float = 0.0


@define(eq=False)
class Device:
    """One simulated device."""

    index: int
    profile: DeviceProfile
    memory: MemoryPool
    streams: dict[int, StreamState] = field(factory=dict)
    engines: dict[str, float] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.add_stream()

    def add_stream(self) -> StreamState:
        """Makes a stream; the first, of number 0, is the default stream."""
        number = len(self.streams)
        self.streams[number] = StreamState((self.index, number))
        return self.streams[number]


class HostCopy(Protocol):
    """A copy from or to pinned host memory that the host has not waited for."""

    operation: Operation

    def land(self) -> None:
        """Is told that it is done, if it has not been told before."""
