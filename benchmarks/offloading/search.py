"""How good a choice of residents could be: a seeded local search, judged by the same recurrence."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

from hookcore.memory.planning.free_list import ByteQuota, FreeList
from hookcore.memory.planning.schedule import Use, pass_seconds

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Sequence

    from hookcore.memory.planning.pool_layout import Layout

    T = TypeVar("T", bound=Hashable)

_FLIPS = 4


def climb(
    chosen: Layout[T] | None,
    uses: Sequence[Use[T]],
    room: int,
    tries: int,
    *,
    ahead: int | None,
    anywhere: bool,
    seed: int = 0,
) -> tuple[float, float]:
    """Improves a layout by changing some residents at a time.

    Args:
        chosen: The layout; None for one group after the other.
        uses: The uses of one pass, as they were measured.
        room: Bytes for all groups.
        tries: How many changes are tried.
        ahead: How many groups may be copied ahead of use.
        anywhere: Whether what comes can lie anywhere.
        seed: Of the changes.

    Returns:
        Seconds a pass that are expected of the layout, and the fewest that were found.
    """
    numbers = random.Random(seed)  # noqa: S311 - no secrets here
    sizes = {use.group: use.nbytes for use in uses}
    groups = list(sizes)
    large = None if chosen is None else chosen.large

    def judge(staying: Collection[T]) -> float | None:
        ring = room - sum(sizes[group] for group in staying)
        if ring < 0:
            return None
        return pass_seconds(uses, staying, ByteQuota(ring) if anywhere else FreeList(ring, large), ahead)

    resident = set() if chosen is None else set(chosen.resident)
    first = judge(resident)
    if first is None:
        raise ValueError(f"{room} B have no room for the largest group")
    best = first
    for _ in range(tries):
        changed = resident.symmetric_difference(numbers.sample(groups, numbers.randint(1, _FLIPS)))
        seconds = judge(changed)
        if seconds is not None and seconds <= best:  # an equal one is a step to elsewhere
            resident, best = changed, seconds
    return first, best
