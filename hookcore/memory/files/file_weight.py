"""Parameters that take their values from a checkpoint: what they show between calls, and what is edited.

Between calls such a parameter shows the checkpoint's own tensor, mapped: it takes no memory and reads true.
What a user gives it instead, in place or as other data, is kept.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from attrs import define

from hookcore.errors import CheckpointError
from hookcore.memory.copies import copy_as, stop_copying_as
from hookcore.memory.files.mapped_file import find_mapping
from hookcore.memory.files.origin import Origin, origin_of, paused_origins, set_origin
from hookcore.memory.files.spill import settled

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from hookcore.memory.files.mapped_file import MappedFile
    from hookcore.target import TensorSlot

_CPU = torch.device("cpu")


@define(eq=False)
class FileWeight:
    """One parameter: a slot, the tensor objects in it, and where their values come from."""

    slot: TensorSlot
    origin: Origin
    homes: list[torch.Tensor]
    """What each object shows between calls: the checkpoint's tensor, or what somebody gave it instead; on
    the CPU, wherever that came from."""
    as_in_calls: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Turns what an object shows into what calls find, for copies."""

    @classmethod
    def compare(cls, slot: TensorSlot, origin: Origin) -> FileWeight:
        """Compare a parameter with the checkpoint, unless it shows the checkpoint's own tensor.

        Raises:
            CheckpointError: It differs.
        """
        raw = origin.raw
        if all(holds(tensor, raw) for tensor in slot.tensors):
            return cls(slot, origin, [raw] * len(slot.tensors))
        tensor = slot.tensors[0]
        found_before = origin_of(tensor, paused=origin.paused) is origin
        values = [it.data.to(_CPU) for it in slot.tensors]
        homes = [raw if _same_bits(raw.to(it.dtype), it) else it for it in values]
        origin.mapping.drop(origin.entry.offset, origin.entry.nbytes)
        if not found_before and any(home is not raw for home in homes):
            raise CheckpointError(
                f"{slot.name!r} in memory differs from {origin.entry.key!r} in '{origin.entry.path}', which "
                "it would be replaced with. Save the model and give the path of what was saved as checkpoint="
            )
        if origin.paused or not found_before:
            origin.dtype, origin.strides, origin.device = tensor.dtype, tensor.stride(), tensor.device
            origin.paused = False
        mapped = [found for it in slot.tensors if (found := find_mapping(it))]
        if mapped and tensor.dtype == raw.dtype:
            origin.strides = None  # it took no memory, and need not when it is given back
        for mapping, offset, nbytes in mapped:
            mapping.drop(offset, nbytes)
        return cls(slot, origin, homes)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The distinct objects that modules hold."""
        return self.slot.tensors

    @property
    def versions(self) -> list[int]:
        """How often torch had counted a change in place of each object."""
        return [tensor._version for tensor in self.tensors]

    @property
    def edited(self) -> bool:
        """Whether an object was given other data than the checkpoint's: that stays in memory."""
        return any(home is not self.origin.raw for home in self.homes)

    @property
    def converts(self) -> bool:
        """Whether calls find another dtype than the checkpoint's."""
        return self.origin.dtype != self.origin.entry.dtype

    def take_over(self) -> None:
        """Show the checkpoint's tensor in the parameter."""
        for tensor in self.tensors:
            set_origin(tensor, self.origin)
        self.as_in_calls = partial(_as_in_calls, origin=self.origin)
        for tensor in self.tensors:
            copy_as(tensor, self.as_in_calls)
        self.show(self.homes)

    def give_back(self, values: Sequence[torch.Tensor]) -> None:
        """Put `values_to_give_back` into the parameter."""
        self.show(values)
        if self.as_in_calls is not None:
            for tensor in self.tensors:
                stop_copying_as(tensor, self.as_in_calls)
        self.origin.paused = self.origin.strides is not None

    def values_to_give_back(self) -> list[torch.Tensor]:
        """Return what each object held before, with the values it has now.

        Raises:
            CheckpointError: Values have to be read, and the file has changed.
        """
        origin = self.origin
        if origin.strides is None:
            return self.homes
        self._verify_to_give_back()
        device = origin.device
        memory = torch.empty_strided(origin.entry.shape, origin.strides, dtype=origin.dtype, device=device)
        memory.copy_(origin.raw)
        self._verify_to_give_back()
        return [
            memory if home is origin.raw else in_dtype_of_calls(home, origin).to(device)
            for home in self.homes
        ]

    def _verify_to_give_back(self) -> None:
        try:
            self.origin.checkpoint.verify_file(self.origin.entry.path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} The values of {self.slot.name!r} are nowhere else, and cannot be given back. "
                "Put the original file back and remove again, or load the model anew"
            ) from error

    def check_readable(self) -> None:
        """Check that the file is not cut short.

        Raises:
            CheckpointError: It is.
        """
        if any(home is self.origin.raw for home in self.homes):
            self.origin.mapping.check_size()

    def show(self, data: Sequence[torch.Tensor]) -> None:
        """Rebind each object to its data."""
        for tensor, value in zip(self.tensors, data, strict=True):
            tensor.data = value

    def adopt(self) -> None:
        """Take data that somebody gave an object since it was last shown its home for its new home."""
        for index, tensor in enumerate(self.tensors):
            if not holds(tensor, self.homes[index]):
                self.homes[index] = tensor.data = tensor.data.to(_CPU)

    def keep_edits(self, data: Sequence[torch.Tensor], versions: list[int], *, compare: bool) -> None:
        """Give what was edited in memory to a home.

        Args:
            data: What each object was shown.
            versions: How often torch had counted a change of each then; brought up to date.
            compare: Whether to look for changes that torch does not count, too.
        """
        for index, (tensor, value) in enumerate(zip(self.tensors, data, strict=True)):
            if not holds(tensor, value):
                self.homes[index] = tensor.data.to(_CPU)  # somebody gave it other data: its value from now on
            elif tensor._version != versions[index] or (
                compare and not _same_bits(value.cpu(), self.homes[index].to(value.dtype))
            ):
                self.keep_edit(index, value)
            versions[index] = tensor._version

    def keep_edit(self, index: int, value: torch.Tensor) -> None:
        """Keep what was changed in place: at its home, if that can hold it."""
        if self.homes[index].dtype == value.dtype:
            self.homes[index].copy_(value)
        else:
            self.homes[index] = value.to(_CPU, copy=True)


@torch.inference_mode(False)  # what is made here outlives the mode
def finalize(slots: Iterable[TensorSlot]) -> None:
    """Leave parameters in memory, or showing the checkpoint's tensor, for good.

    Raises:
        CheckpointError: Values have to be converted, and a file has changed.
    """
    for slot in slots:
        origin = origin_of(slot.tensors[0])
        left = origin_of(slot.tensors[0], paused=True) if origin is None else origin
        if origin is not None and any(is_as_stored(tensor, origin) for tensor in slot.tensors):
            values = {tensor.data_ptr(): tensor.data for tensor in slot.tensors}
            origin.checkpoint.verify_file(origin.entry.path)
            values = {where: in_dtype_of_calls(data, origin) for where, data in values.items()}
            origin.checkpoint.verify_file(origin.entry.path)
            for tensor in slot.tensors:
                tensor.data = values[tensor.data_ptr()]
        for tensor in slot.tensors:
            set_origin(tensor, None)
        if left is not None:
            settled(left)


def forget_paused(mappings: Collection[MappedFile]) -> None:
    """Forget where parameters lay that are on no model any more, since it was changed under a technique."""
    for tensor, origin in paused_origins():
        if origin.mapping in mappings:
            set_origin(tensor, None)
            settled(origin)


def report(weights: Iterable[FileWeight], on_device: str | None = None) -> dict[str, int]:
    """Return where the bytes of parameters lie.

    Args:
        weights: The parameters.
        on_device: Of those that stay on a device, its label.
    """
    weights = list(weights)
    as_in_file = [weight.origin for weight in weights if not weight.edited]
    if on_device is None:
        nbytes = sum(origin.entry.nbytes for origin in as_in_file)
    else:
        nbytes = sum(origin.raw.numel() * origin.dtype.itemsize for origin in as_in_file)
    in_memory = sum(home.nbytes for it in weights for home in it.homes if home is not it.origin.raw)
    return {on_device or "on disk": nbytes} | (
        {"in memory, as they differ from the disk": in_memory} if in_memory else {}
    )


def holds(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    """Return whether a tensor object holds exactly these data."""
    return (
        tensor.data_ptr() == data.data_ptr()
        and tensor.dtype == data.dtype
        and tensor.shape == data.shape
        and tensor.device == data.device  # all that is empty lies nowhere
    )


def is_as_stored(data: torch.Tensor, origin: Origin) -> bool:
    """Return whether it is in the checkpoint's dtype, and that is not the one that calls find."""
    return data.dtype == origin.entry.dtype != origin.dtype


def in_dtype_of_calls(data: torch.Tensor, origin: Origin) -> torch.Tensor:
    """Data in the dtype that calls find; what was given in another than the checkpoint's keeps its own."""
    return data.to(origin.dtype) if is_as_stored(data, origin) else data


def _as_in_calls(data: torch.Tensor, origin: Origin) -> torch.Tensor:
    if holds(data, origin.raw):
        origin.mapping.check_size()
    return in_dtype_of_calls(data, origin)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    flat = (first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
    return torch.equal(*flat)
