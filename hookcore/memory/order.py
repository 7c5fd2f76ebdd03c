"""In which order groups are used: learned from one pass, believed in the next, never relied on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_MISSES_TO_STOP = 3


class LearnedOrder(Generic[T]):
    """The order in which things were used in the last pass, and how far this pass has come in it.

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
        """Goes back to the guess."""
        self.misses = 0
        self._order = self._guess
        self._start()

    def note(self, used: T) -> None:
        """Takes down what is used now."""
        self._recorded.append(used)
        length = len(self._order)
        for ahead in range(length):
            if self._order[(self._position + ahead) % length] == used:
                self._position = (self._position + ahead + 1) % length
                break
        else:
            ahead = length
        if ahead:
            self.misses += 1
            self._misses_in_a_row += 1
        else:
            self._misses_in_a_row = 0

    def end_pass(self) -> None:
        """Ends a pass: what it used is what the next one is expected to use."""
        if self._recorded:
            self._order = tuple(self._recorded)
        self._start()

    def upcoming(self) -> Iterator[T]:
        """What is expected next, on into the next pass, once round; nothing after misses in a row."""
        if self._misses_in_a_row < _MISSES_TO_STOP:
            yield from self._order[self._position :]
            yield from self._order[: self._position]

    def _start(self) -> None:
        self._recorded.clear()
        self._position = 0
        self._misses_in_a_row = 0
