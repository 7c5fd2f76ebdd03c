"""In which order components run: told, then learned, and never relied on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_REMEMBERED = 64  # changes; a pipeline makes a dozen a run


class ComponentOrder:
    """The components that have run, and which one is expected to run after the last of them.

    A component that runs several times in a row counts once. What is expected is what came the last time
    after the longest run of components that ended like the present one. So two text encoders that take turns
    before the transformer runs are expected to do so again: which one follows depends on more than the last.
    This is prediction by partial matching (Cleary and Witten, 1984), of which only the longest match counts.

    Args:
        sequence: What to believe at first.
    """

    def __init__(self, sequence: Sequence[str]) -> None:
        self._sequence = tuple(sequence)
        self.forget()

    def forget(self) -> None:
        """Go back to what it was told."""
        self._past = [*self._sequence, *self._sequence]

    def note(self, name: str) -> None:
        """Take down what runs now."""
        if not self._past or self._past[-1] != name:
            self._past = [*self._past[1 - _REMEMBERED :], name]

    @property
    def expected(self) -> str | None:
        """What runs next; None if what runs now has never been followed by anything."""
        past = self._past
        longest, found = 0, None
        for end in range(len(past) - 1, 0, -1):
            length = 0
            while length < end and past[end - 1 - length] == past[-1 - length]:
                length += 1
            if length > longest:
                longest, found = length, past[end]
        return found
