"""The virtual timeline: what ran when and where, what it waited for, and how much memory there was.

`Trace.to_chrome` writes it for chrome://tracing and https://ui.perfetto.dev (the Trace Event Format);
`Trace.draw` makes a picture.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from hookcore.testing.simulator.addresses import ALIGNMENT
from hookcore.testing.simulator.errors import SimulatorError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hookcore.testing.simulator.ordering import Operation, StreamKey

_MICRO = 1e6
_STALL_COLOUR = "#d62728"


@frozen
class Span:
    """One operation on the timeline; times are virtual seconds.

    Attributes:
        name: The operator's name.
        stream: Where it ran.
        engine: What ran it: "compute", "copy in", "copy out" or "peer copy".
        ready: When the host had issued it and the stream's last operation was over.
        start: When it began.
        end: When it was over.
        alignment: Bytes, up to 512, of which all addresses on devices are multiples that it reads or writes
            from. Kernels are chosen by it.
    """

    name: str
    stream: StreamKey
    engine: str
    ready: float
    start: float
    end: float
    alignment: int = ALIGNMENT

    @property
    def stall(self) -> float:
        """Seconds that it waited for other streams, or for its engine."""
        return max(0.0, self.start - self.ready)


@define
class Trace:
    """What happened while it was on.

    Attributes:
        spans: The operations, in the order in which they were issued.
        memory: Bytes in use after each change: (device, seconds of the host's time, bytes).
    """

    spans: list[Span] = field(factory=list)
    memory: list[tuple[int, float, int]] = field(factory=list)
    _alignments: dict[Operation, int] = field(factory=dict, init=False, repr=False)

    def add(self, operation: Operation, engine: str, ready: float, start: float, end: float) -> None:
        """Note an operation, after what it touches."""
        alignment = self._alignments.pop(operation, ALIGNMENT)
        self.spans.append(Span(operation.name, operation.stream, engine, ready, start, end, alignment))

    def touch(self, operation: Operation, address: int) -> None:
        """Note an address on a device that an operation reads or writes from."""
        self._alignments[operation] = math.gcd(self._alignments.get(operation, ALIGNMENT), address)

    def note_memory(self, device: int, time: float, nbytes: int) -> None:
        """Note how much memory is in use."""
        self.memory.append((device, time, nbytes))

    @property
    def duration(self) -> float:
        """Virtual seconds from the first operation's start to the last one's end."""
        if not self.spans:
            return 0.0
        return max(it.end for it in self.spans) - min(it.start for it in self.spans)

    def stalled(self, engine: str = "compute") -> float:
        """Virtual seconds that an engine's operations waited for other streams."""
        return sum(it.stall for it in self.spans if it.engine == engine)

    def to_chrome(self, path: str | Path) -> Path:
        """Write the timeline as Chrome trace JSON: a process a device, a thread a stream; microseconds.

        Returns:
            The path.
        """
        events: list[dict[str, Any]] = []
        for stream in sorted({it.stream for it in self.spans}):
            device, number = stream
            place = {"ph": "M", "pid": device, "tid": number}
            events.append(place | {"name": "process_name", "args": {"name": f"sim:{device}"}})
            events.append(place | {"name": "thread_name", "args": {"name": f"stream {number}"}})
        for span in self.spans:
            place = {"ph": "X", "pid": span.stream[0], "tid": span.stream[1]}
            if span.stall:
                times = {"ts": span.ready * _MICRO, "dur": span.stall * _MICRO}
                events.append(place | times | {"name": f"stall before {span.name}", "cat": "stall"})
            times = {"ts": span.start * _MICRO, "dur": (span.end - span.start) * _MICRO}
            events.append(place | times | {"name": span.name, "cat": span.engine})
        for device, time, nbytes in self.memory:
            counter = {"ph": "C", "pid": device, "ts": time * _MICRO, "name": "memory in use"}
            events.append(counter | {"args": {"bytes": nbytes}})
        path = Path(path)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        return path

    def draw(self, path: str | Path | None = None) -> Figure:
        """Draw the streams over time, with stalls in red; needs matplotlib.

        Args:
            path: Where to save the picture, if at all; the ending says how (".svg", ".png").

        Raises:
            SimulatorError: Nothing happened, or matplotlib is not installed.
        """
        if not self.spans:
            raise SimulatorError("there is nothing to draw: no operation ran while the trace was on")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SimulatorError("drawing needs matplotlib: pip install 'hookcore[demo]'") from error
        streams = sorted({it.stream for it in self.spans})
        engines = sorted({it.engine for it in self.spans})
        figure = Figure(figsize=(10, 1.2 + 0.6 * len(streams)), layout="constrained")
        axes = figure.subplots()
        for row, stream in enumerate(streams):
            here = [it for it in self.spans if it.stream == stream]
            for number, engine in enumerate(engines):
                bars = [(it.start * 1e3, (it.end - it.start) * 1e3) for it in here if it.engine == engine]
                axes.broken_barh(bars, (row - 0.35, 0.7), color=f"C{number}", label=engine)
            stalls = [(it.ready * 1e3, it.stall * 1e3) for it in here if it.stall]
            axes.broken_barh(stalls, (row - 0.12, 0.24), color=_STALL_COLOUR, label="stall")
        axes.set_yticks(range(len(streams)), [f"sim:{device} stream {number}" for device, number in streams])
        axes.invert_yaxis()
        axes.set_xlabel("virtual time in ms")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            *zip(*dict(zip(labels, zip(handles, labels, strict=True), strict=True)).values(), strict=True)
        )
        if path is not None:
            figure.savefig(path)
        return figure
