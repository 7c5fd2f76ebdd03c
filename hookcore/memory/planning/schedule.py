"""How long a pass takes, with some weights that stay and room for the others to come and go.

A copy can begin when the one before it has ended and there is room for it, and room comes when a group has
been used. So with groups of b bytes, which take c seconds to compute with, over a link of B bytes a second:

    copy_end[i]    = max(copy_end[i-1], compute_end of what makes room) + b[i] / B
    compute_end[i] = max(compute_end[i-1], copy_end[i]) + c[i]

`pass_seconds` follows this recurrence with the very ranges that are lent when the model runs. It is pure.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hookcore.memory.planning.free_list import ByteQuota, FreeList

T = TypeVar("T", bound=Hashable)

_PASSES = 16
_TOLERANCE = 1e-6


@frozen
class Use(Generic[T]):
    """One use of a group in a pass.

    Attributes:
        group: What is used; it may be used again in the same pass.
        nbytes: Bytes of memory that it takes.
        compute: Seconds from its beginning to its end.
        copy: Seconds that its copy takes.
        after: Seconds from its end to the beginning of the next use, if nothing is waited for.
    """

    group: T
    nbytes: int
    compute: float
    copy: float
    after: float = 0.0

    @property
    def seconds(self) -> float:
        """From its beginning to that of the next use."""
        return self.compute + self.after


def pass_seconds(
    uses: Sequence[Use[T]], resident: Collection[T], ring: FreeList | ByteQuota, ahead: int | None = None
) -> float | None:
    """Seconds that a pass takes in the long run; None if the ring is too small for a group.

    Args:
        uses: The uses of one pass, in order; the next pass follows at once.
        resident: The groups that stay.
        ring: Memory for those that come and go, of which nothing is lent.
        ahead: How many groups may be copied ahead of use; None for as many as there is room for.
    """
    streamed = [use.nbytes for use in uses if use.group not in resident]
    if not streamed:
        return sum(use.seconds for use in uses)
    if max(streamed) > ring.size:
        return None
    return _Run(uses, resident, ring, ahead).seconds()


@frozen
class _Step(Generic[T]):
    """The use of a group that comes and goes.

    Attributes:
        group: What is used.
        nbytes: Bytes that it takes.
        copy: Seconds of its copy.
        compute: Seconds until it is left.
        after: Seconds from there to the next step.
    """

    group: T
    nbytes: int
    copy: float
    compute: float
    after: float


class _Run(Generic[T]):
    """Passes, followed step by step."""

    def __init__(
        self, uses: Sequence[Use[T]], resident: Collection[T], ring: FreeList | ByteQuota, ahead: int | None
    ) -> None:
        self._before, self._steps = _steps(uses, resident)
        self._most = len(self._steps) if ahead is None else min(ahead, len(self._steps))
        self._ring = ring
        self._ahead: dict[T, tuple[int, int, float]] = {}  # bytes, where it lies, and when it is there
        self._position = 0  # of the next step
        self._now = 0.0
        self._copied = 0.0  # when the last copy ends

    def seconds(self) -> float:
        """Follow passes until they repeat: what is lent where, and how far copies are ahead."""
        ends: list[float] = []
        seen: list[tuple[list[tuple[T, int]], float]] = []
        self._issue()
        for count in range(_PASSES):
            self._pass()
            ends.append(self._now)
            places = [(group, start) for group, (_, start, _) in self._ahead.items()]
            lead = self._copied - self._now
            for earlier in range(count - 1, -1, -1):
                taken = (ends[-1] - ends[earlier]) / (count - earlier)
                if seen[earlier][0] == places and abs(seen[earlier][1] - lead) <= _TOLERANCE * taken:
                    return taken
            seen.append((places, lead))
        half = _PASSES // 2
        return (ends[-1] - ends[half - 1]) / half

    def _pass(self) -> None:
        self._now += self._before
        steps = self._steps
        for position, step in enumerate(steps, start=1):
            self._position = position % len(steps)
            if step.group not in self._ahead:
                self._evict_for(step)
            nbytes, start, there = self._ahead.pop(step.group)
            self._now = max(self._now, there)
            self._issue(step.group)
            self._now += step.compute
            self._ring.give_back(start, nbytes)
            self._issue()
            self._now += step.after

    def _evict_for(self, step: _Step[T]) -> None:
        """Bring a group that is used now and was not copied ahead."""
        if not self._copy(step):
            for nbytes, start, _ in self._ahead.values():
                self._ring.give_back(start, nbytes)
            self._ahead.clear()
            self._copy(step)

    def _issue(self, in_use: T | None = None) -> None:
        """Begin the copies of what is used next, as far as there is room."""
        steps, ahead, count = self._steps, self._ahead, len(self._steps)
        while len(ahead) < self._most:
            step = steps[(self._position + len(ahead)) % count]
            if step.group in ahead or step.group == in_use or not self._copy(step):
                return

    def _copy(self, step: _Step[T]) -> bool:
        """Begin a copy, if there is room for it."""
        start = self._ring.take(step.nbytes)
        if start is None:
            return False
        self._copied = max(self._copied, self._now) + step.copy
        self._ahead[step.group] = step.nbytes, start, self._copied
        return True


def _steps(uses: Sequence[Use[T]], resident: Collection[T]) -> tuple[float, list[_Step[T]]]:
    """Seconds to the first step, and the steps."""
    before = 0.0
    steps: list[_Step[T]] = []
    current: Use[T] | None = None
    compute = after = 0.0
    for use in uses:
        if use.group in resident:
            if current is None:
                before += use.seconds
            else:
                after += use.seconds
        else:
            if current is not None:
                steps.append(_Step(current.group, current.nbytes, current.copy, compute, after))
            current, compute, after = use, use.compute, use.after
    if current is not None:
        steps.append(_Step(current.group, current.nbytes, current.copy, compute, after))
    return before, steps
