"""What happens before what: vector clocks, and the history of who touched a piece of memory.

The clock of a stream says, for each stream, up to which of its operations everything is known to be done
before the next operation of this one (Fidge and Mattern, 1988). Two operations that touch the same bytes,
one of them writing, race unless one is in the other's clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

StreamKey = tuple[int, int]
"""Index of the device and number of the stream."""

Clock = dict[StreamKey, int]
"""Stream to the number of its operations that are known to be done."""


def join(clock: Clock, other: Clock) -> None:
    """Add to a clock all that another one knows."""
    for stream, tick in other.items():
        if clock.get(stream, 0) < tick:
            clock[stream] = tick


@frozen(eq=False)
class Operation:
    """Something that a stream does: a kernel or a copy.

    Attributes:
        name: The operator's name.
        stream: Where it runs.
        tick: It is the stream's operation of this number, counted from 1.
    """

    name: str
    stream: StreamKey
    tick: int

    def is_before(self, clock: Clock) -> bool:
        """Return whether what has this clock comes after the operation."""
        return clock.get(self.stream, 0) >= self.tick


@define(eq=False)
class Access:
    """An operation's touch of the bytes from `start` up to `stop` of a block."""

    start: int
    stop: int
    writes: bool
    operation: Operation


class History:
    """The accesses of one block of memory that a later access could still race with."""

    __slots__ = ("_accesses",)

    def __init__(self) -> None:
        self._accesses: list[Access] = []

    def __iter__(self) -> Iterator[Access]:
        return iter(self._accesses)

    def conflict(self, start: int, stop: int, writes: bool, clock: Clock) -> Access | None:
        """The first earlier access that an access with this clock would race with."""
        for earlier in self._accesses:
            if (
                (writes or earlier.writes)
                and earlier.start < stop
                and start < earlier.stop
                and not earlier.operation.is_before(clock)
            ):
                return earlier
        return None

    def record(self, access: Access, known: Clock) -> None:
        """Add an access, and forgets those that no later one can race with.

        Whatever comes after a write also comes after all that the write itself came after, so a write
        replaces the accesses of its bytes, and a read replaces reads of its bytes by its own stream.

        Args:
            access: The access.
            known: What the host knows to be done, and so everything that it issues from now on.
        """
        if self._accesses:
            self._accesses = [
                it for it in self._accesses if not (_replaces(access, it) or it.operation.is_before(known))
            ]
        self._accesses.append(access)

    def forget(self) -> None:
        """Forget all accesses: they are done and everybody knows."""
        self._accesses = []


def _replaces(new: Access, old: Access) -> bool:
    if old.start < new.start or new.stop < old.stop:
        return False
    return new.writes or (not old.writes and old.operation.stream == new.operation.stream)
