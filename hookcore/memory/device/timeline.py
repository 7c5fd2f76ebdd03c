"""When groups were copied, when they computed, and when computing waited: measured on the device, to look at.

Events on the two streams are recorded only between `record_timeline`'s beginning and end.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from attrs import define, field, frozen

from hookcore.errors import HookcoreError, PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["copy", "compute", "stall"]

_MILLI = 1e-3
_LANES = ("copies", "computing")
_STALL_COLOUR = "tab:red"
_COLOURS = [
    f"tab:{it}" for it in ["blue", "orange", "green", "purple", "brown", "pink", "gray", "olive", "cyan"]
]
_INCH = 72  # points
_WIDTH, _HEIGHT = 10.0, 3.2  # inches
_FONT = 6.5  # points; a letter is about half as wide


@frozen
class Span:
    """One thing that took its time; seconds since the recording began.

    Attributes:
        kind: "copy" to the device, "compute" with a group's weights, or "stall": computing waits for a copy.
        group: The group's name, after that of its component.
        start: When it began.
        stop: When it was over.
    """

    kind: Kind
    group: str
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.stop - self.start


@define(eq=False)
class Recorder:
    """Takes down what one mover does, as events; they are read at the end.

    Attributes:
        device: The device on which it is done.
        spans: What was recorded; from `close` on.
    """

    device: torch.device
    spans: list[Span] = field(factory=list, init=False)
    _module: Any = field(init=False)
    _began: Any = field(init=False)
    _marks: list[tuple[Kind, str, Any, Any]] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self._module = torch.get_device_module(self.device)
        self._module.synchronize(self.device)  # or the streams could be before the first event
        self._began = self.mark(self._module.current_stream(self.device))

    def mark(self, stream: Any) -> Any:
        """Record an event on a stream."""
        event = self._module.Event(enable_timing=True)
        event.record(stream)
        return event

    def add(self, kind: Kind, group: str, began: Any, ended: Any) -> None:
        """Take down the events before and after something."""
        self._marks.append((kind, group, began, ended))

    def close(self) -> None:
        """Wait for the device, and read the events."""
        self._module.synchronize(self.device)
        for kind, group, *events in self._marks:
            start, stop = (self._began.elapsed_time(event) * _MILLI for event in events)
            if kind != "stall" or stop > start:
                self.spans.append(Span(kind, group, start, stop))
        self._marks.clear()

    @property
    def stalled(self) -> float:
        """Seconds that computing waited."""
        return sum(span.seconds for span in self.spans if span.kind == "stall")


@define(eq=False)
class Timeline:
    """What was recorded in a block of `record_timeline`.

    Attributes:
        recorders: One for each mover.
    """

    recorders: list[Recorder] = field(factory=list)

    @property
    def spans(self) -> list[Span]:
        """All copies, uses and stalls by their beginning; there are none before the block's end."""
        every = itertools.chain.from_iterable(recorder.spans for recorder in self.recorders)
        return sorted(every, key=lambda span: (span.start, span.stop))

    @property
    def stalled(self) -> float:
        """Seconds that computing waited for copies."""
        return sum(recorder.stalled for recorder in self.recorders)

    def draw(self, path: str | Path | None = None) -> Figure:
        """Draw copies above computing, a colour for each group, and stalls in red; needs matplotlib.

        Args:
            path: Where to save the picture, if at all; the ending says how (".svg", ".png").

        Raises:
            HookcoreError: Nothing was recorded, or matplotlib is not installed.
        """
        spans = self.spans
        if not spans:
            raise HookcoreError(
                "there is nothing to draw: no group was copied or used while the timeline was recorded. Call "
                "the model inside of the block of record_timeline, and draw after it"
            )
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise HookcoreError("drawing needs matplotlib: pip install 'hookcore[demo]'") from error
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        end = max(span.stop for span in spans)
        groups = {name: at for at, name in enumerate(dict.fromkeys(span.group for span in spans))}
        for span in spans:
            row = 0 if span.kind == "copy" else 1
            colour = _STALL_COLOUR if span.kind == "stall" else _COLOURS[groups[span.group] % len(_COLOURS)]
            hatch = "////" if span.kind == "stall" else None
            axes.broken_barh(
                [(span.start / _MILLI, span.seconds / _MILLI)],
                (row - 0.45, 0.9),
                facecolor=colour,
                edgecolor="white",
                linewidth=0.3,
                hatch=hatch,
            )
            if span.kind != "stall":
                _write(axes, span, row, end)
        axes.set_yticks(range(len(_LANES)), _LANES)
        axes.invert_yaxis()
        axes.set_xlim(0, end / _MILLI)
        axes.set_xlabel("ms")
        axes.set_title(f"computing waited {self.stalled / _MILLI:.3g} of {end / _MILLI:.3g} ms (red)", size=9)
        if path is not None:
            figure.savefig(path)
        return figure


@runtime_checkable
class Recorded(Protocol):
    """A hook that can time what it streams."""

    def recording(self, timeline: Timeline) -> AbstractContextManager[None]:
        """Add a recorder to the timeline, and closes it at the end."""


@contextmanager
def record_timeline(target: Any) -> Iterator[Timeline]:
    """Time copies and computing of the calls inside the block, for what streams on a target.

    The host waits for the device at the block's beginning and end, and not in between; events cost a few
    microseconds for each group. The stalls are in the run report, too.

    Args:
        target: As for `hookcore.apply`.

    Raises:
        PlanError: Nothing on the target streams.
    """
    from hookcore.apply import status

    timeline = Timeline()
    with ExitStack() as recording:
        for item in status(target).attachments:
            for binding in item.bindings:
                if isinstance(binding.hook, Recorded):
                    recording.enter_context(binding.hook.recording(timeline))
        if not timeline.recorders:
            raise PlanError(
                "nothing on this target streams its weights, so there is nothing to time. Apply a technique "
                "such as GroupOffload on a device that has streams"
            )
        yield timeline


def _write(axes: Axes, span: Span, row: int, end: float) -> None:
    """Write the group's name into its bar, along or across, where there is room."""
    width = span.seconds / end * _WIDTH * 0.85 * _INCH
    length = len(span.group) * _FONT * 0.6
    if width < 1.3 * _FONT:
        return
    angle = 0 if length < width else 90
    if angle and length > _HEIGHT * 0.35 * _INCH:
        return
    x = (span.start + span.stop) / 2 / _MILLI
    axes.text(
        x, row, span.group, size=_FONT, rotation=angle, ha="center", va="center", color="white", clip_on=True
    )
