"""The ways to run the model. Each brings it from disk to where it can be called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen

import hookcore
from hookcore import parse_dtype

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from hookcore_plugins.demo.model import DemoCheckpoints, DemoModel


@frozen
class Setting:
    """What a way is given.

    Attributes:
        model: What was built.
        checkpoints: Where it lies.
        device: Where it is to compute.
        budget: Bytes of memory that weights may take, for ways that can be told.
        scratch: A folder to write to that is thrown away.
    """

    model: DemoModel
    checkpoints: DemoCheckpoints
    device: torch.device
    budget: int
    scratch: Path


@frozen
class Way:
    """One way to run the model.

    Attributes:
        title: Its name for people.
        start: Makes the model.
        exact: Whether its output has to have the bits of the resident model's.
        lossless: Whether it computes with unchanged weights.
    """

    title: str
    start: Callable[[Setting], Any]
    exact: bool
    lossless: bool


def techniques(setting: Setting, *, rounded: bool) -> list[hookcore.Technique]:
    """Return what the two ways of hookcore put on the model."""
    from hookcore_plugins.disk_offload import DiskOffload
    from hookcore_plugins.layerwise_casting import LayerwiseCasting

    offload = DiskOffload(execution_device=setting.device, memory_budget=setting.budget)
    if not rounded:
        return [offload]
    return [offload, LayerwiseCasting(setting.model.storage_dtype, parse_dtype(setting.model.dtype))]


def _resident(setting: Setting) -> Any:
    model = _from_pretrained(setting)
    if setting.device.type != "cpu":
        return model.to(setting.device)
    for parameter in model.parameters():
        parameter.sum()  # diffusers maps the files: read them now and not in the first step
    return model


def _hookcore_disk(setting: Setting) -> Any:
    return hookcore.load(
        setting.model.model_class, setting.checkpoints.full, techniques(setting, rounded=False)
    )


def _hookcore_disk_rounded(setting: Setting) -> Any:
    return hookcore.load(
        setting.model.model_class,
        setting.checkpoints.small,
        techniques(setting, rounded=True),
        torch_dtype=setting.model.dtype,
    )


def _accelerate(setting: Setting) -> Any:
    from accelerate import disk_offload

    return disk_offload(_from_pretrained(setting), setting.scratch, execution_device=setting.device)


def _diffusers_blocks(setting: Setting) -> Any:
    return _diffusers_group_offload(setting, "block_level", num_blocks_per_group=1)


def _diffusers_leaves(setting: Setting) -> Any:
    return _diffusers_group_offload(setting, "leaf_level")


def _diffusers_group_offload(setting: Setting, offload_type: str, **options: Any) -> Any:
    model = _from_pretrained(setting)
    model.enable_group_offload(
        onload_device=setting.device,
        offload_type=offload_type,
        offload_to_disk_path=str(setting.scratch),
        **options,
    )
    return model


def _from_pretrained(setting: Setting) -> Any:
    return setting.model.model_class.from_pretrained(
        setting.checkpoints.full, torch_dtype=parse_dtype(setting.model.dtype)
    )


WAYS = {
    "resident": Way("all in memory", _resident, exact=True, lossless=True),
    "hookcore": Way("hookcore, from disk", _hookcore_disk, exact=True, lossless=True),
    "hookcore-cast": Way("hookcore, from disk, cast", _hookcore_disk_rounded, exact=False, lossless=False),
    "accelerate": Way("accelerate disk_offload", _accelerate, exact=False, lossless=True),
    "diffusers-block": Way("diffusers group, blocks", _diffusers_blocks, exact=False, lossless=True),
    "diffusers-leaf": Way("diffusers group, leaves", _diffusers_leaves, exact=False, lossless=True),
}
"""All ways by name. Those that copy weights to other addresses may differ from `exact` ones in the last bits:
kernels choose their path by alignment."""

DEMO_WAYS = ("resident", "hookcore", "hookcore-cast", "accelerate")
