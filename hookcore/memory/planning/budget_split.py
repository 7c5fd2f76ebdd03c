"""What of a device's memory streaming takes, before anything is known of times: a pure function of sizes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import frozen

from hookcore.errors import BudgetError
from hookcore.memory.device.flat_group import ALIGNMENT
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

T = TypeVar("T", bound=Hashable)

_FOR_PIECES = 3  # sizes of the largest group; in so little room, gaps would cost more than allocating does


@frozen
class BudgetShare(Generic[T]):
    """What has to be on the device for the calls of one component, or of several that share weights.

    Attributes:
        what: The component, for messages.
        sizes: Bytes of each group, in the order in which they are expected to be used.
        held: Those that are held while others come and go.
        fixed: Bytes that other things take which stay: buffers, excluded modules.
        prefetch: How many groups may be copied ahead of use where there is no budget to fill.
    """

    what: str
    sizes: Mapping[T, int]
    held: Collection[T]
    fixed: int
    prefetch: int

    @property
    def always(self) -> int:
        """Bytes of what is held."""
        return sum(self.sizes[group] for group in self.held)

    @property
    def coming(self) -> list[int]:
        """Bytes of each group that comes and goes."""
        return [nbytes for group, nbytes in self.sizes.items() if group not in self.held]

    @property
    def least(self) -> int:
        """Bytes of the groups that have to be there at once."""
        return self.always + max(self.coming, default=0)

    @property
    def window(self) -> int:
        """Bytes of the groups that are there if as many are copied ahead as the prefetch allows."""
        coming, count = self.coming, self.prefetch + 1
        return self.always + max((sum(coming[at : at + count]) for at in range(len(coming))), default=0)

    def has_room_for_two(self, ring: int) -> bool:
        """Return whether something can be copied while the largest group is used.

        Otherwise what is copied early would lie beside the activations of others, and gain little.
        """
        coming = self.coming
        return not coming or ring - self.always >= max(coming) + min(coming)

    def comes_in_pieces(self, ring: int) -> bool:
        """Return whether to allocate each group by itself, as gaps between few would cost more."""
        if not self.has_room_for_two(ring):
            return True
        coming = self.coming
        return bool(coming) and ring - self.always < _FOR_PIECES * max(coming) and min(coming) < max(coming)


@frozen
class BudgetSplit(Generic[T]):
    """How memory is divided from the first call on.

    Attributes:
        staying: The groups that stay, in memory of their own.
        ring: Bytes in which all others come and go.
        per_group: Whether memory for these is allocated for each by itself, as there is room for few.
    """

    staying: tuple[T, ...]
    ring: int
    per_group: bool = False


def split_budget(
    shares: Sequence[BudgetShare[T]], *, budget: int | None, device: torch.device
) -> BudgetSplit[T]:
    """Divide memory.

    All groups stay if there is room for all. Else, of one component, those stay that calls hold while others
    come and go, and what is left is the ring. Several components, of which one runs at a time, have the whole
    memory in turn.

    Args:
        shares: What components need.
        budget: Bytes for all of it; None for as little as the prefetch needs.
        device: Where it is; for the message.

    Raises:
        BudgetError: The budget is too small; names the smallest one that works.
    """
    fixed = sum(share.fixed for share in shares)
    largest = max(shares, key=lambda share: share.least)
    least = fixed + largest.least
    if budget is None:
        room = max(share.window for share in shares)
    elif budget < least:
        of = f" for calls of {largest.what!r}" if len(shares) > 1 else ""
        raise BudgetError(
            f"memory_budget is {format_bytes(budget)} ({budget} B), but the weights that have to be on "
            f"{str(device)!r} at once{of} take {format_bytes(least)}. The smallest budget that works is "
            f"{least} bytes"
        )
    else:
        room = budget - fixed
    if sum(sum(share.sizes.values()) for share in shares) <= room:
        return BudgetSplit(tuple(group for share in shares for group in share.sizes), 0)
    staying: tuple[T, ...] = ()
    if len(shares) == 1:
        staying = tuple(largest.held)
        room -= largest.always
    ring = room // ALIGNMENT * ALIGNMENT
    per_group = any(share.comes_in_pieces(ring + (share.always if staying else 0)) for share in shares)
    return BudgetSplit(staying, ring, per_group)
