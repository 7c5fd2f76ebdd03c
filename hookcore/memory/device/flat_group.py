"""A group's weights, side by side in one stretch of host memory, and shown now here and now there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from hookcore.memory.tensor_memory import by_memory, current_tensors, extent, moved_as_made, tensor_at
from hookcore.storage import planned_itemsize

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from hookcore.target import TensorSlot

_CPU = torch.device("cpu")
ALIGNMENT = 64
"""Bytes. Where a weight begins, on the host and on the device; kernels read aligned memory in wider steps."""


@frozen(eq=False)
class _Part:
    """A tensor's place in packed memory.

    Attributes:
        tensor: The object that modules hold.
        dtype: What it was packed in; somebody may give it data of another one, as `module.to(dtype)` does.
        shape: Likewise.
        stride: Likewise.
        start: Where its memory begins, in bytes.
        span: Bytes from there that it and what it shares memory with take.
        offset: Of its first element from there, in elements.
    """

    tensor: torch.Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    start: int
    span: int
    offset: int

    def view(self, flat: torch.Tensor, begin: int) -> torch.Tensor:
        """What the tensor was when it was packed, in flat memory of its dtype that begins at this element."""
        return flat.as_strided(
            self.shape, self.stride, begin + self.start // self.dtype.itemsize + self.offset
        )


def _lay_out(slots: Iterable[TensorSlot]) -> tuple[list[_Part], int]:
    parts = []
    position = 0
    for slot in slots:
        for tied in by_memory(current_tensors(slot)):
            first = min(int(it.storage_offset()) for it in tied)
            itemsize = tied[0].element_size()
            span = itemsize * max(int(it.storage_offset()) + extent(it) - first for it in tied)
            parts += [
                _Part(it, it.dtype, it.shape, it.stride(), position, span, int(it.storage_offset()) - first)
                for it in tied
            ]
            position += rounded(max(span, 1))  # also what is empty has a place
    return parts, position


def flat_nbytes(slots: Iterable[TensorSlot]) -> int:
    """Bytes that they will take side by side, in the dtypes that a plan will store them in."""
    total = 0
    for slot in slots:
        for tied in by_memory(current_tensors(slot)):
            first = min(int(it.storage_offset()) for it in tied)
            length = max(int(it.storage_offset()) + extent(it) - first for it in tied)
            total += rounded(max(length * planned_itemsize(tied[0]), 1))
    return total


def rounded(nbytes: int) -> int:
    """Bytes up to where the next weight can begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class FlatGroup:
    """The tensors of a group, which lie in one stretch of host memory and can be shown elsewhere.

    Args:
        slots: The group's slots. Nothing is changed before `take`.
        name: The group's name, for people.

    Attributes:
        name: As given.
        tensors: The distinct objects that modules hold.
        buffers: Of these, the buffers, with the modules that hold them and their names there.
        nbytes: Bytes in all.
        host: The memory, uint8, `(nbytes,)`, from `take` on, until `let_go`.
        is_locked: Whether a device can copy from it by itself.
        copied: An event after the last copy of it; None before the first.
        read_seconds: How long it takes until its bytes can be copied, if they have to be read first.
        homes: What each tensor is in host memory.
        addresses: Of these.
    """

    __slots__ = (
        "_dtypes",
        "_parts",
        "_versions",
        "addresses",
        "buffers",
        "copied",
        "homes",
        "host",
        "is_locked",
        "name",
        "nbytes",
        "read_seconds",
        "tensors",
    )

    def __init__(self, slots: Iterable[TensorSlot], name: str = "") -> None:
        self.name = name
        slots = list(slots)
        self._parts, self.nbytes = _lay_out(slots)
        self.buffers = [
            (module, name, tensor)
            for slot in slots
            if slot.is_buffer
            for module, name in slot.owners
            if (tensor := tensor_at(module, name)) is not None
        ]
        self._dtypes = {part.dtype for part in self._parts}
        self.tensors = [part.tensor for part in self._parts]
        self.host = torch.empty(0, dtype=torch.uint8)
        self.is_locked = False
        self.copied: Any = None
        self.read_seconds = 0.0
        self.homes: list[torch.Tensor] = []
        self.addresses: list[int] = []
        self._versions: list[int] = []

    @torch.inference_mode(False)  # what is made here outlives the mode
    def take(self, host: torch.Tensor) -> None:
        """Copy the tensors to this memory, from wherever they are, and rebind them to it."""
        filled: set[int] = set()
        for part in self._parts:
            if part.start not in filled:
                filled.add(part.start)
                flat = part.tensor.data.as_strided(
                    (part.span // part.tensor.element_size(),),
                    (1,),
                    part.tensor.storage_offset() - part.offset,
                )
                host[part.start : part.start + part.span].view(part.tensor.dtype).copy_(flat)
        self.host = host
        self.homes = self.views(host)
        self.addresses = [home.data_ptr() for home in self.homes]
        self.show_host()
        self.note_versions()

    def let_go(self) -> torch.Tensor:
        """Give the host memory away; the tensors must be shown elsewhere."""
        host, self.host = self.host, torch.empty(0, dtype=torch.uint8)
        self.homes, self.addresses = [], []
        return host

    @torch.inference_mode(False)
    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return what each tensor is in such memory."""
        flat = {dtype: memory.view(dtype) for dtype in self._dtypes}
        begins = {dtype: int(it.storage_offset()) for dtype, it in flat.items()}
        return [part.view(flat[part.dtype], begins[part.dtype]) for part in self._parts]

    def show(self, views: Sequence[torch.Tensor]) -> None:
        """Rebind the tensors to what `views` gave."""
        for tensor, view in zip(self.tensors, views):  # noqa: B905 -- of one length; this is the hot path
            tensor.data = view

    def show_host(self) -> None:
        """Rebind the tensors to host memory."""
        for tensor, home in zip(self.tensors, self.homes):  # noqa: B905
            tensor.data = home

    def is_untouched(self, addresses: Sequence[int]) -> bool:
        """Return whether all tensors hold the data at these addresses, and none is changed or replaced."""
        for tensor, address, version in zip(self.tensors, addresses, self._versions):  # noqa: B905
            if tensor.data_ptr() != address or tensor._version != version:
                return False
        return not self.buffers or not self.given_buffers

    @property
    def is_home(self) -> bool:
        """Whether all tensors hold the host memory, and none was given other data or replaced."""
        return not self.homes or not (self.replaced(self.addresses) or self.given_buffers)

    @property
    def is_outdated(self) -> bool:
        """Whether it would be laid out otherwise if it were made now."""
        return False

    def note_versions(self) -> None:
        """Take down how often torch has counted a change of each tensor."""
        self._versions = [tensor._version for tensor in self.tensors]

    @property
    def is_changed(self) -> bool:
        """Whether torch has counted a change in place since then."""
        return [tensor._version for tensor in self.tensors] != self._versions

    def replaced(self, addresses: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The tensors that were given other data than what lies at these addresses, with that data."""
        return [
            (tensor, tensor.data)
            for tensor, address in zip(self.tensors, addresses, strict=True)
            if tensor.data_ptr() != address
        ]

    @property
    def given_buffers(self) -> list[tuple[nn.Module, str, torch.Tensor]]:
        """The buffers that modules were given in the place of its own: module, name, buffer."""
        return [
            (module, name, given)
            for module, name, tensor in self.buffers
            if (given := dict.get(module._buffers, name)) is not None and given is not tensor
        ]

    @torch.inference_mode(False)  # versions of what is made in the mode cannot be told
    def move_given_buffers(self, device: torch.device) -> bool:
        """Move these to a device; return whether there is one.

        A call may have returned what it gave, which stays where it is: the module gets a copy.
        """
        given = self.given_buffers
        for module, name, tensor in given:
            module._buffers[name] = tensor.to(device, copy=tensor.is_inference())
        return bool(given)

    def come_home(self, views: Sequence[torch.Tensor], addresses: Sequence[int]) -> None:
        """Rebind the tensors to host memory, with all changes; wait for these to be copied.

        What an exception interrupts can be done again.

        Args:
            views: What they were shown; some may still hold host memory, or again.
            addresses: Of these.
        """
        changed = self.is_changed
        for at, (tensor, view, address) in enumerate(zip(self.tensors, views, addresses, strict=True)):
            if tensor.data_ptr() == address:
                tensor.data = self._kept(at, view) if changed else self.homes[at]
            elif tensor.device != _CPU:  # it was given other data, as `weight.data = ...` does
                tensor.data = moved_as_made(tensor.data, _CPU)
        self.move_given_buffers(_CPU)

    def _kept(self, at: int, view: torch.Tensor) -> torch.Tensor:
        """Keep what a tensor was changed to; return what it holds in host memory from now on."""
        return self.homes[at].copy_(view)

    def bring_given(self, device: torch.device) -> None:
        """Move to a device, where all tensors were, those that were given since."""
        for tensor in self.tensors:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        self.move_given_buffers(device)
