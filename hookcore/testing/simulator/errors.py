"""What the simulator finds wrong, and the errors that say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from hookcore.errors import HookcoreError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hookcore.testing.simulator.ordering import StreamKey


By = tuple[str, "StreamKey | None", str]
"""An operation, its stream (None for the host), and what puts right that it did not wait."""

WAIT_FIRST = (
    "Let the later stream wait first, with wait_stream() or wait_event(), or let the host wait, with "
    "synchronize()."
)
KEEP_LONGER = (
    "Before the last reference goes, let the stream that it was allocated on wait for the other, or call "
    "tensor.record_stream(other)."
)
HOST_FIRST = "Let the host wait first, with event.synchronize() or stream.synchronize()."
KEEP_HOST_MEMORY = (
    "Keep host memory, and its registration, until an event after the copy is done: torch keeps only memory "
    "that its own allocator made."
)


class SimulatorError(HookcoreError, RuntimeError):
    """The simulator cannot do what was asked, or was used wrongly."""


class UnsupportedOperationError(SimulatorError, NotImplementedError):
    """torch can do this, the simulated device cannot."""


def describe_stream(stream: StreamKey) -> str:
    """Name a stream for people: `"stream 3 of sim:0"`."""
    return f"stream {stream[1]} of sim:{stream[0]}"


@frozen
class Violation:
    """Two things that were not ordered and should have been.

    Attributes:
        rule: What was broken, in a few words: "read before it was written", "overwritten while in use",
            "written twice at once", "freed while in use", "unregistered while in use", "host read too early",
            "host write too early".
        memory: Which memory, with its size.
        tensors: Names of the tensors that lie there, where `simulator.name_tensors` was told of them.
        operation: What happened last.
        stream: On which stream; None for the host.
        earlier: The operation that it should have waited for.
        earlier_stream: On which stream that runs.
        remedy: What puts it right.
    """

    rule: str
    memory: str
    operation: str
    stream: StreamKey | None
    earlier: str
    earlier_stream: StreamKey
    remedy: str
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "on the host" if self.stream is None else f"on {describe_stream(self.stream)}"
        what = f"{self.memory} ({', '.join(map(repr, self.tensors))})" if self.tensors else self.memory
        return (
            f"{self.rule}: {what}, by {self.operation} {where}, which does not wait for {self.earlier} on "
            f"{describe_stream(self.earlier_stream)}. {self.remedy}"
        )


class RaceError(SimulatorError):
    """Something ran without waiting for what it depends on.

    Attributes:
        violations: All that was found, in the order of finding.
    """

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("\n".join(map(str, self.violations)))

    def __reduce__(self) -> tuple[type[RaceError], tuple[tuple[Violation, ...]]]:
        return type(self), (self.violations,)
