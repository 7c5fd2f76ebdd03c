"""Tables for people: what a plan would do, what is on a model, where its bytes are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from hookcore.answers import ask_sizes
from hookcore.hook import overrides
from hookcore.memory.files.mapped_file import find_mapping
from hookcore.units import format_bytes, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hookcore.placed import Placed
    from hookcore.target import Component
    from hookcore.technique import Binding

_SKIPPED_SHOWN = 3


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def plan_table(
    steps: Sequence[Placed], needs: Mapping[str, int], left_alone: Sequence[Placed], notes: Sequence[str]
) -> str:
    """Return what a plan would do, outermost first, and what it leaves alone.

    Args:
        steps: What it would do.
        needs: Bytes of each device that weights will take.
        left_alone: What it would not do.
        notes: What plugins remarked.
    """
    if not steps:
        return "\n".join(["nothing to apply", *_left_alone(left_alone)])
    rows = [("component", "technique", "phase", "hooks on")]
    rows += [
        (step.component.label(""), step.technique.name, step.technique.phase.name, _hooked(step.bindings))
        for step in steps
    ]
    weights = [f"weights need {format_bytes(size)} of {device}" for device, size in needs.items()]
    remarks = [f"note: {note}" for note in notes]
    return "\n".join([table(rows), *weights, *_skipped(steps), *_left_alone(left_alone), *remarks])


def attachment_table(attachments: Sequence[Placed], left_alone: Sequence[Placed] = ()) -> str:
    """Return what is on a model, outermost first, where the bytes are, and what was left alone."""
    rows = [("component", "technique", "hooks on", "bytes")]
    rows += [
        (item.component.label(""), item.technique.name, _hooked(item.bindings), _placed(item) or "-")
        for item in attachments
    ]
    return "\n".join([table(rows), *_skipped(attachments), *_left_alone(left_alone)])


def tensor_bytes(components: Iterable[Component]) -> dict[str, int]:
    """Bytes of parameters and buffers by device, ties counted once; what is mapped from files is `"disk"`."""
    total: Counter[str] = Counter()
    seen: set[int] = set()
    for component in components:
        for slot in component.afresh().slots:
            if id(slot.tensors[0]) not in seen:
                seen.update(map(id, slot.tensors))
                tensor = slot.tensors[0]
                total["disk" if find_mapping(tensor) else str(tensor.device)] += slot.nbytes
    return dict(total)


def _hooked(bindings: Sequence[Binding]) -> str:
    # Without the hooks for calls of parts by themselves, of which a model's own calls have nothing.
    entries = Counter(binding.entry for binding in bindings if not binding.hook.outermost_only)
    return ", ".join(f"{count} x {entry}()" for entry, count in entries.items()) or "nothing"


def _placed(item: Placed) -> str:
    total: Counter[str] = Counter()
    for binding in item.bindings:
        if overrides(type(binding.hook), "report"):
            total.update(ask_sizes(item.technique, binding, item.component, "report"))
    return ", ".join(f"{format_bytes(size)} {label}" for label, size in sorted(total.items()))


def _skipped(placed: Sequence[Placed]) -> Iterator[str]:
    for item in placed:
        by_reason: dict[str, list[str]] = {}
        for skip in item.skipped:
            by_reason.setdefault(skip.reason, []).append(skip.fqn or item.component.label(""))
        for reason, fqns in by_reason.items():
            yield f"skipped by {item.technique.name}: {shortened(fqns, _SKIPPED_SHOWN)}: {reason}"


def _left_alone(steps: Sequence[Placed]) -> Iterator[str]:
    """Lines for whole components, those together that a technique leaves alone for one reason."""
    names: dict[tuple[str, str], list[str]] = {}
    for step in steps:
        for skip in step.skipped:
            names.setdefault((step.technique.name, skip.reason), []).append(step.component.label(""))
    for (technique, reason), components in names.items():
        yield f"skipped by {technique}: {shortened(components)}: {reason}"
