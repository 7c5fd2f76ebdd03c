"""The memory of one device: who has how much of it, on which stream, and when it comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field, frozen

from hookcore.testing.simulator.addresses import ADDRESSES
from hookcore.testing.simulator.memory import ByteCount
from hookcore.testing.simulator.ordering import Clock, join

if TYPE_CHECKING:
    from hookcore.testing.simulator.caching import CachingAllocator
    from hookcore.testing.simulator.memory import Block


@frozen(eq=False)
class _Held:
    """A freed block that other streams may still use: it comes back when they have passed a point."""

    block: Block
    until: float
    clock: Clock


@define(eq=False)
class DeviceMemory:
    """Counts the bytes of a device.

    Without a cache sizes are exact, and what is freed can be used by everybody.

    Attributes:
        capacity: Bytes that there are; None for no limit.
        count: Bytes in use, with those that are held for streams named by `record_stream` (CUDA calls this
            "active").
        cache: torch's caching allocator, where it is simulated.
        by_stream: Bytes in use by the stream that they were allocated on.
        most_reserved: The most bytes that were reserved at once.
    """

    capacity: int | None = None
    count: ByteCount = field(factory=ByteCount)
    cache: CachingAllocator | None = None
    by_stream: dict[int, ByteCount] = field(factory=dict)
    most_reserved: int = 0
    _held: list[_Held] = field(factory=list)

    @property
    def allocated(self) -> int:
        """Bytes in use."""
        return self.count.allocated

    @property
    def reserved(self) -> int:
        """Bytes that are not free for others: those in use and, with a cache, those that it keeps."""
        if self.cache is None:
            return self.count.allocated
        return self.cache.reserved.total() + self.count.allocated - self.cache.allocated

    def fits(self, stream: int, nbytes: int) -> bool:
        """Return whether a stream can have so many bytes more."""
        if self.capacity is None:
            return True
        missing = nbytes if self.cache is None else self.cache.missing(stream, nbytes)
        return self.reserved + missing <= self.capacity

    def take(self, block: Block) -> None:
        """Count a new block, and give it addresses."""
        stream = block.stream[1]
        if self.cache is None or not block.nbytes:
            block.address = ADDRESSES.take(block.nbytes)
        else:
            block.chunk = self.cache.allocate(stream, block.nbytes)
            block.address = block.chunk.address
        taken = block.taken
        self.count.take(taken)
        count = self.by_stream.get(stream)
        if count is None:
            count = self.by_stream[stream] = ByteCount()
        count.take(taken)
        if self.cache is not None:
            self.most_reserved = max(self.most_reserved, self.reserved)

    def give_back(self, block: Block) -> None:
        """Count a freed block."""
        taken = block.taken
        self.count.give_back(taken)
        self.by_stream[block.stream[1]].give_back(taken)
        if block.chunk is not None:
            block.chunk.free()

    def hold(self, block: Block, until: float, clock: Clock) -> None:
        """Count a free that takes effect at a later time."""
        self._held.append(_Held(block, until, clock))

    def release(self, now: float) -> None:
        """Give back the blocks that were held until now or earlier."""
        if self._held:
            for it in self._held:
                if it.until <= now:
                    self.give_back(it.block)
            self._held = [it for it in self._held if it.until > now]

    def all_held(self) -> tuple[Clock, float] | None:
        """Return what has to be waited for until nothing is held any more; None if nothing is."""
        if not self._held:
            return None
        clock: Clock = {}
        for it in self._held:
            join(clock, it.clock)
        return clock, max(it.until for it in self._held)

    def reset_peaks(self) -> None:
        """Begin new peaks from what is in use."""
        for count in (self.count, *self.by_stream.values()):
            count.reset_peak()
        self.most_reserved = self.reserved
