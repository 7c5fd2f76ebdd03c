"""Finds in which files the values of a model's parameters lie already."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hookcore.errors import UnsupportedModelError
from hookcore.memory.files import file_weight as file_weights
from hookcore.memory.files.checkpoint import Checkpoint
from hookcore.memory.files.checkpoint_names import find_entries
from hookcore.memory.files.file_weight import forget_paused
from hookcore.memory.files.mapped_file import find_mapping, map_checkpoint
from hookcore.memory.files.origin import Origin, origin_of, wanted_dtype
from hookcore.memory.files.spill import spill
from hookcore.memory.model_dtype import ModelDtypeHook, models_with_dtype
from hookcore.technique import Binding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import torch
    from torch import nn

    from hookcore.memory.files.mapped_file import MappedFile
    from hookcore.target import Component, TensorSlot


class FileOrigins(Mapping["TensorSlot", Origin]):
    """Where the values of parameters lie, by slot; what lies in no file is written to one when it is needed.

    Args:
        known: Of those that lie in files.
        unwritten: Those that do not.
        folder: Where to write these.
    """

    def __init__(
        self,
        known: Mapping[TensorSlot, Origin],
        unwritten: Iterable[TensorSlot] = (),
        folder: Path | None = None,
    ) -> None:
        self._known = dict(known)
        self._taken: dict[TensorSlot, weakref.ref[Origin]] = {}
        self._unwritten = list(unwritten)
        self._folder = folder
        self._settled: set[TensorSlot] = set()
        self._mappings: set[MappedFile] = set()  # of those that are settled

    def __getitem__(self, slot: TensorSlot) -> Origin:
        """Return where a parameter lies.

        Raises:
            CheckpointError: It has to be written, and cannot be.
        """
        if slot in self._unwritten and self._folder is not None:
            self._known |= spill(self._unwritten, self._folder)
            self._unwritten.clear()
        taken = self._taken.get(slot)
        origin = None if taken is None else taken()
        return self._known[slot] if origin is None else origin

    def take(self, slots: Iterable[TensorSlot]) -> None:
        """Leave origins to the parameters that have taken them over.

        What a plan refers to for as long as somebody looks at it would keep the files of a removed technique.
        """
        for slot in slots:
            if slot in self._known:
                self._taken[slot] = weakref.ref(self._known.pop(slot))

    def finalize(self, slots: Iterable[TensorSlot]) -> None:
        """Have parameters lie in memory, or simply show the checkpoint's tensor, for good.

        Raises:
            CheckpointError: Values have to be converted, and a file has changed.
        """
        slots = list(slots)
        mappings = {self[slot].mapping for slot in slots if slot in self}
        file_weights.finalize(slots)
        self._settled.update(slots)
        self._mappings |= mappings
        if self._settled.issuperset(self):
            forget_paused(self._mappings)
            self._mappings.clear()

    def __iter__(self) -> Iterator[TensorSlot]:
        return iter((*self._known, *self._taken, *self._unwritten))

    def __len__(self) -> int:
        return len(self._known) + len(self._taken) + len(self._unwritten)


def known_origins(slots: Iterable[TensorSlot], *, again: bool) -> dict[TensorSlot, Origin]:
    """Return where parameters lie that are streamed, or that `hookcore.load` made to be.

    Args:
        slots: The parameters.
        again: Whether the technique that streams them is on the model already, and only planned anew.
    """
    found = {}
    for slot in slots:
        origin = origin_of(slot.tensors[0])
        if origin is None and again:
            origin = origin_of(slot.tensors[0], paused=True)
        if origin is not None:
            found[slot] = origin
    return found


def origins_in(
    component: Component, slots: Iterable[TensorSlot], checkpoint: Checkpoint
) -> dict[TensorSlot, Origin]:
    """Return where parameters lie in a checkpoint, by name.

    Raises:
        CheckpointError: One is missing there, or is of another shape, or a file cannot be mapped.
    """
    entries = find_entries(component, checkpoint)
    mappings = map_checkpoint(checkpoint)
    return {
        slot: Origin.of_entry(checkpoint, entries[slot], mappings[entries[slot].path], slot.tensors[0].dtype)
        for slot in slots
    }


def origins_of_mapped(slots: Iterable[TensorSlot]) -> dict[TensorSlot, Origin]:
    """Find origins of parameters that show whole tensors of a mapped file, as `hookcore.load` makes them."""
    checkpoints: dict[Path, Checkpoint] = {}
    found = {}
    for slot in slots:
        mapped = find_mapping(slot.tensors[0])
        if mapped is None:
            continue
        mapping, offset, _ = mapped
        if mapping.path not in checkpoints:
            checkpoints[mapping.path] = Checkpoint.open(mapping.path)
        checkpoint = checkpoints[mapping.path]
        for entry in checkpoint.entries.values():
            if entry.offset == offset and entry.nbytes:
                origin = Origin.of_entry(checkpoint, entry, mapping)
                if all(_is_whole(tensor, origin) for tensor in slot.tensors):
                    found[slot] = origin
    return found


def _is_whole(tensor: torch.Tensor, origin: Origin) -> bool:
    raw = origin.raw
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) == (
        raw.data_ptr(),
        raw.dtype,
        raw.shape,
        raw.stride(),
    )


def check_ties(component: Component, parameters: Iterable[TensorSlot]) -> None:
    """Refuse parameters that share memory other than wholly: a checkpoint holds each on its own.

    Raises:
        UnsupportedModelError: There are some.
    """
    for slot in parameters:
        first, *others = slot.tensors
        for tensor in others:
            if (tensor.data_ptr(), tensor.shape, tensor.stride()) != (
                first.data_ptr(),
                first.shape,
                first.stride(),
            ):
                names = " and ".join(repr(component.label(fqn)) for fqn in slot.fqns)
                raise UnsupportedModelError(
                    f"{names} share memory but are different views of it, which cannot be read from a file. "
                    "Give one of them memory of its own with .clone()"
                )


_OTHER_DTYPE = (
    "Call hookcore.remove() first and convert the model in memory, or give torch_dtype= to hookcore.load()"
)


def dtype_hooks(component: Component, origins: Mapping[TensorSlot, Origin]) -> Iterator[Binding]:
    """Make models answer the dtype that calls find, where their weights show another one between calls."""
    converted: set[nn.Module] = {
        owner
        for slot, origin in origins.items()
        if origin.dtype != origin.entry.dtype
        for owner, _ in slot.owners
    }
    for fqn, model in models_with_dtype(component.modules):
        if not converted.isdisjoint(model.modules()):
            dtypes = (wanted_dtype(parameter) for parameter in model.parameters())
            first = next((dtype for dtype in dtypes if dtype.is_floating_point), model.dtype)
            yield Binding(fqn, ModelDtypeHook(first, _OTHER_DTYPE))
