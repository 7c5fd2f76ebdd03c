"""Spends a device's memory on weights: what stays, and how much room is left for what comes and goes.

Of many ways to choose what stays, `choose_layout` takes the one that `pass_seconds` finds fastest, and
improves it by small changes. All of it is pure.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import frozen

from hookcore.memory.planning.free_list import ByteQuota, FreeList
from hookcore.memory.planning.residency import spread_evenly
from hookcore.memory.planning.schedule import pass_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from hookcore.memory.planning.schedule import Use

T = TypeVar("T", bound=Hashable)

_ROOM = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # for what comes and goes, in sizes of the largest of it
_SIZES = 12  # different sizes from which everything stays that are tried
_LARGE = (1.0, 0.7, 0.4)  # of the largest that comes and goes: from where on groups lie at the end
_BEST = 24  # choices for which that is tried
_TRIES = 300  # changes
_FOLLOWED = 100_000  # uses in all that these may follow, which takes less than a second
_SWAPS = 0.6  # of all changes
_FLIPS = 4  # groups that the other changes have stay or not, at most
_FAST = 1.0001  # times as long as computing; there is nothing to gain
_NEAR = 6  # groups of one size that can stand in for one that stays


@frozen
class Layout(Generic[T]):
    """How memory is divided.

    Attributes:
        resident: The groups that stay, in the order of their use.
        ring: Bytes for those that come and go.
        seconds: How long a pass is expected to take.
        large: Bytes from which groups lie at the ring's end; None for all at its beginning.
    """

    resident: tuple[T, ...]
    ring: int
    seconds: float
    large: int | None = None


def choose_layout(
    uses: Sequence[Use[T]],
    budget: int,
    least_ring: int = 0,
    *,
    ahead: int | None = None,
    anywhere: bool = False,
) -> Layout[T] | None:
    """Choose what stays in memory; None if the budget is too small for the largest group.

    The smallest stay, as each would be a copy that takes longer to begin than to make. Of the others the
    largest stay, down to a size, as room for what comes and goes is a multiple of its largest group. The rest
    of what stays is spread over the pass in two ways: evenly by bytes, and so that what is copied is spread
    evenly over the time of computing. All of these are tried, and the fastest is changed as long as that
    makes it faster.

    Args:
        uses: The uses of one pass, in order.
        budget: Bytes for all groups.
        least_ring: Bytes that the ring has at least, for groups that this pass didn't use.
        ahead: How many groups may be copied ahead of use; None for as many as there is room for.
        anywhere: Whether what comes can lie anywhere, so that there are no gaps.
    """
    sizes = {use.group: use.nbytes for use in uses}
    if sum(sizes.values()) + least_ring <= budget:
        return Layout(tuple(sizes), least_ring, sum(use.seconds for use in uses))
    search = _Search(uses, sizes, budget, least_ring, ahead=ahead, anywhere=anywhere)
    found = [
        (seconds, number, resident)
        for number, resident in enumerate(_candidates(uses, sizes, budget, least_ring))
        if (seconds := search.judge(resident, None)) is not None
    ]
    if not anywhere:
        for (_, _, resident), share in itertools.product(sorted(found)[:_BEST], _LARGE):
            search.judge(resident, share)
    search.improve(min(_TRIES, _FOLLOWED // len(uses)))
    return search.best


class _Search(Generic[T]):
    """The fastest layout so far, and what can be tried instead of it."""

    def __init__(
        self,
        uses: Sequence[Use[T]],
        sizes: dict[T, int],
        budget: int,
        least_ring: int,
        *,
        ahead: int | None,
        anywhere: bool,
    ) -> None:
        self._uses = uses
        self._sizes = sizes
        self._budget = budget
        self._least_ring = least_ring
        self._ahead = ahead
        self._anywhere = anywhere
        self._share: float | None = None
        self.best: Layout[T] | None = None

    def judge(self, resident: Collection[T], share: float | None) -> float | None:
        """Follow a choice, and keep it if none before was faster.

        Args:
            resident: The groups that would stay.
            share: Of the largest group that would come and go; those of so many bytes would lie at the end.

        Returns:
            Seconds a pass; None where there is no room for it.
        """
        ring = self._budget - sum(self._sizes[group] for group in resident)
        largest = max((nbytes for group, nbytes in self._sizes.items() if group not in resident), default=0)
        if ring < max(self._least_ring, largest):
            return None
        large = None if share is None else int(share * largest)
        memory = ByteQuota(ring) if self._anywhere else FreeList(ring, large)
        seconds = pass_seconds(self._uses, resident, memory, self._ahead)
        if seconds is not None and (self.best is None or seconds <= self.best.seconds):
            staying = tuple(group for group in self._sizes if group in resident)
            self.best, self._share = Layout(staying, ring, seconds, large), share
        return seconds

    def improve(self, tries: int) -> None:
        """Try small changes of the best; an equally fast one is a step to elsewhere."""
        numbers = random.Random(0)  # noqa: S311 - no secrets here, and the same choice each time
        groups = list(self._sizes)
        alike: dict[int, list[T]] = {}
        for group, nbytes in self._sizes.items():
            alike.setdefault(nbytes, []).append(group)
        computing = sum(use.seconds for use in self._uses)
        for _ in range(tries):
            if self.best is None or self.best.seconds <= computing * _FAST:
                return
            staying = self.best.resident
            changed = set(staying)
            if staying and numbers.random() < _SWAPS:
                # Another one stays that is as large and used at about the same time.
                group = numbers.choice(staying)
                others = alike[self._sizes[group]]
                at = others.index(group)
                changed ^= {group, numbers.choice(others[max(0, at - _NEAR) : at + _NEAR + 1])}
            else:
                changed ^= set(numbers.sample(groups, numbers.randint(1, min(_FLIPS, len(groups)))))
            self.judge(changed, self._share)


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
    """Take groups all along the pass."""
    return set(spread_evenly({use.group: use.nbytes for use in uses if use.group not in staying}, quota))


def _evenly_in_time(uses: Sequence[Use[T]], staying: Collection[T], quota: int) -> set[T]:
    """Leave out whatever can be copied, at a steady pace, in the time that computing takes."""

    def chosen_at(pace: float) -> dict[T, int]:
        allowed = 0.0
        chosen = {}
        for use in uses:
            allowed += use.seconds * pace
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
    """Bisect for the slowest pace at which what is chosen keeps to a quota of bytes."""
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
