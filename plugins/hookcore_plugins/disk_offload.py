"""Disk offloading: weights stay in the safetensors files they came from, and are read as they are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import field, frozen

from hookcore import CheckpointError, Phase, Skipped, Technique, hookimpl, parse_bytes, parse_device
from hookcore.memory import (
    Checkpoint,
    DiskMover,
    MappedFile,
    Origin,
    Placement,
    check_movable,
    choose_residents,
    cost,
    largest_held,
    leaf_units,
    make_groups,
    map_checkpoint,
    origin_of,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from hookcore import Binding, Component, TensorSlot

_KEYS_SHOWN = 5


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value)


def _budget(value: int | str | None) -> int | None:
    return None if value is None else parse_bytes(value)


@frozen
class DiskOffload(Technique):
    """Streams weights from the checkpoint's own files. Nothing is written.

    Parameters take no memory between calls, and read true at any time: they are mapped. For its call a
    layer's weights are brought into memory, in the order that the last call has shown, ahead of use. Buffers
    stay in memory.

    Attributes:
        checkpoint: A safetensors file, an index, or a folder, as `save_pretrained` writes it. None for a
            model that `hookcore.load` makes, which knows.
        execution_device: Where the model computes; inputs are moved there.
        memory_budget: Bytes, or text such as "512MiB", that all weights together may take in memory. As
            many as it has room for stay, spread evenly. None: as little as one call needs, and `read_ahead`.
        read_ahead: Bytes of weights that may be read ahead of their use.
    """

    name: ClassVar[str] = "disk_offload"
    phase: ClassVar[Phase] = Phase.PLACE
    replans: ClassVar[bool] = True
    materializes: ClassVar[bool] = True

    checkpoint: Path | None = field(default=None, converter=_path)
    execution_device: torch.device = field(default=torch.device("cpu"), converter=parse_device, kw_only=True)
    memory_budget: int | None = field(default=None, converter=_budget, kw_only=True)
    read_ahead: int = field(default=128 * 2**20, converter=parse_bytes, kw_only=True)

    def bind(self, component: Component) -> Iterator[Binding | Skipped]:
        """Lists the hooks at the component's entries and at the calls of all layers.

        Raises:
            CheckpointError: The checkpoint is damaged, or is not one of this model.
            BudgetError: The budget is less than one call needs.
            UnsupportedModelError: A parameter is of a kind that cannot be exchanged.
        """
        origins = self._origins(component)
        if not origins:
            yield Skipped("", "none of its parameters is in the checkpoint")
            return
        check_movable(component, origins)
        groups = make_groups(component, leaf_units(component), origins)
        costs = {group: cost([origins[slot] for slot in group.slots]) for group in groups}
        budget, what = self.memory_budget, component.label("")
        resident = choose_residents(costs, budget, self.read_ahead, what)
        streamed = [group for group in groups if group not in set(resident)]
        if budget is None:
            budget = largest_held(costs)[0] + self.read_ahead
        mover = DiskMover(streamed, origins, self.execution_device, budget, self.read_ahead)
        yield from Placement(component, streamed, resident, mover, self.execution_device).bindings()
        for slot in component.slots:
            if slot not in origins:
                yield Skipped(slot.name, "stays in memory: a buffer, or not in the checkpoint")

    def _origins(self, component: Component) -> dict[TensorSlot, Origin]:
        """Finds where each parameter's values lie: known from loading, or by name in the checkpoint."""
        parameters = [slot for slot in component.slots if not slot.is_buffer]
        known = {slot: origin for slot in parameters if (origin := origin_of(slot.tensors[0])) is not None}
        if known:
            return known
        if self.checkpoint is None:
            raise CheckpointError(
                f"{component.label('')!r} was not made by hookcore.load, so it is not known where its weights "
                "lie. Give DiskOffload the path of its safetensors files as checkpoint="
            )
        checkpoint = Checkpoint.open(self.checkpoint)
        _check_keys(component, parameters, checkpoint)
        mappings = map_checkpoint(checkpoint)
        return {slot: _origin(component, slot, checkpoint, mappings) for slot in parameters}


def _check_keys(component: Component, parameters: list[TensorSlot], checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint whose names are not the model's."""
    names = {fqn for slot in component.slots for fqn in slot.fqns}
    missing = [slot.name for slot in parameters if not any(fqn in checkpoint.entries for fqn in slot.fqns)]
    unexpected = [key for key in checkpoint.entries if key not in names]
    if missing:
        raise CheckpointError(
            f"the checkpoint in '{checkpoint.root}' is not one of {component.label('')!r}: "
            f"{len(missing)} parameters are missing in it ({_some(missing)}), and it has {len(unexpected)} "
            f"that the model lacks ({_some(unexpected)}). Save the model with save_pretrained and use that"
        )


def _origin(
    component: Component, slot: TensorSlot, checkpoint: Checkpoint, mappings: Mapping[Path, MappedFile]
) -> Origin:
    entry = next(checkpoint.entries[fqn] for fqn in slot.fqns if fqn in checkpoint.entries)
    shape = tuple(slot.tensors[0].shape)
    if any(tuple(tensor.shape) != entry.shape for tensor in slot.tensors):
        raise CheckpointError(
            f"{component.label(slot.name)!r} has shape {shape}, but in '{entry.path}' it has {entry.shape}. "
            "The checkpoint is of a model with another config"
        )
    return Origin.of_entry(checkpoint, entry, mappings[entry.path], slot.tensors[0].dtype)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_KEYS_SHOWN])
    return f"{shown}, ..." if len(names) > _KEYS_SHOWN else shown or "none"


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Brings disk offloading."""
    return [DiskOffload]
