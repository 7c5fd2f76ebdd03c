"""accelerate: the hooks that it leaves on modules."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from hookcore import ForeignMechanism, hookimpl, refuse_meanwhile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

_REMOVE = "call `accelerate.hooks.remove_hook_from_module(model, recurse=True)`"


@hookimpl
def hookcore_find_foreign(modules: Mapping[str, nn.Module]) -> Iterator[ForeignMechanism]:
    """Find modules with an `_hf_hook`: offloading, device maps, casting."""
    for fqn, module in modules.items():
        hook = module.__dict__.get("_hf_hook")
        if hook is not None:
            parts = list(_parts(hook))
            names = ", ".join(type(part).__name__ for part in parts)
            what = f"an accelerate hook ({names})"
            yield ForeignMechanism(fqn, what, next(filter(None, map(_loss, parts)), _REMOVE))


@hookimpl
def hookcore_observe(event: str) -> None:  # noqa: ARG001 -- whatever it is, it may have been the first or last
    """Make accelerate refuse to offload, map or cast what hookcore has hooked."""
    hooks = sys.modules.get("accelerate.hooks")
    for name in ("AlignDevicesHook", "CpuOffload", "LayerwiseCastingHook"):
        if (kind := getattr(hooks, name, None)) is not None:
            refuse_meanwhile(kind, "init_hook", _about_to_hook, _forget_forward)


def _about_to_hook(hook: Any, module: nn.Module) -> tuple[nn.Module, str]:
    return module, f"an accelerate hook ({type(hook).__name__})"


def _forget_forward(module: nn.Module) -> None:
    """Drop what accelerate notes on a module before it makes the hook ready."""
    if "_hf_hook" not in vars(module):
        vars(module).pop("_old_forward", None)


def _parts(hook: Any) -> Iterator[Any]:
    """The hooks that a hook is made of: a SequentialHook holds several, others are one."""
    if hasattr(hook, "hooks"):
        for part in hook.hooks:
            yield from _parts(part)
    else:
        yield hook


def _loss(hook: Any) -> str | None:
    """The remedy for a hook whose removal does not bring the weights back; None for others."""
    if type(hook).__name__ == "LayerwiseCastingHook":
        return "load the model again without casting: accelerate cannot give back the weights it has rounded"
    original_devices = getattr(hook, "original_devices", {})
    if getattr(hook, "offload", False) and torch.device("meta") in original_devices.values():
        return (
            "load the model again without `device_map`: accelerate keeps these weights apart from the model, "
            "and removing the hook leaves them on the meta device"
        )
    return None
