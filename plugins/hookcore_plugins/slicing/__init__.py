"""Slicing: a batch is computed a few rows at a time, so that activations of only so many are in memory."""

from __future__ import annotations

from hookcore import hookimpl
from hookcore_plugins.slicing.technique import Slicing

__all__ = ["Slicing", "hookcore_register_techniques"]


@hookimpl
def hookcore_register_techniques() -> list[type[Slicing]]:
    """Bring `Slicing`."""
    return [Slicing]
