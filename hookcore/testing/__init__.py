"""What a plugin's own tests need: contract, state machine, models, and what "as it was before" means.

    from hookcore.testing import HookMachine, TechniqueContract

Names are imported when they are asked for, so that only what needs pytest and Hypothesis
(`pip install hookcore[testing]`) imports them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookcore.testing.cases import ModelCase
    from hookcore.testing.contract import TechniqueContract
    from hookcore.testing.machine import HookMachine
    from hookcore.testing.modules import module_trees
    from hookcore.testing.snapshot import ModelSnapshot, same_bits

__all__ = ["HookMachine", "ModelCase", "ModelSnapshot", "TechniqueContract", "module_trees", "same_bits"]

_HOMES = {
    "HookMachine": "machine",
    "ModelCase": "cases",
    "ModelSnapshot": "snapshot",
    "TechniqueContract": "contract",
    "module_trees": "modules",
    "same_bits": "snapshot",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
