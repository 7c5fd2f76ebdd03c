"""What a machine is made of: devices, their streams, and copies that are on their way."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from attrs import define, field, frozen

from hookcore.testing.simulator.caching import CachingAllocator
from hookcore.testing.simulator.device_memory import DeviceMemory

if TYPE_CHECKING:
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
        queued: When each operation ends that may still be in its queue.
        capture: The capture of a graph that takes what it is given; None if that runs.
    """

    key: StreamKey
    clock: Clock = field(factory=dict)
    tick: int = 0
    heard: int = 0
    free_at: float = 0.0
    end: float = 0.0
    queued: deque[float] = field(factory=deque)
    capture: Capture | None = None

    @property
    def is_default(self) -> bool:
        """Whether it is the default stream of its device."""
        return self.key[1] == 0

    def queue(self, limit: int) -> float:
        """Queue the last operation; return when there was room for it, if no more than so many wait."""
        self.queued.append(self.end)
        begun = 0.0
        while len(self.queued) > limit:
            begun = self.queued.popleft()
        return begun


@define(eq=False)
class Capture:
    """A capture of what some streams are given.

    Attributes:
        origin: The stream that it began on.
        mode: Whose unsafe calls break it; one of `capture.MODES`.
        thread: The thread that began it.
        streams: The origin, and the streams that have waited for one of these since it began.
        is_broken: Whether an error has made it useless.
        is_over: Whether it has ended.
    """

    origin: StreamState
    mode: str
    thread: int
    streams: list[StreamState] = field(factory=list)
    is_broken: bool = False
    is_over: bool = False

    def add(self, stream: StreamState) -> None:
        """Capture one more stream."""
        stream.capture = self
        self.streams.append(stream)

    def is_joined(self) -> bool:
        """Return whether the origin waits for all that the other streams were given."""
        return all(self.origin.clock.get(it.key, 0) >= it.tick for it in self.streams)


@define(eq=False)
class Device:
    """One simulated device.

    Attributes:
        index: Its number.
        profile: What it can do; see `set_profile`.
        memory: Its memory.
        streams: Its streams by number.
        engines: When each engine is free; seconds.
        loaded: Names of the kernels that were launched before.
    """

    index: int
    profile: DeviceProfile
    memory: DeviceMemory = field(factory=DeviceMemory)
    streams: dict[int, StreamState] = field(factory=dict)
    engines: dict[str, float] = field(factory=dict)
    loaded: set[str] = field(factory=set)

    def __attrs_post_init__(self) -> None:
        self.add_stream()
        self.set_profile(self.profile)

    def set_profile(self, profile: DeviceProfile) -> None:
        """Make it another device, with empty caches; what is allocated stays."""
        self.profile = profile
        self.memory.capacity = profile.memory
        self.memory.cache = CachingAllocator() if profile.caching else None
        self.loaded = set()

    def add_stream(self) -> StreamState:
        """Make a stream; the first, of number 0, is the default stream."""
        number = len(self.streams)
        self.streams[number] = StreamState((self.index, number))
        return self.streams[number]


@frozen(eq=False)
class Mark:
    """A point in what a stream was given.

    Attributes:
        clock: What is done there.
        time: When, in seconds.
        capture: The capture that the stream was in.
    """

    clock: Clock
    time: float
    capture: Capture | None = None


class HostCopy(Protocol):
    """A copy from or to pinned host memory that the host has not waited for."""

    operation: Operation

    def land(self) -> None:
        """Note that it is done, unless that is noted already."""
