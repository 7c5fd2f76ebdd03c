"""Which parameters take their values from a checkpoint, and in which dtype they are wanted.

A parameter that is streamed shows the checkpoint's own tensor between calls: a mapping, which costs no
memory and reads true. What it does not show is the dtype in which a call needs it. That is noted here,
where a technique that casts can change it without any weight being read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import define
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from hookcore.memory.files.checkpoint import Checkpoint
    from hookcore.memory.files.mapped_file import MappedFile
    from hookcore.memory.files.safetensors_header import TensorEntry

_CPU = torch.device("cpu")


@define(eq=False)
class Origin:
    """Where a parameter's values lie on disk.

    Attributes:
        checkpoint: The checkpoint.
        entry: The tensor in it.
        mapping: Its file, mapped.
        raw: The mapped tensor, in the checkpoint's dtype.
        dtype: The dtype that a call is to find, before any technique further inside.
        strides: How it lay in memory, for a model that held it there before; None for one made from the
            checkpoint.
        device: Where that was.
        paused: Whether it is in memory again for a while, only because techniques are being changed.
    """

    checkpoint: Checkpoint
    entry: TensorEntry
    mapping: MappedFile
    raw: torch.Tensor
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None
    device: torch.device = _CPU
    paused: bool = False

    @classmethod
    def of_entry(
        cls, checkpoint: Checkpoint, entry: TensorEntry, mapping: MappedFile, dtype: torch.dtype | None = None
    ) -> Origin:
        """The origin of a parameter that holds this tensor, in the checkpoint's dtype if none is given."""
        with torch.inference_mode(False):  # it outlives the mode
            raw = mapping.tensor(entry)
        return cls(checkpoint, entry, mapping, raw, dtype or entry.dtype)


_ORIGINS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def origin_of(tensor: torch.Tensor, *, paused: bool = False) -> Origin | None:
    """Return where the tensor's values are to be taken from; None for one that is simply in memory.

    Args:
        tensor: The tensor.
        paused: Whether to ask for an origin that is paused, instead of one that is not.
    """
    found: Origin | None = _ORIGINS.get(tensor, None)  # type: ignore[no-untyped-call]
    return found if found is not None and found.paused == paused else None


def paused_origins() -> list[tuple[torch.Tensor, Origin]]:
    """All tensors whose origins are paused, with these."""
    found: list[tuple[torch.Tensor, Origin]] = list(_ORIGINS.items())  # type: ignore[no-untyped-call]
    return [(tensor, origin) for tensor, origin in found if origin.paused]


def wanted_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which calls find a tensor, before any technique further inside."""
    origin = origin_of(tensor)
    return tensor.dtype if origin is None else origin.dtype


def set_origin(tensor: torch.Tensor, origin: Origin | None) -> None:
    """Note where a tensor's values are to be taken from, or, with None, that it is simply in memory."""
    if origin is not None:
        _ORIGINS[tensor] = origin
    elif tensor in _ORIGINS:
        del _ORIGINS[tensor]
