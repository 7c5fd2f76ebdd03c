"""How much memory a device has left, and whether that is enough for a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hookcore.errors import BudgetError
from hookcore.memory.tensor_memory import is_on
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hookcore.target import Component


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes of a device that tensors of this process could take besides; None where torch cannot tell.

    That is what its driver has free, and what torch has cached and no tensor takes.
    """
    if device.type in ("cpu", "meta"):
        return None
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    if not hasattr(module, "memory_reserved"):
        return int(free)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def check_free_memory(needs: Mapping[str, int], components: Iterable[Component]) -> None:
    """Refuse what a device has no memory for, before anything is moved.

    Args:
        needs: Bytes of each device that weights will take at once.
        components: Whose weights these are. What lies on the device already moves, or counts among them.

    Raises:
        BudgetError: A device has less; names both numbers.
    """
    slots = [slot for component in components for slot in component.slots]
    for name, needed in needs.items():
        device = torch.device(name)
        free = free_device_bytes(device)
        if free is None or needed <= free:
            continue
        there = sum(slot.nbytes for slot in slots if is_on(slot.tensors[0], device))
        if needed > free + there:
            here = f" and {format_bytes(there)} of these weights" if there else ""
            raise BudgetError(
                f"the weights need {format_bytes(needed)} ({needed} B) of {name!r} at once, which has "
                f"{format_bytes(free)} free{here} ({free + there} B). Nothing was changed. Free memory "
                "there, leave fewer modules there, or give a smaller memory_budget"
            )
