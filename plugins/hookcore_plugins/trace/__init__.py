"""Tracing with torch.jit.trace: records the operations of one call, and runs them without Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookcore import hookimpl
from hookcore_plugins.trace.hook import TraceReport
from hookcore_plugins.trace.technique import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hookcore import Plan, Technique

__all__ = ["Trace", "TraceReport"]


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Register `Trace`."""
    return [Trace]


@hookimpl
def hookcore_review_plan(plan: Plan) -> Iterator[str]:
    """Note that torch has deprecated tracing."""
    if any(isinstance(step.technique, Trace) for step in plan.steps):
        yield (
            "torch.jit.trace is deprecated; torch recommends torch.compile (the technique `compile`) or "
            "torch.export instead"
        )
