"""In which order groups are used: learned from one pass, believed in the next, never relied on."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_MISSES_TO_STOP = 3
_KNOWN = 8


class LearnedOrder(Generic[T]):
    """The order in which things were used in the last pass, and how far this pass has come in it.

    A model may be called in several ways (`encode` and `decode`, with and without a condition), each with an
    order of its own. So the last few orders are kept, and a pass that leaves the one which is believed goes
    over to one that began as this pass did.

    Args:
        guess: What to believe of the first pass.

    Attributes:
        misses: How often something else was used than expected, since the last `forget`.
    """

    def __init__(self, guess: Sequence[T]) -> None:
        self._guess = tuple(guess)
        self._recorded: list[T] = []  # in this pass
        self._position = 0  # of what is expected next
        self._misses_in_a_row = 0
        self.forget()

    def forget(self) -> None:
        """Go back to the guess."""
        self.misses = 0
        self._order = self._guess
        self._known: list[tuple[T, ...]] = []  # the one learned last is the last
        self._start()

    def note(self, used: T) -> bool:
        """Record what is used now; return whether it was expected."""
        self._recorded.append(used)
        order, position = self._order, self._position
        if order and order[position] == used:
            self._position = position + 1 if position + 1 < len(order) else 0
            self._misses_in_a_row = 0
            return True
        if order:
            self.misses += 1
            self._misses_in_a_row += 1
            self._find_place(used)
        return False

    def end_pass(self) -> None:
        """End a pass: what it used is what the next one is expected to use."""
        if self._recorded:
            self._order = tuple(self._recorded)
            if self._order in self._known:
                self._known.remove(self._order)
            self._known = [*self._known[1 - _KNOWN :], self._order]
        self._start()

    def upcoming(self, *, wraps: bool = True) -> Iterator[T]:
        """Return what is expected next, on into the next pass, once round; nothing after misses in a row.

        Args:
            wraps: Whether the next pass is expected to be like this one; if not, its end is an end, too.
        """
        if self.is_lost or (not wraps and self._recorded and not self._position):
            return
        yield from self._order[self._position :]
        if wraps:
            yield from self._order[: self._position]

    def ahead(self, distance: int, *, wraps: bool = True) -> T | None:
        """Return what is expected after so many others; None where `upcoming` has come to an end before it.

        Args:
            distance: How many others.
            wraps: Whether the next pass is expected to be like this one; if not, its end is an end, too.
        """
        order = self._order
        length = len(order)
        if distance >= length or self._misses_in_a_row >= _MISSES_TO_STOP:
            return None
        at = self._position + distance
        if not wraps and (at >= length or (self._recorded and not self._position)):
            return None
        return order[at if at < length else at - length]

    @property
    def is_lost(self) -> bool:
        """Whether nothing is expected any more, after misses in a row."""
        return self._misses_in_a_row >= _MISSES_TO_STOP

    @property
    def is_guess(self) -> bool:
        """Whether no pass has been seen yet."""
        return not self._known

    def leave_out(self, things: Container[T]) -> None:
        """Expect these no more. To be called between two passes."""
        self._guess, self._order, *self._known = (
            tuple(it for it in order if it not in things)
            for order in (self._guess, self._order, *self._known)
        )

    def _find_place(self, used: T) -> None:
        """Go on, after a surprise, where the pass can be in an order that is known."""
        made = tuple(self._recorded)
        for known in reversed(self._known):
            if len(known) > len(made) and known[: len(made)] == made:
                self._order, self._position = known, len(made)
                self._misses_in_a_row = 0
                return
        length = len(self._order)
        for ahead in range(1, length):
            if self._order[(self._position + ahead) % length] == used:
                self._position = (self._position + ahead + 1) % length
                return

    def _start(self) -> None:
        self._recorded.clear()
        self._position = 0
        self._misses_in_a_row = 0
