"""The learned order: against a deque that is turned, and what it promises of learning and giving up."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from hookcore.memory.planning.order_of_use import LearnedOrder

things = st.sampled_from("abcdef")
passes = st.lists(st.lists(things, max_size=8), max_size=4)


class TurnedDeque:
    """What LearnedOrder promises, said with a deque whose left end is expected next."""

    def __init__(self, guess):
        self.guess = guess
        self.forget()

    def forget(self):
        self.misses = 0
        self.known = []  # the latest first
        self.begin_pass(self.guess)

    def begin_pass(self, order):
        self.order = order
        self.expected = deque(order)
        self.used = []
        self.late = 0

    def note(self, thing):
        self.used.append(thing)
        hit = bool(self.expected) and self.expected[0] == thing
        surprise = bool(self.expected) and not hit
        self.misses += surprise
        begun = [it for it in self.known if it[: len(self.used)] == self.used and len(it) > len(self.used)]
        if surprise and begun:
            self.order = begun[0]
            self.expected = deque(self.order)
            self.expected.rotate(-len(self.used))
            self.late = 0
            return hit
        self.late = self.late + 1 if surprise else 0
        if thing in self.expected:
            self.expected.rotate(-1 - self.expected.index(thing))
        return hit

    def end_pass(self):
        if self.used:
            self.known = [self.used, *(it for it in self.known if it != self.used)][:8]
        self.begin_pass(self.used or self.order)

    def upcoming(self):
        return list(self.expected) if self.late < 3 else []


@given(st.lists(things, unique=True), passes, st.data())
def test_it_is_the_turned_deque(guess, made, data):
    order, reference = LearnedOrder(guess), TurnedDeque(guess)
    for uses in made:
        for used in uses:
            assert order.note(used) == reference.note(used)
            assert list(order.upcoming()) == reference.upcoming()
            assert [order.ahead(it) for it in range(9)] == [*reference.upcoming(), *[None] * 9][:9]
            assert order.misses == reference.misses
        if data.draw(st.booleans(), "forget"):
            order.forget()
            reference.forget()
        else:
            order.end_pass()
            reference.end_pass()
        assert list(order.upcoming()) == reference.upcoming()
        assert order.misses == reference.misses


@given(st.lists(things, unique=True), st.lists(things, min_size=1, max_size=8))
def test_a_pass_that_is_repeated_has_no_misses_and_is_known_at_each_step(guess, uses):
    order = LearnedOrder(guess)
    for used in uses:
        order.note(used)
    order.end_pass()
    misses = order.misses
    for _ in range(2):
        for position, used in enumerate(uses):
            # All of the pass, each thing once for each of its uses, from here on round into the next one.
            assert list(order.upcoming()) == uses[position:] + uses[:position]
            assert list(order.upcoming(wraps=False)) == uses[position:]
            order.note(used)
        assert list(order.upcoming(wraps=False)) == []
        order.end_pass()
    assert order.misses == misses


def test_three_misses_in_a_row_stop_it_and_one_hit_starts_it_again():
    order = LearnedOrder("abcdef")
    for used in "cea":  # each one later than the next, and none next
        assert list(order.upcoming())
        order.note(used)
    assert not list(order.upcoming())
    order.note("b")
    assert list(order.upcoming()) == list("cdefab")
    assert order.misses == 3


def test_a_new_pass_starts_with_hope():
    order = LearnedOrder("ab")
    for used in "xyz":
        order.note(used)
    assert not list(order.upcoming())
    order.end_pass()
    assert list(order.upcoming()) == list("xyz")


@given(st.lists(st.permutations("abcdef"), min_size=2, max_size=5, unique_by=tuple), st.data())
def test_orders_that_were_learned_are_known_again(orders, data):
    order = LearnedOrder("")
    for made in orders:
        for used in made:
            order.note(used)
        order.end_pass()
    for made in data.draw(st.lists(st.sampled_from(orders), max_size=6), "passes"):
        before = order.misses
        for used in made:
            order.note(used)
        order.end_pass()
        assert order.misses - before < len(orders)  # one for each other order that began as this one


@given(st.lists(things, max_size=8), st.sets(things))
def test_what_is_left_out_is_expected_no_more(uses, left_out):
    order = LearnedOrder("abcdef")
    for used in uses:
        order.note(used)
    order.end_pass()
    expected = [it for it in order.upcoming() if it not in left_out]
    order.leave_out(left_out)
    assert list(order.upcoming()) == expected
    assert order.is_guess == (not uses)
