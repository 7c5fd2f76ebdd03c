"""The tensors in a group's slots: what they are now, the memory behind them, whether they can be moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookcore.errors import PlanError, UnsupportedModelError
from hookcore.target import has_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from hookcore.target import Component, TensorSlot

_use_count = torch._C._storage_Use_Count


def check_movable(
    component: Component, slots: Iterable[TensorSlot], *, exclude_option: str | None = None
) -> None:
    """Refuse tensors whose data cannot be exchanged by `tensor.data = other`.

    Args:
        component: The component.
        slots: The tensors to move.
        exclude_option: The technique's option that leaves modules out, to name in the error; None if there is
            none.

    Raises:
        PlanError: A tensor has no data yet.
        UnsupportedModelError: It is of a kind that wraps other tensors or has no plain memory.
    """
    remedy = (
        f"Move its module to where it computes, and name it in {exclude_option}="
        if exclude_option
        else "Apply the technique to modules that don't have it"
    )
    for slot in slots:
        for tensor in slot.tensors:
            if has_memory(tensor):
                continue
            where = component.label(slot.name)
            if tensor.is_meta:
                raise PlanError(
                    f"{where!r} is on the meta device and has no data to move. Load the weights first, "
                    "or use a technique that reads them from a checkpoint"
                )
            raise UnsupportedModelError(
                f"{where!r} is a {type(tensor).__name__} with layout {tensor.layout}; only plain, "
                f"strided tensors can be moved. {remedy}"
            )
        if len(slot.tensors) > 1 and len({tensor.dtype for tensor in slot.tensors}) > 1:
            names = " and ".join(repr(component.label(fqn)) for fqn in slot.fqns)
            raise UnsupportedModelError(
                f"{names} share memory but differ in dtype. Give one of them memory of its own with .clone()"
            )


def current_tensors(slot: TensorSlot) -> list[torch.Tensor]:
    """The distinct tensors that are now where a slot's tensors were registered."""
    found = [tensor for owner in slot.owners if (tensor := tensor_at(*owner)) is not None]
    return found if len(found) < 2 else list({id(tensor): tensor for tensor in found}.values())


def tensors_left(slot: TensorSlot, device: torch.device) -> list[torch.Tensor]:
    """A slot's tensors as they are now, and those that were replaced and still lie on a device."""
    tensors = current_tensors(slot)
    now = set(map(id, tensors))
    return tensors + [it for it in slot.tensors if id(it) not in now and is_on(it, device)]


def tensor_at(module: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer of this name, if there is one."""
    # Through dict, so that it doesn't count as a read.
    found: torch.Tensor | None = dict.get(module._parameters, name)
    return dict.get(module._buffers, name) if found is None else found


def by_memory(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Split a slot's tensors by storage: something may have untied them since the slot was found."""
    if len(tensors) < 2:
        return [tensors] if tensors else []
    sharing: dict[object, list[torch.Tensor]] = {}
    for tensor in tensors:
        sharing.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor)
    return sharing.values()


def copy_memory(
    tensors: list[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Copy the memory that tensors on one storage span, once.

    Returns:
        That memory, flat; its copy; and a view of the copy for each tensor, lying in it as the tensor does.
    """
    # Copies are inference tensors exactly where the originals are: `.data =` would change that too.
    with torch.inference_mode(tensors[0].is_inference()):
        data = [tensor.data for tensor in tensors]
        if len(data) == 1 and data[0].is_contiguous():  # nearly all are; saves three views
            copy = data[0].to(device, copy=True)
            return data[0], copy, [copy]
        start = min(it.storage_offset() for it in data)
        stop = max(it.storage_offset() + extent(it) for it in data)
        original = data[0].as_strided((stop - start,), (1,), start)
        copy = original.to(device, copy=True)
        views = [copy.as_strided(it.shape, it.stride(), it.storage_offset() - start) for it in data]
    return original, copy, views


def extent(tensor: torch.Tensor) -> int:
    """Elements of its storage from the tensor's first to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def moved_as_made(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, made in inference mode exactly if the tensor was: whatever the mode is now."""
    with torch.inference_mode(tensor.is_inference()):
        return tensor.to(device)


def is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Return whether it is there; a device without an index stands for any of its type."""
    there = tensor.device
    return there == device or (device.index is None and there.type == device.type)


def version_of(tensor: torch.Tensor) -> int | None:
    """Return how often torch counted a change in place; it counts none of inference tensors."""
    return None if tensor.is_inference() else tensor._version


def move_apart(homes: Mapping[TensorSlot, torch.device]) -> None:
    """Give each slot memory of its own on a device; all of them or, if it raises, none."""
    move_to_copies((current_tensors(slot), device) for slot, device in homes.items())


def move_to_copies(devices: Iterable[tuple[list[torch.Tensor], torch.device]]) -> None:
    """Rebind the tensors of slots to copies on a device; all of them or, if it raises, none."""
    moved: list[tuple[torch.Tensor, torch.Tensor]] = []
    for of_slot, device in devices:
        for tensors in by_memory(of_slot):
            moved += zip(tensors, copy_memory(tensors, device)[2], strict=True)
    for tensor, data in moved:
        tensor.data = data


def memory_seen_elsewhere(slots: Iterable[TensorSlot]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors whose storage is used by others than the slot's own tensors, with their data.

    Such memory lives on when these tensors leave it, and whoever else looks at it is tied to them.
    """
    return [
        (tensor, tensor.data)
        for slot in slots
        for tensors in by_memory(current_tensors(slot))
        if _use_count(tensors[0].untyped_storage()._cdata) > len(tensors) + 1  # and the object just made
        for tensor in tensors
    ]


def go_back(left: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Rebind tensors to the data that they left, with the values that they have now."""
    for tensor, data in left:
        if (tensor.shape, tensor.dtype, tensor.device) == (data.shape, data.dtype, data.device):
            data.copy_(tensor.data)
            tensor.data = data
