"""How good a choice of residents could be: a seeded local search, judged by the same recurrence."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

from hookcore.memory import Layout, Use, choose_layout, pass_seconds

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    T = TypeVar("T", bound=Hashable)

_FLIPS = 4


def climb(uses: Sequence[Use[T]], room: int, tries: int, seed: int = 0) -> tuple[float, float]:
    """Improves what `choose_layout` chose, by changing some residents at a time.

    Args:
        uses: The uses of one pass, as they were measured.
        room: Bytes for all groups.
        tries: How many changes are tried.
        seed: Of the changes.

    Returns:
        Seconds a pass that `choose_layout` expects, and the fewest that were found.
    """
    chosen: Layout[T] | None = choose_layout(uses, room)
    if chosen is None:  # nothing but one group after the other
        seconds = pass_seconds(uses, (), room)
        if seconds is None:
            raise ValueError(f"{room} B have no room for the largest group")
        chosen = Layout((), room, seconds)
    numbers = random.Random(seed)  # noqa: S311 - no secrets here
    sizes = {use.group: use.nbytes for use in uses}
    groups = list(sizes)
    resident, best = set(chosen.resident), chosen.seconds
    for _ in range(tries):
        changed = resident.symmetric_difference(numbers.sample(groups, numbers.randint(1, _FLIPS)))
        ring = room - sum(sizes[group] for group in changed)
        seconds = pass_seconds(uses, changed, ring) if ring >= 0 else None
        if seconds is not None and seconds <= best:  # an equal one is a step to elsewhere
            resident, best = changed, seconds
    return chosen.seconds, best
