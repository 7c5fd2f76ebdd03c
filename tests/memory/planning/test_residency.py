"""Spending a budget: never too much, evenly, and the least that works is told exactly."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hookcore import BudgetError
from hookcore.memory import Group, choose_residents
from hookcore.memory.planning.residency import largest_held

costs_of_leaves = st.lists(st.integers(0, 100), min_size=1, max_size=30).map(
    lambda costs: {
        Group(f"layer_{i}", (), ((f"layer_{i}", "forward"),)): cost for i, cost in enumerate(costs)
    }
)


@st.composite
def trees_of_costs(draw):
    """Groups at the modules of a tree, some held by several; by group, bytes."""
    fqns = [""]
    for number in range(draw(st.integers(0, 6))):
        above = draw(st.sampled_from(fqns))
        fqns.append(f"{above}.{number}" if above else f"{number}")
    groups = draw(
        st.lists(st.tuples(st.sets(st.sampled_from(fqns), min_size=1), st.integers(0, 50)), max_size=8)
    )
    return {
        Group(str(number), (), tuple((fqn, "forward") for fqn in sorted(holders))): cost
        for number, (holders, cost) in enumerate(groups)
    }


@given(trees_of_costs())
def test_the_most_held_is_that_of_the_worst_chain_of_calls(costs):
    most, where = largest_held(costs)

    def held(chain):
        return sum(cost for group, cost in costs.items() if any(fqn in chain for fqn, _ in group.holders))

    holders = {fqn for group in costs for fqn, _ in group.holders}
    chains = [
        {"", *(fqn[:end] for end in range(len(fqn) + 1) if fqn[end:][:1] in ("", "."))} for fqn in holders
    ]
    assert most == max(map(held, chains), default=0)
    if most:
        assert (
            held({"", *(where[:end] for end in range(len(where) + 1) if where[end:][:1] in ("", "."))})
            == most
        )


@given(trees_of_costs(), st.integers(0, 400), st.integers(0, 100))
def test_residents_leave_room_for_what_a_call_needs(costs, budget, read_ahead):
    least, _ = largest_held(costs)
    assume(budget >= least)
    residents = choose_residents(costs, budget, read_ahead, "model")
    assert len(set(residents)) == len(residents)
    assert residents == [group for group in costs if group in residents]  # in order of use
    streamed = {group: cost for group, cost in costs.items() if group not in residents}
    assert sum(costs[group] for group in residents) + largest_held(streamed)[0] <= budget


@given(trees_of_costs(), st.integers(0, 100))
def test_the_number_in_the_error_works_and_one_byte_less_does_not(costs, read_ahead):
    assume(largest_held(costs)[0])
    with pytest.raises(BudgetError) as caught:
        choose_residents(costs, 0, read_ahead, "model")
    least = int(re.search(r"works is (\d+) bytes", str(caught.value))[1])
    choose_residents(costs, least, read_ahead, "model")
    with pytest.raises(BudgetError, match=f"works is {least} bytes"):
        choose_residents(costs, least - 1, read_ahead, "model")


@given(trees_of_costs(), st.integers(0, 100))
def test_no_budget_keeps_nothing_and_a_budget_for_everything_keeps_everything(costs, read_ahead):
    assert choose_residents(costs, None, read_ahead, "model") == []
    assert choose_residents(costs, sum(costs.values()), read_ahead, "model") == list(costs)


@given(costs_of_leaves, st.integers(0, 4000), st.integers(0, 300))
def test_what_is_saved_up_is_spent(costs, budget, read_ahead):
    """Bytes left over are less than what the largest streamed group costs, or were kept for streaming."""
    least, _ = largest_held(costs)
    assume(budget >= least)
    residents = choose_residents(costs, budget, read_ahead, "model")
    streamed = [cost for group, cost in costs.items() if group not in residents]
    left = budget - least - read_ahead - sum(costs[group] for group in residents)
    assert left < max(streamed, default=budget + 1)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2500))
def test_equal_groups_are_spread_evenly_and_more_budget_keeps_more(count, size, budget):
    costs = {Group(str(i), (), ((str(i), "forward"),)): size for i in range(count)}
    assume(budget >= size)
    residents = choose_residents(costs, budget, 0, "model")
    assert len(residents) <= len(choose_residents(costs, budget + 1, 0, "model"))
    kept = [group in residents for group in costs]
    if not all(kept):
        assert sum(kept) == (budget - size) // size
    if any(kept):
        runs = "".join("#" if it else "." for it in kept).split("#")
        # Between two residents lie as many streamed ones as between any other two, give or take one.
        inner = [len(run) for run in runs[1:-1]]
        assert not inner or max(inner) - min(inner) <= 1
        assert len(runs[0]) <= count // sum(kept)


@given(costs_of_leaves, st.integers(0, 4000))
def test_no_long_way_lies_between_two_residents(costs, budget):
    """Between two residents lie no more bytes than the quota asks to save for the next one."""
    least, _ = largest_held(costs)
    assume(budget > least)
    residents = choose_residents(costs, budget, 0, "model")
    total, spare = sum(costs.values()), budget - least
    assume(total)
    largest = max(costs.values())
    run = 0
    for group, cost in costs.items():
        run = 0 if group in residents else run + cost
        # A group as large as any is affordable once so much has gone by.
        assert run <= largest * total / spare + 2 * largest
