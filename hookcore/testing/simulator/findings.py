"""What breaks a rule: described, then raised or kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field

from hookcore.testing.simulator.errors import RaceError, Violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookcore.testing.simulator.errors import By
    from hookcore.testing.simulator.memory import Block
    from hookcore.testing.simulator.ordering import Access


def _no_names(_block: Block, _start: int, _stop: int) -> tuple[str, ...]:
    return ()


@define(eq=False)
class Findings:
    """What was found wrong.

    Attributes:
        violations: What was found and not yet raised.
        strict: Whether to raise a violation, at once or at the next operation; else it is kept.
        name_of: Gives the names of the tensors that lie in a range of a block.
    """

    violations: list[Violation] = field(factory=list)
    strict: bool = True
    name_of: Callable[[Block, int, int], tuple[str, ...]] = _no_names

    def describe(self, block: Block, start: int, stop: int) -> tuple[str, tuple[str, ...]]:
        """A range of a block, and the tensors in it, for people."""
        part = "" if (start, stop) == (0, block.nbytes) else f"bytes {start} to {stop} of "
        return f"{part}{block}", self.name_of(block, start, stop)

    def add(self, rule: str, block: Block, earlier: Access, by: By, *, now: bool) -> None:
        """Note that an operation does not wait for an earlier access.

        Args:
            rule: What is broken.
            block: The memory.
            earlier: The access.
            by: The operation, its stream, and the remedy.
            now: Whether it may be raised at once.

        Raises:
            RaceError: It is to be raised at once.
        """
        operation, stream, remedy = by
        memory, tensors = self.describe(block, earlier.start, earlier.stop)
        violation = Violation(
            rule=rule,
            memory=memory,
            tensors=tensors,
            operation=operation,
            stream=stream,
            earlier=earlier.operation.name,
            earlier_stream=earlier.operation.stream,
            remedy=remedy,
        )
        if self.strict and now:
            raise RaceError([violation])
        self.violations.append(violation)

    def raise_found(self) -> None:
        """Raise what was found and not yet raised, if it is to be raised.

        Raises:
            RaceError: There is something.
        """
        if self.strict and self.violations:
            found, self.violations = self.violations, []
            raise RaceError(found)
