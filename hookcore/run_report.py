"""What techniques counted while a model ran, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from hookcore.answers import ask_figures
from hookcore.report import table
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hookcore.attachment import Attachment


@frozen
class RunEntry:
    """What one technique counted on one component.

    Attributes:
        component: The component's name, or the class of a target that is a module itself.
        technique: Name of the technique.
        counted: An attrs object with the figures, of a class of the technique's own.
    """

    component: str
    technique: str
    counted: Any


@frozen
class RunReport:
    """What techniques counted since they were applied or last reset. Print it.

    Attributes:
        entries: One for each technique and component that counts anything.
    """

    entries: tuple[RunEntry, ...]

    def __str__(self) -> str:
        kinds: dict[type, list[RunEntry]] = {}
        for entry in self.entries:
            kinds.setdefault(type(entry.counted), []).append(entry)
        return "\n\n".join(map(_table, kinds.values())) or "nothing is counted"


def run_report(attachments: Iterable[Attachment]) -> RunReport:
    """Ask what is attached for what it counted."""
    return RunReport(
        tuple(
            RunEntry(item.component.label(""), item.technique.name, counted)
            for item in attachments
            for _, binding in item.overriding("run_report")
            if (counted := ask_figures(item.technique, binding, item.component)) is not None
        )
    )


def _table(entries: Sequence[RunEntry]) -> str:
    """A column for each entry; the entries' figures are of one class. What is no figure follows in lines."""
    rows = [
        ["", *(entry.component for entry in entries)],
        ["technique", *(entry.technique for entry in entries)],
    ]
    lines = []
    for field in attrs.fields(type(entries[0].counted)):
        name, _, unit = field.name.rpartition("_")
        label = name if unit in ("bytes", "seconds") else field.name
        values = [getattr(entry.counted, field.name) for entry in entries]
        if isinstance(values[0], Mapping):
            for entry, found in zip(entries, values, strict=True):
                lines += [f"{entry.component}: {count} x {phrase}" for phrase, count in found.items()]
        else:
            rows.append([label.replace("_", " "), *(_shown(value, unit) for value in values)])
    return "\n".join([table(rows), *lines])


def _shown(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return format_bytes(value)
    return f"{value:.4g} s" if unit == "seconds" else str(value)
