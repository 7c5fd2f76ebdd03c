"""Computes attention by a backend of the user's choice, in one model and no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookcore import PlanError, hookimpl
from hookcore_plugins.attention_backend.backends import BACKENDS
from hookcore_plugins.attention_backend.chunked import chunked_attention
from hookcore_plugins.attention_backend.counts import AttentionReport
from hookcore_plugins.attention_backend.dispatch import AttentionError
from hookcore_plugins.attention_backend.technique import AttentionBackend

if TYPE_CHECKING:
    from hookcore import AttentionFunction, Plan, Technique

__all__ = ["AttentionBackend", "AttentionError", "AttentionReport", "chunked_attention"]


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Register `AttentionBackend`."""
    return [AttentionBackend]


@hookimpl
def hookcore_register_attention_functions() -> tuple[AttentionFunction, ...]:
    """Register torch's kernels, those of optional packages, and hookcore's own."""
    return BACKENDS


@hookimpl
def hookcore_review_plan(plan: Plan) -> None:
    """Refuse an attention backend that no component uses.

    Raises:
        PlanError: All components were left alone.
    """
    taken = [step.technique for step in plan.steps]
    for step in plan.left_alone:
        if isinstance(step.technique, AttentionBackend) and step.technique not in taken:
            raise PlanError(
                f"attention_backend {step.technique.backend!r} is taken by no component of the target. "
                + " ".join(
                    f"{it.component.name!r}: {it.skipped[0].reason}."
                    for it in plan.left_alone
                    if it.technique == step.technique
                )
                + " Leave it out, or name the modules that compute attention, as modules=['attn']"
            )
