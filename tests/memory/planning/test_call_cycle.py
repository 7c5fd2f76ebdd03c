"""Rounds of calls: what repeats is found, believed as long as it holds, and told apart from a guess."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from hookcore.memory.planning.call_cycle import CallCycle

things = st.sampled_from("abc")


def is_primitive(made):
    """Whether it isn't a shorter one several times over."""
    return all(made != made[:length] * (len(made) // length) for length in range(1, len(made)))


@given(st.lists(things, max_size=20), st.lists(things, min_size=1, max_size=8), st.integers(0, 12))
def test_what_repeats_is_found_and_its_next_call_expected(before, made, more):
    assume(is_primitive(made))
    rounds = CallCycle()
    for call in before:
        rounds.note(call)
    calls = made * (4 + more)
    for number, call in enumerate(calls):
        if number >= 4 * len(made):
            assert rounds.expected == call
            assert rounds.is_sure
        rounds.note(call)
    assert rounds.round == tuple(made)


@given(st.lists(things, min_size=1, max_size=30))
def test_a_round_is_one_that_was_seen(calls):
    rounds = CallCycle()
    for number, call in enumerate(calls):
        expected, was_sure = rounds.expected, rounds.is_sure
        rounds.note(call)
        if was_sure and expected == call:
            assert rounds.is_sure  # it goes on as it was
        found = rounds.round
        assert bool(found) == rounds.is_sure
        if found:
            assert tuple(calls[number + 1 - len(found) : number + 1]) == found
            assert tuple(calls[number + 1 - 2 * len(found) : number + 1]) == found * 2


@given(st.lists(things, min_size=1, max_size=30))
def test_without_a_round_what_followed_last_is_expected(calls):
    rounds = CallCycle()
    assert rounds.expected is None
    for number, call in enumerate(calls):
        rounds.note(call)
        followed = [calls[at + 1] for at in range(number) if calls[at] == call]
        if not rounds.is_sure:
            assert rounds.expected == (followed[-1] if followed else call)
    rounds.forget()
    assert rounds.expected is None
    assert rounds.round == ()


def test_two_equal_calls_are_no_loop_yet():
    """A text encoder runs for the prompt and for the negative one."""
    rounds = CallCycle()
    found = []
    for call in "ttuuuv":
        rounds.note(call)
        found.append("".join(rounds.round))
    assert found == ["", "", "", "", "u", ""]
