"""Memory to the byte: who has it, since when, and when it comes back."""

from __future__ import annotations

import itertools
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from hookcore.testing.simulator.ordering import Clock, History, join

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hookcore.testing.simulator.ordering import StreamKey

_numbers = itertools.count(1)


@define(eq=False)
class Block:
    """One allocation, on a device or page-locked on the host.

    Attributes:
        device: Index of the device; None on the host.
        nbytes: Its size.
        address: Where its bytes really are.
        keeper: Keeps these bytes from being freed by Python.
        stream: The stream that it was allocated on, to which its memory returns.
        made_by: The operation that allocated it.
        history: Who touched it.
        recorded: Streams that `record_stream` named.
        sources: For ranges of bytes, the address of the host memory that was last copied there.
        copies: Of page-locked memory, the copies from and to it that are on their way.
        number: Counts allocations.
    """

    device: int | None
    nbytes: int
    address: int
    keeper: Any
    stream: StreamKey
    made_by: str
    history: History = field(factory=History)
    recorded: frozenset[StreamKey] = frozenset()
    sources: Mapping[tuple[int, int], int] = MappingProxyType({})
    copies: tuple[Any, ...] = ()
    number: int = field(factory=_numbers.__next__)

    def fill(self, start: int, stop: int, source: int) -> None:
        """Notes from where a range of bytes was filled."""
        kept = {(low, high): it for (low, high), it in self.sources.items() if high <= start or stop <= low}
        self.sources = kept | {(start, stop): source}

    def __str__(self) -> str:
        where = "pinned host memory" if self.device is None else f"sim:{self.device}"
        return f"block {self.number} of {self.nbytes} B on {where}, made by {self.made_by}"


@frozen(eq=False)
class _Held:
    """Freed memory that other streams may still use: it comes back when they have passed a point."""

    nbytes: int
    until: float
    clock: Clock


@define(eq=False)
class MemoryPool:
    """Counts the bytes of one device, or of the host's page-locked memory.

    Attributes:
        capacity: Bytes that there are; None for no limit.
        allocated: Bytes in use, with those that are held for streams named by `record_stream` (CUDA calls
            this "active"). Nothing is rounded up.
        peak: The most bytes that ever were.
    """

    capacity: int | None = None
    allocated: int = 0
    peak: int = 0
    _held: list[_Held] = field(factory=list)

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes are free."""
        return self.capacity is None or self.allocated + nbytes <= self.capacity

    def take(self, nbytes: int) -> None:
        """Counts an allocation."""
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)

    def give_back(self, nbytes: int) -> None:
        """Counts a free."""
        self.allocated -= nbytes

    def hold(self, nbytes: int, until: float, clock: Clock) -> None:
        """Counts a free that takes effect at a later time."""
        self._held.append(_Held(nbytes, until, clock))

    def release(self, now: float) -> None:
        """Gives back what was held until now or earlier."""
        if self._held:
            self.allocated -= sum(it.nbytes for it in self._held if it.until <= now)
            self._held = [it for it in self._held if it.until > now]

    def all_held(self) -> tuple[Clock, float] | None:
        """What has to be waited for until nothing is held any more; None if nothing is."""
        if not self._held:
            return None
        clock: Clock = {}
        for it in self._held:
            join(clock, it.clock)
        return clock, max(it.until for it in self._held)
