"""A group whose weights lie in files: what there is to bring, and what was brought."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field

from hookcore.memory.files.direct_reader import aligned_span
from hookcore.memory.files.file_range import FileRange, are_aligned, cost, merged
from hookcore.memory.files.file_weight import FileWeight, holds

if TYPE_CHECKING:
    import torch

    from hookcore.memory.files.page_arena import PageRange
    from hookcore.memory.files.reader_threads import Task


class FileGroup:
    """What there is to bring for a group: its weights, their places in files, the memory that takes.

    Args:
        weights: The weights.

    Attributes:
        weights: As given.
        ranges: Where in files they lie.
        aligned: Whether these may be read into a buffer.
        read_bytes: Bytes of memory to read them into.
        converted_bytes: Bytes of memory for what calls find in another dtype.
    """

    def __init__(self, weights: list[FileWeight]) -> None:
        self.weights = weights
        origins = [weight.origin for weight in weights if not weight.edited]
        self.ranges = merged(origins)
        self.aligned = are_aligned(origins)
        self.read_bytes = sum(aligned_span(it.start, it.stop) for it in self.ranges)
        self.converted_bytes = cost(origins) - self.read_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of memory in all."""
        return self.read_bytes + self.converted_bytes


@define(eq=False)
class Transfer:
    """A group on its way into memory, or there."""

    ranges: tuple[FileRange, ...]
    aligned: bool
    """Whether they may be read into a buffer."""
    nbytes: int
    """Bytes of memory that it takes."""
    during_call: int
    """In which call of the component it was begun."""
    read: PageRange | None
    """Memory to read it into; nothing lies there if it is used where it is mapped."""
    converted: PageRange | None
    """Memory for what is converted."""
    positions: list[int] = field(factory=list)
    """Where each range begins in `read`; none if it is mapped."""
    converted_used: int = 0
    shown: list[tuple[FileWeight, list[torch.Tensor], list[int]]] = field(factory=list)
    """What the parameters of which weight hold now, and how often torch had counted a change of each."""
    done: Task[None] = field(init=False)

    def wait(self) -> None:
        """Wait until it is in memory; raise what reading it raised."""
        self.done.result()

    @property
    def page_ranges(self) -> list[PageRange]:
        """The memory that it has."""
        return [pages for pages in (self.read, self.converted) if pages is not None]

    @property
    def is_replaced(self) -> bool:
        """Whether somebody gave a parameter other data than it was shown."""
        return any(
            not holds(tensor, value)
            for weight, data, _ in self.shown
            for tensor, value in zip(weight.tensors, data, strict=True)
        )

    def unbind(self) -> None:
        """Show host memory in parameters again. A method, as its names would keep buffers in use."""
        self.keep_edits(compare=False)
        for weight, _, _ in self.shown:
            weight.show(weight.homes)
        self.shown.clear()

    def keep_edits(self, *, compare: bool) -> None:
        """Give what was edited in memory to a home.

        Args:
            compare: Whether to look for changes that torch does not count, too.
        """
        for weight, data, versions in self.shown:
            weight.keep_edits(data, versions, compare=compare)


def place_of(weight: FileWeight, transfer: Transfer) -> torch.Tensor:
    """The tensor that holds a weight's bytes: in a buffer it was read into, or in the mapping."""
    origin = weight.origin
    start, nbytes = origin.entry.offset, origin.entry.nbytes
    for it, position in zip(
        transfer.ranges, transfer.positions, strict=False
    ):  # no positions if it is mapped
        if transfer.read is not None and it.mapping is origin.mapping and it.start <= start < it.stop:
            begin = position + start - it.start
            return (
                transfer.read.tensor[begin : begin + nbytes].view(origin.entry.dtype).view(origin.entry.shape)
            )
    return origin.raw
