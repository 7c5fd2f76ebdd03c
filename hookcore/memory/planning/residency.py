"""Spends a memory budget: what has to fit at once, and which groups stay. Pure functions of sizes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, TypeVar

from hookcore.errors import BudgetError
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hookcore.memory.grouping import Group

T = TypeVar("T", bound=Hashable)


def largest_held(costs: Mapping[Group, int]) -> tuple[int, str]:
    """The most bytes that calls nested in each other hold at once, and the module where that is.

    A call holds its own groups, and those of the calls around it.

    Args:
        costs: Bytes that each group takes in memory.
    """
    own: dict[str, dict[Group, int]] = {}
    for group, cost in costs.items():
        for fqn, _ in group.holders:
            own.setdefault(fqn, {})[group] = cost
    most = (0, "")
    for fqn in own:
        held: dict[Group, int] = {}
        above = fqn
        while True:
            held.update(own.get(above, {}))
            if not above:
                break
            above = above.rpartition(".")[0]
        most = max(most, (sum(held.values()), fqn))
    return most


def choose_residents(
    costs: Mapping[Group, int], budget: int | None, read_ahead: int, what: str
) -> list[Group]:
    """Choose the groups that stay in memory, as many as the budget has room for beside the streamed ones.

    They are spread evenly over the order of the groups, by bytes: while a resident is used, the next streamed
    one is read. (Spaced residents beat the first N: DESIGN 5.6.) Groups that are tiny stay first of all, as
    they cost a read each and save no memory to speak of.

    Args:
        costs: Bytes that each group takes in memory, in the order of their use.
        budget: Bytes for all weights together; None for as little as streaming needs.
        read_ahead: Bytes read ahead of use.
        what: The component, for the message.

    Raises:
        BudgetError: The budget is less than what one call holds at once; names the least that works.
    """
    least, fqn = largest_held(costs)
    if budget is None:
        return []
    check_budget(budget, least, fqn, what)
    if sum(costs.values()) <= budget:
        return list(costs)  # nothing is streamed, so nothing needs room to come and go
    return spread_residents(costs, budget - min(budget, least + read_ahead))


def check_budget(budget: int, least: int, fqn: str, what: str) -> None:
    """Refuse a budget that is less than one call holds at once.

    Args:
        budget: Bytes for all weights together.
        least: What the call holds, in bytes.
        fqn: The module that is called.
        what: Its component.

    Raises:
        BudgetError: It is; names the least that works.
    """
    if budget < least:
        raise BudgetError(
            f"memory_budget is {format_bytes(budget)}, but the call of {fqn!r} in {what!r} needs "
            f"{format_bytes(least)} of weights at once. The smallest budget that works is {least} bytes"
        )


def spread_residents(costs: Mapping[Group, int], spare: int) -> list[Group]:
    """Choose as many groups as there is room for; see `choose_residents`.

    Args:
        costs: Bytes that each group takes in memory, in the order of their use.
        spare: Bytes for those that stay.
    """
    tiny = spare // 1000
    residents = _fill([group for group in costs if costs[group] <= tiny], costs, spare)
    spare -= sum(costs[group] for group in residents)
    rest = {group: cost for group, cost in costs.items() if cost > tiny}
    chosen = {*residents, *spread_evenly(rest, spare)}
    return [group for group in costs if group in chosen]


def _fill(groups: Sequence[Group], costs: Mapping[Group, int], spare: int) -> list[Group]:
    chosen = []
    for group in groups:
        if costs[group] <= spare:
            spare -= costs[group]
            chosen.append(group)
    return chosen


def spread_evenly(sizes: Mapping[T, int], quota: int) -> list[T]:
    """Take one of them whenever its share of the quota has been saved up.

    Args:
        sizes: Bytes of each, in the order over which what is taken is spread.
        quota: Bytes that may be taken in all.
    """
    total = sum(sizes.values())
    chosen = []
    saved = 0  # in units of 1 / total bytes, so that nothing is lost to rounding
    for item, nbytes in sizes.items():
        saved += nbytes * quota
        if nbytes * total <= saved:
            saved -= nbytes * total
            chosen.append(item)
    return chosen
