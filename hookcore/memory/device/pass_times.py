"""How long the uses and the copies of one pass took, measured on the device by events."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from attrs import define, field

from hookcore.memory.planning.schedule import Use

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from hookcore.memory.device.flat_group import FlatGroup

_MILLI = 1e-3


@define(eq=False)
class PassTimes:
    """Measures the first whole pass.

    Attributes:
        make_event: Makes an event that can measure time.
        passes: How many passes have ended since it was begun, this one first.
    """

    make_event: Callable[[], Any]
    passes: int = 0
    _uses: list[tuple[FlatGroup, Any, Any, Any]] = field(factory=list)
    _copies: dict[FlatGroup, tuple[Any, Any]] = field(factory=dict)

    def mark(self, stream: Any) -> Any:
        """Record an event on a stream."""
        event = self.make_event()
        event.record(stream)
        return event

    def copy(self, group: FlatGroup, begun: Any, ended: Any) -> None:
        """Take down the events before and after a group's copy; the first one counts."""
        self._copies.setdefault(group, (begun, ended))

    def use(self, group: FlatGroup, asked: Any, begun: Any, ended: Any) -> None:
        """Take down the events before the wait for a group, after it, and after the group's use."""
        if not self.passes:
            self._uses.append((group, asked, begun, ended))

    def end_pass(self) -> None:
        """End a pass."""
        self.passes += bool(self._uses)

    @property
    def is_known(self) -> bool:
        """Whether the pass has ended on the device too.

        A host that runs far ahead is let run for one more pass, and then waits, once.
        """
        if self.passes > 1:
            self._uses[-1][-1].synchronize()
        return self.passes > 0 and bool(self._uses[-1][-1].query())

    def uses(self, groups: Container[FlatGroup]) -> list[Use[FlatGroup]]:
        """Return what was measured of the uses of some groups, one after another; seconds."""
        waited_for = {group for group, *_ in self._uses}  # other copies need not be done
        copies = {
            group: begun.elapsed_time(ended) * _MILLI
            for group, (begun, ended) in self._copies.items()
            if group in groups and group in waited_for
        }
        used = [use for use in self._uses if use[0] in copies]
        afters = [
            ended.elapsed_time(asked) * _MILLI for (*_, ended), (_, asked, *_) in itertools.pairwise(used)
        ]
        return [
            Use(
                group,
                group.nbytes,
                begun.elapsed_time(ended) * _MILLI,
                max(copies[group], group.read_seconds),
                after,
            )
            for (group, _, begun, ended), after in zip(used, [*afters, 0.0][: len(used)], strict=True)
        ]
