"""Finds a model's tensors in a checkpoint, by name."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from hookcore.errors import CheckpointError, HookcoreWarning
from hookcore.units import shortened, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hookcore.memory.files.checkpoint import Checkpoint
    from hookcore.memory.files.safetensors_header import TensorEntry
    from hookcore.target import Component, TensorSlot


def find_entries(component: Component, checkpoint: Checkpoint) -> dict[TensorSlot, TensorEntry]:
    """Find where each tensor lies that a checkpoint of this model has to hold.

    One of the names of a tied tensor is enough. Buffers that no state dict has are not looked for.

    A checkpoint whose names the model's library turns into others as it loads is read by these.

    Raises:
        CheckpointError: Tensors are missing in it, or have another shape, or others are made of them.
    """
    model = component.label("")
    entries = checkpoint.entries
    found, missing = _look_up(component, entries)
    if missing and (checkpoint_names := component.conventions.checkpoint_names) is not None:
        names = checkpoint_names(entries)
        entries = {names.get(key, key): entry for key, entry in entries.items()}
        found, missing = _look_up(component, entries)
    unexpected = [entry.key for key, entry in entries.items() if key not in component.slot_of]
    if missing:
        raise CheckpointError(
            f"the checkpoint in '{checkpoint.root}' is not one of {model!r}: {len(missing)} tensors are "
            f"missing in it ({shortened(missing)}), and it has {len(unexpected)} that the model lacks "
            f"({shortened(unexpected)}). Use the class and the config that it was saved with"
        )
    if unexpected:
        warnings.warn(
            f"the checkpoint in '{checkpoint.root}' has {len(unexpected)} tensors that {model!r} lacks: "
            f"{shortened(unexpected)}. They are not used",
            HookcoreWarning,
            stacklevel=4,
        )
    for slot, entry in found.items():
        for tensor in slot.tensors:
            if tuple(tensor.shape) != entry.shape:
                raise CheckpointError(
                    f"{entry.key!r} has shape {shown(entry.shape)} in '{entry.path}', but "
                    f"{tuple(tensor.shape)} in {model!r}. Use the config that it was saved with"
                )
    return found


def _look_up(
    component: Component, entries: Mapping[str, TensorEntry]
) -> tuple[dict[TensorSlot, TensorEntry], list[str]]:
    """Find each tensor by one of its names; return those that there are, and the names of the others."""
    stored = set(component.module.state_dict(keep_vars=True))
    found: dict[TensorSlot, TensorEntry] = {}
    missing = []
    for slot in component.slots:
        key = next((fqn for fqn in slot.fqns if fqn in entries), None)
        if key is not None:
            found[slot] = entries[key]
        elif not slot.is_buffer or not stored.isdisjoint(slot.fqns):
            missing.append(slot.name)
    return found, missing
