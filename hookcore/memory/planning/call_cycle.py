"""Which of several components runs next: learned from who ran before, and never relied on."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_LONGEST = 8  # calls in a round; a loop that calls more components in each step is rare


class CallCycle(Generic[T]):
    """Calls of components, which repeat in rounds: a model called in a loop, or several in turn.

    A round is what the last calls have done twice, or three times if it is a single call. It is believed
    until another call comes than it says.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._calls: deque[T] = deque(maxlen=2 * _LONGEST)
        self._after: dict[T, T] = {}  # what followed each the last time
        self._round: tuple[T, ...] = ()
        self._position: int | None = None  # in the round, of what is expected next; None if there is none

    def note(self, called: T) -> None:
        """Take down a call that begins."""
        if self._calls:
            self._after[self._calls[-1]] = called
        self._calls.append(called)
        if self._position is not None and self._round[self._position] == called:
            self._position = (self._position + 1) % len(self._round)
        else:
            self._find_round()

    @property
    def expected(self) -> T | None:
        """What is expected to be called next; None if nothing has been."""
        if self._position is not None:
            return self._round[self._position]
        return self._after.get(self._calls[-1], self._calls[-1]) if self._calls else None

    @property
    def is_sure(self) -> bool:
        """Whether that is so because calls repeat in rounds."""
        return self._position is not None

    @property
    def round(self) -> tuple[T, ...]:
        """The calls of a round, whose last one is the last call; none while nothing repeats."""
        if self._position is None:
            return ()
        return self._round[self._position :] + self._round[: self._position]

    def _find_round(self) -> None:
        calls = list(self._calls)
        self._position = None
        for length in range(1, len(calls) // 2 + 1):
            times = 3 if length == 1 else 2
            if len(calls) >= times * length and calls[-times * length :] == calls[-length:] * times:
                self._round, self._position = tuple(calls[-length:]), 0
                return
