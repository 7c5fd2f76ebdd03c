"""What of a device's memory streaming takes, before anything is known of times: a pure function of sizes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import frozen

from hookcore.errors import BudgetError
from hookcore.memory.packed import ALIGNMENT
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch

T = TypeVar("T", bound=Hashable)

_FOR_PIECES = 2  # sizes of the largest group; in so little room, gaps would cost more than allocating does


@frozen
class Allotment(Generic[T]):
    """How memory is divided from the first call on.

    Attributes:
        staying: The groups that stay, in memory of their own.
        ring: Bytes in which all others come and go.
        in_pieces: Whether memory for these is allocated for each by itself, as there is room for hardly two.
        one_by_one: Whether there is room only for one that is large; what is copied early would lie beside
            the activations of others, and gain little.
    """

    staying: tuple[T, ...]
    ring: int
    in_pieces: bool = False
    one_by_one: bool = False


def allot(
    sizes: Mapping[T, int],
    held: Collection[T],
    *,
    fixed: int,
    budget: int | None,
    prefetch: int,
    device: torch.device,
) -> Allotment[T]:
    """Divides memory.

    All groups stay if there is room for all. Else those stay that calls hold while others come and go, and
    what is left is the ring.

    Args:
        sizes: Bytes of each group, in the order in which they are expected to be used.
        held: Those that are held while others come and go.
        fixed: Bytes that other things take which stay: buffers, excluded modules.
        budget: Bytes for all of it; None for as little as the prefetch needs.
        prefetch: How many groups may be copied ahead of use where there is no budget to fill.
        device: Where it is; for the message.

    Raises:
        BudgetError: The budget is too small; names the smallest one that works.
    """
    always = sum(sizes[group] for group in held)
    coming = [nbytes for group, nbytes in sizes.items() if group not in held]
    least = fixed + always + max(coming, default=0)
    if budget is None:
        count = prefetch + 1
        windows = (sum(coming[at : at + count]) for at in range(len(coming)))
        room = always + max(windows, default=0)
    elif budget < least:
        raise BudgetError(
            f"memory_budget is {format_bytes(budget)} ({budget} B), but the weights that have to be on "
            f"{str(device)!r} at once take {format_bytes(least)}. The smallest budget that works is "
            f"{least} bytes"
        )
    else:
        room = budget - fixed
    if sum(sizes.values()) <= room:
        return Allotment(tuple(sizes), 0)
    ring = (room - always) // ALIGNMENT * ALIGNMENT
    in_pieces, one_by_one = ring < _FOR_PIECES * max(coming), ring < max(coming) + min(coming)
    return Allotment(tuple(held), ring, in_pieces, one_by_one)
