"""Memory in which groups come and go, and some have a range of their own: no two lie at one place."""

from __future__ import annotations

import itertools

import torch
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st

from hookcore.memory.device.allocators import ArenaAllocator, PerGroupAllocator

UNIT = 64
SIZE = 20 * UNIT
CPU = torch.device("cpu")


@define(eq=False)
class Group:
    """As much of a `FlatGroup` as a slab asks for."""

    nbytes: int

    def views(self, memory):
        return [memory]


units = st.integers(1, 6)
some = st.lists(st.integers(0, 7), unique=True, max_size=6)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 7)),
        st.tuples(st.just("give_back"), st.integers(0, 7)),
        st.tuples(st.just("keep"), some),
        st.tuples(st.just("drop"), st.none()),
        st.tuples(st.just("leave"), st.integers(0, 7)),
        st.tuples(st.just("forget"), st.integers(0, 7)),
    ),
    max_size=25,
)


class Checked:
    """A slab, and what is in it as it should be."""

    def __init__(self, allocator, sizes):
        self.allocator = allocator
        self.groups = [Group(size * UNIT) for size in sizes]
        self.there = {}  # places of groups that were taken

    def take(self, at):
        group = self.groups[at]
        if group in self.there:
            return
        place = self.allocator.take(group)
        if place is not None:
            self.there[group] = place
            assert place.memory.nbytes == group.nbytes
        else:
            assert group not in self.allocator.kept
            assert isinstance(self.allocator, ArenaAllocator) or self.taken() + group.nbytes > SIZE

    def give_back(self, at):
        group = self.groups[at]
        if group in self.there:
            self.allocator.give_back(group, self.there.pop(group))

    def keep(self, chosen):
        """Nothing else may be lent, and they have room together."""
        wanted, left = [], SIZE
        for group in (self.groups[at] for at in chosen):
            if group.nbytes <= left:
                wanted.append(group)
                left -= group.nbytes
        losing = self.allocator.unkept(wanted)
        for group in list(self.there):
            if group not in self.allocator.kept or group in losing:
                self.allocator.give_back(group, self.there.pop(group))
        self.allocator.collect()
        staying = [group for group in self.allocator.kept if group not in losing]
        assert all(group in wanted for group in staying)
        starts = {group: self.allocator.kept[group] for group in staying}
        self.allocator.keep(wanted, 3 * UNIT)
        assert set(self.allocator.kept) == set(wanted)
        assert all(self.allocator.kept[group] == start for group, start in starts.items())
        if isinstance(self.allocator, ArenaAllocator):  # what is left is in one piece
            assert min(self.allocator.kept.values(), default=SIZE) == left

    def drop(self, _):
        group = next(reversed(self.allocator.kept), None)
        if group is not None:
            if group in self.there:
                self.allocator.give_back(group, self.there.pop(group))
            self.allocator.drop(group)

    def leave(self, at):
        group = self.groups[at]
        self.allocator.leave(group, self.there.pop(group, None))
        self.groups[at] = Group(group.nbytes)
        self.allocator.collect()

    def forget(self, at):
        self.give_back(at)
        self.allocator.forget(self.groups[at])

    def taken(self):
        """Bytes of groups that are there, and of ranges that some have of their own."""
        return sum(group.nbytes for group in {*self.there, *self.allocator.kept})

    def check(self):
        lent = self.allocator.lender.lent
        assert lent == self.taken() <= SIZE
        if isinstance(self.allocator, ArenaAllocator):
            starts = {group: place.start for group, place in self.there.items()} | self.allocator.kept
            spans = sorted((start, start + group.nbytes) for group, start in starts.items())
            assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
            assert all(start >= 0 and stop <= SIZE for start, stop in spans)


@settings(max_examples=200)
@given(st.sampled_from([ArenaAllocator, PerGroupAllocator]), st.lists(units, min_size=8, max_size=8), steps)
def test_no_two_groups_lie_at_one_place(kind, sizes, steps):
    checked = Checked(kind(CPU, SIZE), sizes)
    for what, which in steps:
        getattr(checked, what)(which)
        checked.check()


def test_a_group_comes_to_a_place_that_it_knows():
    allocator, group = ArenaAllocator(CPU, SIZE), Group(UNIT)
    first = allocator.take(group)
    allocator.give_back(group, first)
    assert allocator.take(group) is first
    allocator.give_back(group, first)
    allocator.forget(group)
    assert allocator.take(group) is not first


def test_what_lies_beyond_a_gap_is_moved():
    allocator, groups = ArenaAllocator(CPU, SIZE), [Group(2 * UNIT), Group(3 * UNIT), Group(UNIT)]
    allocator.keep(groups)
    allocator.forget(groups[0])
    assert allocator.unkept(groups[1:]) == groups[1:]
    allocator.keep(groups[1:])
    assert list(allocator.kept.values()) == [SIZE - 3 * UNIT, SIZE - 4 * UNIT]
