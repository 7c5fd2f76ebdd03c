"""Layerwise casting: weights in a small dtype, computed with in the model's own, one layer at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookcore import hookimpl
from hookcore_plugins.layerwise_casting.technique import LayerwiseCasting

if TYPE_CHECKING:
    from hookcore import Technique

__all__ = ["LayerwiseCasting"]


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Bring `LayerwiseCasting`."""
    return [LayerwiseCasting]
