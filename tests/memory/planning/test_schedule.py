"""What stays and what streams: against the recurrence itself, and against every bound that must hold."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hookcore.memory.planning.free_list import ByteQuota, FreeList
from hookcore.memory.planning.pool_layout import choose_layout
from hookcore.memory.planning.schedule import Use, pass_seconds

times = st.integers(0, 50)
sizes = st.integers(1, 30)


@st.composite
def passes(draw, **options):
    """The uses of a pass; some groups are used more than once, a copy takes longer the larger it is."""
    groups = draw(st.lists(st.tuples(sizes, st.integers(1, 3)), min_size=1, max_size=12))
    order = draw(st.lists(st.integers(0, len(groups) - 1), max_size=4))
    return [
        Use(
            number,
            groups[number][0],
            float(draw(times)),
            float(groups[number][0] * groups[number][1]),
            float(draw(times)),
        )
        for number in [*range(len(groups)), *order]
    ]


def by_the_recurrence(computes, copies, slots, count=60):
    """DESIGN's recurrence, word for word: equal groups, of which so many have room at once."""
    copy_end, compute_end = [], []
    for i in range(count * len(computes)):
        free = compute_end[i - slots] if i >= slots else 0.0
        copy_end.append(max(copy_end[-1] if i else 0.0, free) + copies[i % len(copies)])
        compute_end.append(max(compute_end[-1] if i else 0.0, copy_end[-1]) + computes[i % len(computes)])
    return compute_end


@given(st.lists(st.tuples(times, times), min_size=2, max_size=8), st.integers(1, 6), sizes)
def test_equal_groups_follow_the_recurrence(groups, slots, size):
    assume(slots < len(groups))  # a group that is there twice is copied once
    uses = [Use(number, size, float(compute), float(copy)) for number, (compute, copy) in enumerate(groups)]
    ends = by_the_recurrence([it.compute for it in uses], [it.copy for it in uses], slots)
    n = len(uses)
    expected = (ends[50 * n - 1] - ends[20 * n - 1]) / 30
    for ring in (FreeList(slots * size), FreeList(slots * size, large=size), ByteQuota(slots * size)):
        assert pass_seconds(uses, (), ring) == pytest.approx(expected)
    # All that one can copy ahead is what there are slots for; what is used takes another one.
    found = pass_seconds(uses, (), ByteQuota(len(uses) * size), ahead=slots - 1)
    assert found >= (1 - 1e-6) * expected


@given(passes(), st.data())
def test_no_pass_is_faster_than_computing_or_copying(uses, data):
    groups = {use.group: use.nbytes for use in uses}
    resident = data.draw(st.sets(st.sampled_from(sorted(groups))))
    ring = data.draw(st.integers(0, sum(groups.values())))
    large = data.draw(st.none() | st.integers(0, 30))
    kind = data.draw(st.sampled_from([ByteQuota(ring), FreeList(ring, large)]))
    seconds = pass_seconds(uses, resident, kind, data.draw(st.none() | st.integers(0, 3)))
    streamed = {group: nbytes for group, nbytes in groups.items() if group not in resident}
    if not streamed:
        assert seconds == pytest.approx(sum(use.seconds for use in uses))
    elif ring < max(streamed.values()):
        assert seconds is None
    else:
        assert seconds >= sum(use.seconds for use in uses) - 1e-9
        if sum(streamed.values()) > ring and len(uses) == len(groups):  # then nothing is there from before
            assert seconds * 8 >= 7 * sum(use.copy for use in uses if use.group in streamed) - 1e-9


@given(passes(), st.integers(0, 300), st.integers(0, 40), st.booleans(), st.none() | st.integers(1, 3))
def test_a_layout_keeps_to_the_budget_and_is_none_only_where_nothing_fits(
    uses, budget, least_ring, anywhere, ahead
):
    groups = {use.group: use.nbytes for use in uses}
    layout = choose_layout(uses, budget, least_ring, ahead=ahead, anywhere=anywhere)
    if layout is None:
        assert budget < max(*groups.values(), least_ring)
        return
    resident = set(layout.resident)
    assert list(layout.resident) == [group for group in groups if group in resident]  # in order of use
    assert sum(groups[group] for group in resident) + layout.ring <= budget
    assert layout.ring >= least_ring
    streamed = [nbytes for group, nbytes in groups.items() if group not in resident]
    assert layout.ring >= max(streamed, default=0)
    ring = ByteQuota(layout.ring) if anywhere else FreeList(layout.ring, layout.large)
    assert layout.seconds == pytest.approx(pass_seconds(uses, resident, ring, ahead))
    if sum(groups.values()) + least_ring <= budget:
        assert not streamed


@given(st.integers(20, 30), st.sampled_from([0.5, 1, 2, 4]), st.sampled_from([0.13, 0.25, 0.5, 0.75]))
def test_equal_blocks_come_near_to_the_bound(blocks, ratio, share):
    """Blocks of a transformer, layers of 3, 4, 1, 1, 1 and 5 parts, copied in `ratio` times computing."""
    parts = [3, 4, 1, 1, 1, 5] * blocks
    uses = [Use(number, part * 1000, float(part), part * ratio) for number, part in enumerate(parts)]
    layout = choose_layout(uses, int(share * sum(use.nbytes for use in uses)))
    bound = max(sum(parts), (1 - share) * ratio * sum(parts))
    # Where copying is the longer, room for a layer that comes is room that no layer which stays can have.
    assert layout.seconds <= (1.03 if ratio <= 1 else 1.08) * bound


def test_the_largest_group_fits_however_small_the_others_are():
    uses = [Use(number, nbytes, 1.0, 1.0) for number, nbytes in enumerate([1000, 200, 5] * 5)]
    assert choose_layout(uses, 1000).resident == ()
    assert choose_layout(uses, 999) is None


def test_what_is_copied_is_spread_over_the_time_of_computing():
    """Large weights that compute for a moment only stay, those that compute for long are streamed."""
    quick = [Use(f"quick {number}", 100, 1.0, 100.0) for number in range(10)]
    slow = [Use(f"slow {number}", 100, 100.0, 100.0) for number in range(10)]
    layout = choose_layout([*quick, *slow], 1300)
    assert set(layout.resident) >= {use.group for use in quick[1:]}
    assert layout.seconds <= 1.1 * sum(use.compute for use in (*quick, *slow))


@given(
    st.integers(0, 40),
    st.none() | st.integers(0, 15),
    st.lists(st.tuples(st.booleans(), st.integers(1, 15)), max_size=40),
)
def test_ranges_never_overlap_and_are_found_where_there_is_room(size, large, steps):
    ranges = FreeList(size, large)
    lent = []
    for takes, number in steps:
        if takes:
            start = ranges.take(number)
            free = "".join(
                "x" if any(low <= at < low + length for low, length in lent) else "." for at in range(size)
            )
            assert (start is None) == ("." * number not in free)
            if start is not None:
                is_large = large is not None and number >= large
                assert start == (free.rindex if is_large else free.index)("." * number)
                lent.append((start, number))
        elif lent:
            ranges.give_back(*lent.pop(number % len(lent)))
        assert ranges.lent == sum(length for _, length in lent)
