"""Weights that are in no file yet, written to one, for as long as something streams them from there.

A file is written under another name first: one that stands under its own name is complete. It goes away when
its weights have been given back for good, when nothing refers to it any more, or when the process that wrote
it ends, and stays, complete, if that is killed. Only its owner can read it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import uuid
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from attrs import define

from hookcore.errors import CheckpointError
from hookcore.memory.files.checkpoint import Checkpoint
from hookcore.memory.files.leftovers import make_claimed
from hookcore.memory.files.mapped_file import MappedFile
from hookcore.memory.files.origin import Origin
from hookcore.memory.files.safetensors_header import DTYPES
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from hookcore.target import TensorSlot

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_UNFINISHED = "hookcore-*.unfinished"


@define(eq=False)
class _File:
    """A file that was written.

    Attributes:
        remaining: The tensors in it that were not given back for good yet.
        remove: Removes it; does nothing the second time.
    """

    remaining: set[str]
    remove: weakref.finalize[Any, Any]


_FILES: dict[Path, _File] = {}


def can_be_written(slot: TensorSlot) -> bool:
    """Whether a safetensors file can hold a parameter: of some dtypes, such as complex128, it holds none."""
    return all(tensor.dtype in _NAMES for tensor in slot.tensors)


def spill(slots: Iterable[TensorSlot], folder: Path) -> dict[TensorSlot, Origin]:
    """Write parameters to a new file, and say where in it each lies.

    Args:
        slots: The parameters; the objects in a slot hold the same values.
        folder: Where to; made if need be.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it.
    """
    slots = list(slots)
    path = folder / f"hookcore-{uuid.uuid4().hex}.safetensors"
    _write(path, {slot.name: slot.tensors[0].detach() for slot in slots})
    checkpoint = Checkpoint.open(path)
    mapping = MappedFile(path)
    _FILES[path] = _File(set(checkpoint.entries), weakref.finalize(mapping, _remove, path, os.getpid()))
    return {slot: Origin.of_entry(checkpoint, checkpoint.entries[slot.name], mapping) for slot in slots}


def settled(origin: Origin) -> None:
    """Release an origin that a parameter no longer uses; the last one removes the file."""
    file = _FILES.get(origin.entry.path)
    if file is not None:
        file.remaining.discard(origin.entry.key)
        if not file.remaining:
            file.remove()


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, one tensor after another, so that it takes the memory of one."""
    # Those of the widest elements first, so that all of them are aligned; safetensors itself does the same.
    ordered = sorted(tensors.items(), key=lambda it: (-it[1].element_size(), it[0]))
    header = {}
    position = 0
    for name, tensor in ordered:
        stop = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        with os.fdopen(make_claimed(path.parent, _UNFINISHED, partial(_create, unfinished)), "wb") as file:
            file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for _, tensor in ordered:
                _write_bytes(tensor, file)
        unfinished.rename(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"{format_bytes(position)} of weights cannot be written to '{path.parent}': {error.strerror}. "
            "Nothing was changed. Make room there, or give offload_to_disk_path= another folder"
        ) from error


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _write_bytes(tensor: torch.Tensor, file: BinaryIO) -> None:
    """Write a tensor's bytes from where they lie; torch's own way there needs numpy."""
    flat = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8)
    file.write((ctypes.c_char * flat.numel()).from_address(flat.data_ptr()))


def _remove(path: Path, process: int) -> None:
    _FILES.pop(path, None)
    if process != os.getpid():
        return  # a forked child reads along
    with contextlib.suppress(OSError):  # somebody removed it, or a system keeps what is still mapped
        path.unlink()
