"""diffusers' pipelines as targets: their components, the order in which these run, and when a run ends.

Known by what they have, not by their class: `components`, a mapping by name. So modular pipelines and the
community's are targets too, and diffusers is not imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from hookcore import OpenedTarget, hookimpl

_RUN_END = "maybe_free_model_hooks"
"""What diffusers' pipelines call last in a run; without diffusers' own offloading it does next to nothing."""

_NOISE_LEVEL = re.compile(r"\w*timesteps?\w*|\w*noise_time|r|t|sigmas?")
"""What the models of diffusers that remove noise call their argument for how much of it there is."""


@hookimpl
def hookcore_open_target(target: Any) -> OpenedTarget | None:
    """Take what is a module from a pipeline's components, each once."""
    everything = getattr(target, "components", None)
    if not isinstance(everything, Mapping):
        return None
    components: dict[str, nn.Module] = {}
    absent: dict[str, str] = {}
    names: dict[nn.Module, str] = {}
    for name, value in everything.items():
        if value is None:
            absent[name] = "is None"
        elif not isinstance(value, nn.Module):
            absent[name] = f"is a {type(value).__name__}, not a torch.nn.Module"
        elif value in names:
            absent[name] = f"is the same module as {names[value]!r}"
        else:
            components[name] = value
            names[value] = name
    sequence = (getattr(target, "model_cpu_offload_seq", None) or "").split("->")
    ends = callable(getattr(type(target), _RUN_END, None))
    return OpenedTarget(
        components,
        absent=absent,
        sequence=(name for name in sequence if name in components),
        denoisers=(name for name, module in components.items() if _removes_noise(module)),
        run_end=_RUN_END if ends else None,
    )


def _removes_noise(model: nn.Module) -> bool:
    """Return whether a model is told how much noise there is."""
    try:
        parameters = inspect.signature(type(model).forward).parameters
    except (AttributeError, TypeError, ValueError):  # the class alone does not tell, as of a ScriptModule
        return False
    return any(map(_NOISE_LEVEL.fullmatch, parameters))
