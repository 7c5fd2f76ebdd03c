"""Model offloading: of several components, the one that runs is on the device, the others in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookcore import hookimpl
from hookcore_plugins.model_offload.technique import ModelOffload, offload
from hookcore_plugins.model_offload.weights import OffloadReport

if TYPE_CHECKING:
    from hookcore import Technique

__all__ = ["ModelOffload", "OffloadReport", "offload"]


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Bring `ModelOffload`."""
    return [ModelOffload]
