"""Shows what the ways took: a table and bars for the terminal, and a picture."""

from __future__ import annotations

import shutil
import statistics
from typing import TYPE_CHECKING, Any

from hookcore import format_bytes
from hookcore_plugins.demo.ways import WAYS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from hookcore_plugins.demo.child import Measurement
    from hookcore_plugins.demo.run import Difference

_MIB = 1024**2
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDEST = 100  # columns; longer bars are no easier to compare

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
_OURS = "#0072B2"
_OTHERS = "#999999"
_BUDGET = "#D55E00"


def table(measured: Mapping[str, Measurement], differences: Mapping[str, Difference]) -> str:
    """One line a way: names at the left, numbers at the right of their columns."""
    rows = [
        ("", "set-up", "step", "fastest", "peak", "of it", "device", "written", "difference"),
        ("", "s", "s", "s", "MiB", "model", "MiB", "MiB", "to resident"),
    ]
    for name, one in measured.items():
        rows.append(
            (
                WAYS[name].title,
                f"{one.setup:.1f}",
                f"{statistics.median(one.steps):.2f}",
                f"{min(one.steps):.2f}",
                f"{one.peak / _MIB:,.0f}",
                f"{one.weights_peak / _MIB:,.0f}",
                "-" if one.device_peak is None else f"{one.device_peak / _MIB:,.0f}",
                f"{one.written / _MIB:,.0f}",
                str(differences[name]),
            )
        )
    return "\n".join(columns(rows))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows out: the first column starts at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]


def bars(measured: Mapping[str, Measurement], budget: int, width: int | None = None) -> str:
    """Draw memory and time.

    Args:
        measured: What was measured.
        budget: Bytes of memory for weights.
        width: Columns to draw in; None takes the terminal's.
    """
    width = min(width or shutil.get_terminal_size().columns, _WIDEST)
    memory = {name: float(one.memory) for name, one in measured.items()}
    times = {name: statistics.median(one.steps) for name, one in measured.items()}
    return "\n".join(
        [
            f"memory for weights and activations (a budget of {format_bytes(budget)} for hookcore's weights)",
            *_bars(memory, format_bytes, width),
            "time of a step",
            *_bars(times, "{:.2f} s".format, width),
        ]
    )


def _bars(values: Mapping[str, float], write: Callable[[float], str], width: int) -> list[str]:
    titles = {name: WAYS[name].title for name in values}
    left = max(map(len, titles.values()))
    right = max(len(write(value)) for value in values.values())
    room = max(1, width - left - right - 4)
    most = max(values.values())
    lines = []
    for name, value in values.items():
        full, eighths = divmod(round(8 * room * value / most), 8)
        bar = "█" * full + _EIGHTHS[eighths].strip()
        lines.append(f"  {titles[name]:<{left}} {bar} {write(value)}")
    return lines


def picture(measured: Mapping[str, Measurement], about: Mapping[str, Any], path: Path) -> None:
    """Save memory and time as two panels side by side.

    Args:
        measured: What was measured.
        about: What was run, and where.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.9 + 0.5 * len(measured)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(1, 2, sharey=True)
    model = about["model"]
    device = "" if about["device"] == "cpu" else f", {about['device']}"
    figure.suptitle(
        f"{model['family']} transformer, {format_bytes(model['nbytes'])} of {model['dtype']} weights, "
        f"{about['machine']}{device}",
        fontsize=10,
    )
    _panel(
        memory,
        measured,
        "memory for weights and activations, at the peak (MiB)",
        lambda it: it.memory / _MIB,
        ",.0f",
    )
    budget = about["budget"] / _MIB
    memory.axvline(budget, color=_BUDGET, linestyle="--", linewidth=1.5)
    memory.annotate(
        f" budget {budget:,.0f}",
        (budget, 1),
        xycoords=("data", "axes fraction"),
        color=_BUDGET,
        fontsize=8,
        verticalalignment="bottom",
    )
    _panel(time, measured, "time of a step, median (s)", lambda it: statistics.median(it.steps), ".2f")
    figure.savefig(path)


def _panel(
    axes: Any,
    measured: Mapping[str, Measurement],
    title: str,
    value: Callable[[Measurement], float],
    spelling: str,
) -> None:
    titles = [WAYS[name].title for name in measured]
    colors = [_OURS if name.startswith("hookcore") else _OTHERS for name in measured]
    values = [value(one) for one in measured.values()]
    drawn = axes.barh(titles, values, color=colors, height=0.65)
    on_white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the budget's line may pass here
    axes.bar_label(
        drawn, labels=[format(it, spelling) for it in values], padding=4, fontsize=9, bbox=on_white
    )
    axes.set_xlabel(title, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.15 * max(values))
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
