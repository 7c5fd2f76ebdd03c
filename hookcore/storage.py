"""In which dtypes weights will lie while a plan is not applied yet."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from hookcore.target import TensorSlot

_PLANNED: ContextVar[Mapping[int, torch.dtype]] = ContextVar("planned storage dtypes")


@contextmanager
def planned_storage(dtypes: Mapping[int, torch.dtype]) -> Iterator[None]:
    """Count tensors, in the block, in the dtype that they will be stored in.

    Args:
        dtypes: Storage dtypes by the identity of tensors.
    """
    token = _PLANNED.set(dtypes)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def planned_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that a tensor will be stored in if a plan is applied; None if that leaves it as it is."""
    return _PLANNED.get({}).get(id(tensor))


def planned_itemsize(tensor: torch.Tensor) -> int:
    """Bytes that each element of a tensor will take."""
    dtype = planned_dtype(tensor)
    return tensor.element_size() if dtype is None else dtype.itemsize


def planned_nbytes(slots: Iterable[TensorSlot]) -> int:
    """Bytes that parameters and buffers will take together."""
    if not _PLANNED.get({}):
        return sum(slot.nbytes for slot in slots)
    return sum(
        slot.nbytes * planned_itemsize(slot.tensors[0]) // slot.tensors[0].element_size() for slot in slots
    )
