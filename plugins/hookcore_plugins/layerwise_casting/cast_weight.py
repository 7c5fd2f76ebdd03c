"""One weight that lies in one dtype and is computed with in another."""

from __future__ import annotations

import weakref
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookcore.memory import (
    convert_reads,
    copy_as,
    find_mapping,
    origin_of,
    read_as,
    stop_converting_reads,
    stop_copying_as,
    wanted_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

_CAST_WEIGHTS: weakref.WeakValueDictionary[int, CastWeight] = weakref.WeakValueDictionary()
"""What holds a tensor, by the tensor's identity."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CastWeight:
    """Parameters that share memory, or one that shares with none, cast as one.

    Every user gets the value rounded to the storage dtype, wherever the weight lies: one that is streamed
    from a checkpoint is asked for in that dtype, and one on the meta device is rounded at its use. A
    parameter stays the same object all the time; only its `.data` is rebound. What is stored is read at
    the first use of each call, put back after the last, and never written: whoever moves or edits the
    parameter between calls is heard.

    Args:
        tensors: The parameters; of one dtype.
        owners: The modules that hold them, each with the attribute's name.
        storage_dtype: What they lie in between calls.
        compute_dtype: What they are in during calls.
        non_blocking: Whether casts for calls may be asynchronous.
        keep_originals: Whether to keep what they were before.
        entries: Names of methods through which the model is called, besides calling it.

    Attributes:
        thread: The thread in whose call they are in the compute dtype; None between calls.
        uses: How many calls use them at this moment.
    """

    __slots__ = (
        "__weakref__",
        "_entries",
        "_holders",
        "_in_calls",
        "_keeps",
        "_kept",
        "_non_blocking",
        "_original_dtype",
        "_owners",
        "_stored",
        "compute_dtype",
        "storage_dtype",
        "tensors",
        "thread",
        "uses",
    )

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        *,
        storage_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        non_blocking: bool,
        keep_originals: bool,
        owners: tuple[tuple[nn.Module, str], ...] = (),
        entries: Iterable[str] = (),
    ) -> None:
        self.tensors = tensors
        self._owners = owners
        self._entries = entries
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self._non_blocking = non_blocking
        self._keeps = keep_originals
        self._in_calls = partial(_in_calls, storage_dtype=storage_dtype, compute_dtype=compute_dtype)
        self._original_dtype = wanted_dtype(tensors[0])
        self._kept: list[Tensor] | None = None
        self._stored: list[Tensor] = []  # another list whenever a call begins or ends
        self._holders = 0
        self.uses = 0
        self.thread: int | None = None

    # A call

    def use(self) -> None:
        """Make the parameters compute-dtype copies, unless an outer call already did."""
        if self.uses and self.tensors[0].dtype is self.storage_dtype:
            self.uses = 0  # a call was interrupted, and what moves the weights has put them back
        if not self.uses:
            stored = [tensor.data for tensor in self.tensors]
            computed = self._computed(stored)
            try:
                self._stored = stored
                self._put(computed)
                self.thread = get_ident()
            except BaseException:
                self._put(stored)
                self.thread, self._stored = None, []
                raise
        self.uses += 1

    def release(self) -> None:
        """Drop the copies when the outermost call returns."""
        self.uses -= 1
        if not self.uses:
            self.thread = None
            try:
                self._put(self._stored)
            except BaseException:
                self._put(self._stored)
                self._stored = []
                raise
            self._stored = []

    @torch.no_grad()
    def store_edits(self) -> None:
        """Store what a call has made of the copies, rounded."""
        for tensor, stored in zip(self.tensors, self._stored, strict=True):
            stored.copy_(tensor.data)

    def rest(self) -> None:
        """End calls that were interrupted before a hook could do so, while none is under way."""
        if self.uses:
            self._put(self._stored)
            self.thread, self._stored, self.uses = None, [], 0

    def _put(self, data: Sequence[Tensor]) -> None:
        if len(data) == 1:  # nearly all are alone, and a loop takes as long as what it is for
            self.tensors[0].data = data[0]
        else:
            for tensor, new in zip(self.tensors, data, strict=True):
                tensor.data = new

    def _computed(self, stored: list[Tensor]) -> Sequence[Tensor]:
        non_blocking = self._non_blocking
        if len(stored) == 1:
            data = stored[0]
            if data.dtype is not self.storage_dtype:
                data = data.to(self.storage_dtype, non_blocking)
            return (data.to(self.compute_dtype, non_blocking),)
        rounded = converted(stored, self.storage_dtype, non_blocking=non_blocking)
        return converted(rounded, self.compute_dtype, non_blocking=non_blocking)

    # Reads by others than the layer whose call it is

    def stored(self, tensor: Tensor) -> Tensor:
        """The tensor, or while a call has it cast another one that holds what is stored."""
        if not self._stored or not self._holds(tensor):
            return tensor
        return torch.nn.Parameter(self._at_rest(tensor), tensor.requires_grad)

    def computed(self, tensor: Tensor) -> Tensor:
        """A new tensor that holds what the layer's own call finds."""
        if not self._holds(tensor):
            return tensor
        return read_as(tensor, self._in_calls(self._at_rest(tensor)))

    def saved(self, tensor: Tensor) -> Tensor:
        """Return what is stored: the values are true, in fewer bytes."""
        return self.stored(tensor)

    def loaded(self, tensor: Tensor, value: Tensor) -> Tensor:
        """The value, which torch itself converts."""
        return value

    def _holds(self, tensor: Tensor) -> bool:
        return any(tensor is own for own in self.tensors)  # or someone has put it in the place of ours

    def _at_rest(self, tensor: Tensor) -> Tensor:
        """What a parameter of ours holds between calls, whatever another thread's call does meanwhile."""
        while True:
            stored = self._stored
            data = tensor.data
            for own, at_rest in zip(self.tensors, stored, strict=False):
                if own is tensor:
                    data = at_rest
            if stored is self._stored:
                return data

    # Attaching and detaching: first everything that can fail, then the change.

    @torch.inference_mode(False)  # what is made here outlives the mode
    def to_store(self) -> list[Tensor] | None:
        """Convert for `hold`; None if there is nothing to convert."""
        data = [tensor.data for tensor in self.tensors]
        if self._holders or self._streamed or any(tensor.is_meta for tensor in data):
            return None
        if self._original_dtype is not self.storage_dtype:
            if all(find_mapping(tensor) for tensor in data):
                self._kept = data  # still in a file, where it takes no memory
            elif self._keeps:
                self._kept = converted(data, self._original_dtype, device=torch.device("cpu"))
        return converted(data, self.storage_dtype)

    def hold(self, stored: list[Tensor] | None) -> None:
        """Store what `to_store` gave, for one more hook; or nothing, if it is interrupted."""
        before = [tensor.data for tensor in self.tensors]
        try:
            if not self._holders:
                self._begin(self.storage_dtype)
            if stored is not None:
                self._put(stored)
            self._holders += 1
        except BaseException:
            if not self._holders:
                self._end(self._original_dtype)
            self._put(before)
            raise

    def _begin(self, dtype: torch.dtype) -> None:
        self._stream_in(dtype)
        for tensor in self.tensors:
            stop_copying_as(tensor, self._in_calls)  # so that it can be begun again
            copy_as(tensor, self._in_calls)
            _CAST_WEIGHTS[id(tensor)] = self
        convert_reads(self._owners, self, self._entries)

    def _end(self, dtype: torch.dtype) -> None:
        self._stream_in(dtype)
        stop_converting_reads(self._owners, self)
        for tensor in self.tensors:
            stop_copying_as(tensor, self._in_calls)
            _CAST_WEIGHTS.pop(id(tensor), None)

    @torch.inference_mode(False)
    def to_restore(self) -> list[Tensor] | None:
        """Convert back for `let_go`; None if the parameters are to stay as they are."""
        data = [tensor.data for tensor in self.tensors]
        if self._holders > 1 or self._streamed or not self._rounded(data):
            return None
        if self._kept is not None and _same_bits(converted(self._kept, self.storage_dtype), data):
            # Nobody changed the weights meanwhile, so what they were rounded from holds.
            return converted(self._kept, self._original_dtype, device=data[0].device)
        return converted(data, self._original_dtype)

    def let_go(self, restored: list[Tensor] | None) -> None:
        """Restore what `to_restore` gave, for one hook less; or nothing, if it is interrupted."""
        before = [tensor.data for tensor in self.tensors]
        try:
            if restored is not None:
                self._put(restored)
            if self._holders == 1:
                self._end(self._original_dtype)
            self._holders -= 1
        except BaseException:
            self._put(before)
            self._begin(self.storage_dtype)
            raise

    def forget(self) -> None:
        """Drop the originals."""
        self._kept = None

    # Telling

    @property
    def loses(self) -> bool:
        """Whether detaching could give back rounded weights only."""
        rounded = self._rounded([tensor.data for tensor in self.tensors])
        return rounded and self._kept is None and not self._streamed

    def stored_bytes(self) -> tuple[torch.dtype, int]:
        """The dtype that the weight lies in, and how many bytes of memory it takes."""
        data = self._stored or [tensor.data for tensor in self.tensors]
        if any(tensor.is_meta for tensor in data):
            return data[0].dtype, 0
        start, stop = _span(data)
        return data[0].dtype, (stop - start) * data[0].itemsize

    @property
    def _streamed(self) -> bool:
        """Whether another technique brings the weight from a checkpoint for each call."""
        return origin_of(self.tensors[0]) is not None

    def _stream_in(self, dtype: torch.dtype) -> None:
        """Ask for a weight that is streamed to come in a dtype."""
        for tensor in self.tensors:
            origin = origin_of(tensor)
            if origin is not None:
                origin.dtype = dtype

    def _rounded(self, data: Sequence[Tensor]) -> bool:
        """Return whether the weights are in the storage dtype now, and had not been before."""
        return self._original_dtype is not self.storage_dtype and all(
            tensor.dtype is self.storage_dtype for tensor in data
        )


def converted(
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    non_blocking: bool = False,
) -> list[Tensor]:
    """Convert tensors together: strides stay, and those that share memory still do.

    Tensors that already fit are returned as they are.
    """
    if len(tensors) == 1:
        result = tensors[0].to(device, dtype, non_blocking)
        if result.stride() == tensors[0].stride():
            return [result]
    elif not _overlap(tensors):  # any more: moving to a device separates tensors that shared memory
        return [converted([it], dtype, device=device, non_blocking=non_blocking)[0] for it in tensors]
    start, stop = _span(tensors)
    flat = tensors[0].as_strided((stop - start,), (1,), start).to(device, dtype, non_blocking)
    return [
        flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - start) for tensor in tensors
    ]


def _overlap(tensors: Sequence[Tensor]) -> bool:
    if len({(tensor.untyped_storage().data_ptr(), tensor.dtype) for tensor in tensors}) > 1:
        return False
    start, stop = _span(tensors)
    return stop - start <= sum(end - begin for begin, end in map(_reach, tensors))


def _span(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """First element and element after the last that any of them uses of their storage."""
    begins, ends = zip(*map(_reach, tensors), strict=True)
    return min(begins), max(ends)


def _reach(tensor: Tensor) -> tuple[int, int]:
    """First element and element after the last that a tensor uses of its storage."""
    begin = int(tensor.storage_offset())
    if not tensor.numel():
        return begin, begin
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + int(sum(steps)) + 1


def _same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether values of one dtype are the same to the bit, NaNs included."""
    return all(
        torch.equal(one.view(_BITS[one.itemsize]).cpu(), other.view(_BITS[other.itemsize]).cpu())
        for one, other in zip(first, second, strict=True)
    )


def is_cast(tensor: Tensor) -> bool:
    """Return whether some `CastWeight` holds the tensor."""
    return id(tensor) in _CAST_WEIGHTS


def _in_calls(data: Tensor, *, storage_dtype: torch.dtype, compute_dtype: torch.dtype) -> Tensor:
    """Return what calls find where a parameter holds some data: rounded, whether these are stored or not."""
    return converted(converted([data], storage_dtype), compute_dtype)[0]
