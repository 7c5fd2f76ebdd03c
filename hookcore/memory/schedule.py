"""Spends a device's memory on weights: what stays, and how much room is left for what comes and goes.

A copy can begin when the one before it has ended and there is room for it, and room comes when a group has
been used. So with groups of b bytes, which take c seconds to compute with, over a link of B bytes a second:

    copy_end[i]    = max(copy_end[i-1], compute_end of what makes room) + b[i] / B
    compute_end[i] = max(compute_end[i-1], copy_end[i]) + c[i]

`pass_seconds` follows this recurrence with the very ranges that are lent when the model runs;
`choose_layout` takes, of many ways to choose what stays, the one that it finds fastest. All of it is pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import frozen

from hookcore.memory.budget import spread_evenly
from hookcore.memory.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

T = TypeVar("T", bound=Hashable)

_PASSES = 5  # the first ones fill memory, the others show how it goes on
_WARM_UP = 2
_ROOM = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # for what comes and goes, in sizes of the largest of it
_SIZES = 12  # different sizes from which everything stays that are tried


@frozen
class Use(Generic[T]):
    """One use of a group in a pass.

    Attributes:
        group: What is used; it may be used again in the same pass.
        nbytes: Bytes of memory that it takes.
        compute: Seconds from the beginning of this use to the next one, if nothing is waited for.
        copy: Seconds that its copy takes.
    """

    group: T
    nbytes: int
    compute: float
    copy: float


@frozen
class Layout(Generic[T]):
    """How memory is divided.

    Attributes:
        resident: The groups that stay, in the order of their use.
        ring: Bytes for those that come and go.
        seconds: How long a pass is expected to take.
    """

    resident: tuple[T, ...]
    ring: int
    seconds: float


def pass_seconds(uses: Sequence[Use[T]], resident: Collection[T], ring: int) -> float | None:
    """Seconds that a pass takes once memory has filled; None if the ring is too small for a group.

    Args:
        uses: The uses of one pass, in order; the next pass follows at once.
        resident: The groups that stay.
        ring: Bytes for those that come and go.
    """
    streamed = [use for use in uses if use.group not in resident]
    if not streamed:
        return sum(use.compute for use in uses)
    if max(use.nbytes for use in streamed) > ring:
        return None
    return _Run(uses, resident, streamed, ring).seconds()


class _Run(Generic[T]):
    """Some passes, followed step by step."""

    def __init__(
        self, uses: Sequence[Use[T]], resident: Collection[T], streamed: Sequence[Use[T]], ring: int
    ) -> None:
        self._uses = uses
        self._resident = resident
        self._streamed = streamed
        self._ranges = Ranges(ring)
        self._ahead: dict[T, tuple[Use[T], int, float]] = {}  # where it lies, and when it is there
        self._position = 0  # of the next streamed use, in all passes
        self._copied = 0.0  # when the last copy ends

    def seconds(self) -> float:
        now = 0.0
        ends = []
        held: tuple[int, Use[T]] | None = None
        self._issue(None, now)
        for _ in range(_PASSES):
            for use in self._uses:
                if held is not None and held[1].group != use.group:
                    self._ranges.give_back(held[0], held[1].nbytes)
                    held = None
                    self._issue(None, now)
                if use.group not in self._resident:
                    self._position += 1
                    if held is None:
                        start, there = self._bring(use, now)
                        held = start, use
                        now = max(now, there)
                        self._issue(use.group, now)
                now += use.compute
            ends.append(now)
        return (ends[-1] - ends[_WARM_UP - 1]) / (_PASSES - _WARM_UP)

    def _bring(self, use: Use[T], now: float) -> tuple[int, float]:
        """Where a group lies that is used now, and when it is there."""
        if use.group not in self._ahead:
            for other, start, _ in self._ahead.values():  # brought before its time, it is in the way
                self._ranges.give_back(start, other.nbytes)
            self._ahead.clear()
            self._copy(use, now)
        _, start, there = self._ahead.pop(use.group)
        return start, there

    def _issue(self, in_use: T | None, now: float) -> None:
        """Begins the copies of what is used next, as far as there is room."""
        count = len(self._streamed)
        while len(self._ahead) < count:
            use = self._streamed[(self._position + len(self._ahead)) % count]
            if use.group in self._ahead or use.group == in_use or not self._copy(use, now):
                return

    def _copy(self, use: Use[T], now: float) -> bool:
        """Begins a copy, if there is room for it."""
        start = self._ranges.take(use.nbytes)
        if start is None:
            return False
        self._copied = max(self._copied, now) + use.copy
        self._ahead[use.group] = use, start, self._copied
        return True


def choose_layout(uses: Sequence[Use[T]], budget: int, least_ring: int = 0) -> Layout[T] | None:
    """Chooses what stays in memory; None if the budget is too small for the largest group.

    The smallest stay, as each would be a copy that takes longer to begin than to make. Of the others the
    largest stay, down to a size, as room for what comes and goes is a multiple of its largest group. The rest
    of what stays is spread over the pass in two ways: evenly by bytes, and so that what is copied is spread
    evenly over the time of computing. All of these are tried.

    Args:
        uses: The uses of one pass, in order.
        budget: Bytes for all groups.
        least_ring: Bytes that the ring has at least, for groups that this pass didn't use.
    """
    sizes = {use.group: use.nbytes for use in uses}
    if sum(sizes.values()) + least_ring <= budget:
        return Layout(tuple(sizes), least_ring, sum(use.compute for use in uses))
    best: Layout[T] | None = None
    for resident in _candidates(uses, sizes, budget, least_ring):
        ring = budget - sum(sizes[group] for group in resident)
        seconds = pass_seconds(uses, resident, ring)
        if seconds is not None and (best is None or seconds < best.seconds):
            best = Layout(tuple(group for group in sizes if group in resident), ring, seconds)
    return best


def _candidates(
    uses: Sequence[Use[T]], sizes: dict[T, int], budget: int, least_ring: int
) -> Iterator[frozenset[T]]:
    nothing: frozenset[T] = frozenset()
    tried = {nothing}
    if least_ring <= budget:
        yield nothing  # where the budget is just enough for the largest group
    small = _smallest(sizes, (budget - least_ring) // 100)
    for largest in _some(sorted(set(sizes.values()), reverse=True)):
        staying = small.union(group for group, nbytes in sizes.items() if nbytes > largest)
        spare = budget - sum(sizes[group] for group in staying)
        for times, spread in itertools.product(_ROOM, (_evenly_by_bytes, _evenly_in_time)):
            quota = spare - max(int(times * largest), least_ring)
            if quota >= 0 and (chosen := staying | spread(uses, staying, quota)) not in tried:
                tried.add(chosen)
                yield chosen


def _smallest(sizes: dict[T, int], quota: int) -> frozenset[T]:
    """The smallest groups, as many as a quota of bytes has room for."""
    chosen = set()
    for group in sorted(sizes, key=sizes.__getitem__):
        quota -= sizes[group]
        if quota < 0:
            break
        chosen.add(group)
    return frozenset(chosen)


def _some(sizes: list[int]) -> list[int]:
    """At most so many of the sizes, among them the largest."""
    return sizes[:: -(-len(sizes) // _SIZES)]


def _evenly_by_bytes(uses: Sequence[Use[T]], staying: Collection[T], quota: int) -> set[T]:
    """Takes groups all along the pass."""
    return set(spread_evenly({use.group: use.nbytes for use in uses if use.group not in staying}, quota))


def _evenly_in_time(uses: Sequence[Use[T]], staying: Collection[T], quota: int) -> set[T]:
    """Leaves out whatever can be copied, at a steady pace, in the time that computing takes."""

    def chosen_at(pace: float) -> dict[T, int]:
        allowed = 0.0
        chosen = {}
        for use in uses:
            allowed += use.compute * pace
            if use.group not in staying and use.group not in chosen:
                if allowed >= use.copy:
                    allowed -= use.copy
                else:
                    chosen[use.group] = use.nbytes
        return chosen

    return set(_largest_within(quota, chosen_at))


def _largest_within(
    quota: int, chosen_at: Callable[[float], dict[T, int]], *, steps: int = 30
) -> dict[T, int]:
    """Bisects for the slowest pace at which what is chosen keeps to a quota of bytes."""
    low, high = 0.0, 1024.0
    best: dict[T, int] = {}
    for _ in range(steps):
        middle = (low + high) / 2
        chosen = chosen_at(middle)
        if sum(chosen.values()) <= quota:
            high, best = middle, chosen
        else:
            low = middle
    return best
