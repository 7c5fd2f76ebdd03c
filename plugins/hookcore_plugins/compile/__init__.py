"""Compiling with torch.compile: a model's repeated blocks, each kind once, with all hooks outside of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookcore import hookimpl
from hookcore_plugins.compile.shared_code import CompileReport
from hookcore_plugins.compile.technique import Compile

if TYPE_CHECKING:
    from hookcore import Technique

__all__ = ["Compile", "CompileReport"]


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Bring `Compile`."""
    return [Compile]
