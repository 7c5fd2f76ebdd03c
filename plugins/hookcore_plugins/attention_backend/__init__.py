"""Attention by a backend of the user's choice, in one model and no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookcore import hookimpl
from hookcore_plugins.attention_backend.chunked import chunked_attention
from hookcore_plugins.attention_backend.errors import AttentionError
from hookcore_plugins.attention_backend.functions import FUNCTIONS
from hookcore_plugins.attention_backend.tally import AttentionReport
from hookcore_plugins.attention_backend.technique import AttentionBackend

if TYPE_CHECKING:
    from hookcore import AttentionFunction, Technique

__all__ = ["AttentionBackend", "AttentionError", "AttentionReport", "chunked_attention"]


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Brings the choice of attention backends."""
    return [AttentionBackend]


@hookimpl
def hookcore_register_attention_functions() -> tuple[AttentionFunction, ...]:
    """Brings torch's kernels, those of well-known packages, and hookcore's own."""
    return FUNCTIONS
