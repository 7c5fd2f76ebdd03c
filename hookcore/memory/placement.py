"""Which group is in memory when, and how a group is brought and dropped.

The two are apart: `Placement` counts who needs which group and tells a `GroupMover` to bring or drop it;
`DeviceMover` does that by copies between two devices. Another mover may read from disk.

A group is brought when the first call that holds it begins. After the last of these calls it lingers until
another group is needed or the outermost call ends. Blocks that share a group thus bring it once, and at
most one group is there that no running call holds.

A tensor that is read outside of the calls that hold its group (by a parent's forward, say) has its group
brought at that moment, until the innermost running call ends.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from attrs import define
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from hookcore.errors import PlanError, UnsupportedModelError
from hookcore.hook import Hook
from hookcore.memory.grouping import Group, entries_of
from hookcore.memory.reads import WatchedTensors
from hookcore.target import has_memory
from hookcore.technique import Binding, Claim, Resource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hookcore.target import Component, TensorSlot


class GroupMover(Protocol):
    """Brings and drops groups. Each method does all of it or, if it raises, nothing."""

    def attach(self, group: Group, *, resident: bool) -> None:
        """Puts a group where it lies between calls: for good on the onload device if it is resident."""

    def detach(self, group: Group) -> None:
        """Puts a group back where `attach` found it, with the values that it has now."""

    def onload(self, group: Group) -> None:
        """Brings a group, so that its modules can be called."""

    def offload(self, group: Group) -> None:
        """Drops what was brought; what a call changed in it is kept."""

    def report(self, group: Group, *, resident: bool) -> Mapping[str, int]:
        """Where the group's bytes lie between calls: a label for people to a number of bytes."""

    def begin(self) -> None:
        """Is told that an outermost call begins."""
        return

    def end(self) -> None:
        """Is told that an outermost call has ended, and that nothing is held any more."""
        return

    def settle(self, group: Group) -> None:
        """Is told that the group was detached for good."""
        return

    def reset(self) -> None:
        """Forgets what it learned from earlier calls."""
        return


class Placement:
    """Brings each group of a component for the calls that hold it.

    Args:
        component: What is placed.
        groups: The groups that come and go.
        resident: The groups that stay on the onload device.
        mover: Brings and drops them.
        onload_device: Where the inputs of the outermost call are moved to.
    """

    def __init__(
        self,
        component: Component,
        groups: Sequence[Group],
        resident: Sequence[Group],
        mover: GroupMover,
        onload_device: torch.device,
    ) -> None:
        self._component = component
        self._groups = tuple(groups)
        self._resident = tuple(resident)
        self._mover = mover
        self._onload_device = onload_device
        self._calls: list[list[Group]] = []  # what each running call holds, the innermost last
        self._uses: dict[Group, int] = {}  # how often each group that is in memory is held
        self._lingering: Group | None = None  # in memory though nobody holds it

    def bindings(self) -> Iterator[Binding]:
        """Lists the hooks: at the component's entries, and at each call that holds a group."""
        held: dict[tuple[str, str], list[Group]] = {("", entry): [] for entry in entries_of(self._component)}
        claimed: dict[tuple[str, str], list[Group]] = {}
        for group in self._groups:
            for holder in group.holders:
                held.setdefault(holder, []).append(group)
            claimed.setdefault(group.holders[0], []).append(group)
        first = next(iter(held))
        claimed.setdefault(first, []).extend(self._resident)
        for (fqn, entry), groups in held.items():
            hook_class = _PlacementHook if (fqn, entry) == first else _HoldHook
            claims = [
                Claim(Resource.PLACEMENT, slot.name)
                for group in claimed.get((fqn, entry), ())
                for slot in group.slots
            ]
            yield Binding(fqn, hook_class(self, tuple(groups)), entry, claims)

    def attach(self) -> None:
        """Puts all groups where they lie between calls, and begins to watch reads."""
        done: list[Group] = []
        try:
            for group in self._all_groups():
                self._mover.attach(group, resident=group in self._resident)
                done.append(group)
        except BaseException:
            for group in reversed(done):
                self._mover.detach(group)
            raise
        self._watch()

    def detach(self) -> None:
        """Puts all groups back where they were, and stops watching."""
        done: list[Group] = []
        try:
            for group in self._all_groups():
                self._mover.detach(group)
                done.append(group)
        except BaseException:
            for group in reversed(done):
                self._mover.attach(group, resident=group in self._resident)
            raise
        self._stop_watching()

    def settle(self) -> None:
        """Tells the mover that all groups were detached for good."""
        for group in self._all_groups():
            self._mover.settle(group)

    def reset(self) -> None:
        """Has the mover forget what it learned from earlier calls."""
        self._mover.reset()

    def report(self) -> dict[str, int]:
        """Bytes by where they lie between calls."""
        total: dict[str, int] = {}
        for group in self._all_groups():
            for label, nbytes in self._mover.report(group, resident=group in self._resident).items():
                total[label] = total.get(label, 0) + nbytes
        return total

    def enter(
        self, groups: tuple[Group, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begins a call that holds these groups; returns the inputs of the outermost one, moved."""
        self._calls.append([])
        try:
            if len(self._calls) == 1:
                self._mover.begin()
            # What is there comes first, or it could be dropped to make room for the others.
            for group in groups:
                if group in self._uses:
                    self._hold(group)
            for group in groups:
                if group not in self._calls[-1]:
                    self._hold(group)
            if len(self._calls) == 1:
                return _moved(args, self._onload_device), _moved(kwargs, self._onload_device)
        except BaseException:
            self.leave()
            raise
        return None

    def leave(self) -> None:
        """Ends the innermost call, whichever way it ended."""
        for group in reversed(self._calls.pop()):
            self._uses[group] -= 1
            if not self._uses[group]:
                self._drop_lingering()
                self._lingering = group
        if not self._calls:
            self._drop_lingering()
            self._mover.end()

    def _hold(self, group: Group) -> None:
        """Has the innermost call hold a group."""
        if group not in self._uses:
            self._drop_lingering()
            self._mover.onload(group)
            self._uses[group] = 0
        elif group is self._lingering:
            self._lingering = None
        self._uses[group] += 1
        self._calls[-1].append(group)

    def _drop_lingering(self) -> None:
        if self._lingering is not None:
            group, self._lingering = self._lingering, None
            del self._uses[group]
            self._mover.offload(group)

    def _before_read(self, group: Group) -> None:
        if not self._uses.get(group):
            self._hold(group)

    def _all_groups(self) -> Iterator[Group]:
        return itertools.chain(self._resident, self._groups)

    def _watch(self) -> None:
        by_module: dict[nn.Module, dict[str, Group]] = {}
        for group in self._groups:
            for slot in group.slots:
                for module, name in slot.owners:
                    by_module.setdefault(module, {})[name] = group
        for module, groups in by_module.items():
            for kind in ("_parameters", "_buffers"):
                original = module.__dict__[kind]
                if not groups.keys().isdisjoint(original):
                    module.__dict__[kind] = WatchedTensors(original, groups, self._calls, self._before_read)

    def _stop_watching(self) -> None:
        watched = {owner[0] for group in self._groups for slot in group.slots for owner in slot.owners}
        for module in watched:
            for kind in ("_parameters", "_buffers"):
                tensors = module.__dict__[kind]
                if isinstance(tensors, WatchedTensors):
                    module.__dict__[kind] = tensors.give_back()


class _HoldHook(Hook):
    """Holds groups for the length of a call."""

    swaps_weights: ClassVar[bool] = True

    def __init__(self, placement: Placement, groups: tuple[Group, ...]) -> None:
        self._placement = placement
        self._groups = groups

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Brings what is not there yet."""
        return self._placement.enter(self._groups, args, kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """Lets go of it."""
        self._placement.leave()

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """Lets go of it."""
        self._placement.leave()


class _PlacementHook(_HoldHook):
    """The one hook, at the component's first entry, that attaches and detaches for all of them."""

    def attach(self, module: nn.Module) -> None:
        """Puts the whole component's groups where they lie between calls."""
        self._placement.attach()

    def detach(self, module: nn.Module) -> None:
        """Puts them back."""
        self._placement.detach()

    def after_removal(self, module: nn.Module) -> None:
        """Has the mover leave the component usable without it."""
        self._placement.settle()

    def reset(self, module: nn.Module) -> None:
        """Has the mover forget earlier calls."""
        self._placement.reset()

    def report(self, module: nn.Module) -> Mapping[str, int]:
        """Where the component's bytes lie between calls."""
        return self._placement.report()


@define(eq=False)
class _Brought:
    """Tensors on one piece of memory, which for now hold a copy of it.

    Attributes:
        slot: What they are.
        tensors: The distinct objects that modules hold.
        sources: What the data of each was before.
        addresses: Where the data of each is now.
        versions: How often torch had counted a change of each.
        original: All of the memory, flat.
        copy: Its copy, flat.
    """

    slot: TensorSlot
    tensors: list[torch.Tensor]
    sources: list[torch.Tensor]
    addresses: list[int]
    versions: list[int | None]
    original: torch.Tensor
    copy: torch.Tensor


class DeviceMover(GroupMover):
    """Copies groups from an offload device to an onload device, and waits for each copy.

    What is copied is what the tensors hold when the copy begins, so every change between two calls counts.
    The offloaded memory is kept meanwhile and the copy thrown away at the end. What a call changed in
    place is copied back first: torch counts such changes, except those that BatchNorm and
    `buffer.data` make, so buffers of modules in training mode are always copied back.

    Args:
        onload_device: Where groups are brought.
        offload_device: Where they lie between calls.
    """

    def __init__(self, onload_device: torch.device, offload_device: torch.device) -> None:
        self._onload_device = onload_device
        self._offload_device = offload_device
        self._homes: dict[TensorSlot, torch.device] = {}
        self._brought: dict[Group, list[_Brought]] = {}

    def attach(self, group: Group, *, resident: bool) -> None:
        """Moves a group to where it lies between calls."""
        device = self._onload_device if resident else self._offload_device
        found = {slot: tensors for slot in group.slots if (tensors := current_tensors(slot))}
        homes = {slot: tensors[0].device for slot, tensors in found.items()}
        _move((tensors, device) for tensors in found.values())
        self._homes.update(homes)

    def detach(self, group: Group) -> None:
        """Moves a group back to the device that it came from."""
        homes = {slot: self._homes[slot] for slot in group.slots if slot in self._homes}
        _move((current_tensors(slot), device) for slot, device in homes.items())
        for slot in homes:
            del self._homes[slot]

    def onload(self, group: Group) -> None:
        """Gives the group's tensors a copy of their memory; a real one even on the same device."""
        brought: list[_Brought] = []
        views: list[torch.Tensor] = []
        for slot in group.slots:
            for tensors in _by_memory(current_tensors(slot)):
                original, copy, new = _copy_memory(tensors, self._onload_device)
                views += new
                brought.append(
                    _Brought(
                        slot=slot,
                        tensors=tensors,
                        sources=[tensor.data for tensor in tensors],
                        addresses=[view.data_ptr() for view in new],
                        versions=[_version(tensor) for tensor in tensors],
                        original=original,
                        copy=copy,
                    )
                )
        # Only now that all memory could be had is anything rebound.
        for tensor, view in zip((it for one in brought for it in one.tensors), views, strict=True):
            tensor.data = view
        self._brought[group] = brought

    def offload(self, group: Group) -> None:
        """Gives the group's tensors their own memory back, with what a call changed in place."""
        brought = self._brought.pop(group)
        changed = [one for one in brought if self._rebind(one)]
        for slot in group.slots:
            self._keep_new_tensors(slot)
        for one in changed:
            with torch.inference_mode(one.original.is_inference()):
                one.original.copy_(one.copy)

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """All of its bytes, under where they lie."""
        where = f"resident on {self._onload_device}" if resident else f"offloaded on {self._offload_device}"
        return {where: group.nbytes}

    def _rebind(self, brought: _Brought) -> bool:
        """Gives tensors their own memory back; says whether the copy may have been changed."""
        changed = brought.slot.is_buffer and any(module.training for module, _ in brought.slot.owners)
        of_each = zip(brought.tensors, brought.sources, brought.addresses, brought.versions, strict=True)
        for tensor, source, address, version in of_each:
            if tensor.data_ptr() == address:
                if version is None:  # no count; a parameter that its own forward changes is unheard of
                    changed |= brought.slot.is_buffer
                else:
                    changed |= version != tensor._version
                tensor.data = source
            else:  # the call gave it other data, as `weight.data = ...` does
                tensor.data = tensor.data.to(self._offload_device)
        return changed

    def _keep_new_tensors(self, slot: TensorSlot) -> None:
        """Moves tensors that a call put in the place of the slot's own to the offload device."""
        for module, name in slot.owners:
            tensor = _tensor_at(module, name)
            if tensor is None or is_on(tensor, self._offload_device):
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(self._offload_device)
            else:
                # The call may have returned this very tensor: it must stay where it is.
                module._buffers[name] = tensor.to(self._offload_device)


def check_movable(component: Component, slots: Iterable[TensorSlot]) -> None:
    """Refuses tensors whose data cannot be exchanged by `tensor.data = other`.

    Raises:
        PlanError: A tensor has no data yet.
        UnsupportedModelError: It is of a kind that wraps other tensors or has no plain memory.
    """
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
                "strided tensors can be moved. Move its module to where it computes, and exclude it"
            )
        if len(slot.tensors) > 1 and len({tensor.dtype for tensor in slot.tensors}) > 1:
            names = " and ".join(repr(component.label(fqn)) for fqn in slot.fqns)
            raise UnsupportedModelError(
                f"{names} share memory but differ in dtype. Give one of them memory of its own with .clone()"
            )


def current_tensors(slot: TensorSlot) -> list[torch.Tensor]:
    """The distinct tensors that are now where a slot's tensors were registered."""
    found = [tensor for owner in slot.owners if (tensor := _tensor_at(*owner)) is not None]
    return found if len(found) < 2 else list({id(tensor): tensor for tensor in found}.values())


def _tensor_at(module: nn.Module, name: str) -> torch.Tensor | None:
    # Through dict, so that it doesn't count as a read.
    found: torch.Tensor | None = dict.get(module._parameters, name)
    return dict.get(module._buffers, name) if found is None else found


def _by_memory(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Splits a slot's tensors by storage: something may have untied them since the slot was found."""
    if len(tensors) < 2:
        return [tensors] if tensors else []
    sharing: dict[object, list[torch.Tensor]] = {}
    for tensor in tensors:
        sharing.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor)
    return sharing.values()


def _copy_memory(
    tensors: list[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Copies the memory that tensors on one storage span, once.

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
        stop = max(it.storage_offset() + _extent(it) for it in data)
        original = data[0].as_strided((stop - start,), (1,), start)
        copy = original.to(device, copy=True)
        views = [copy.as_strided(it.shape, it.stride(), it.storage_offset() - start) for it in data]
    return original, copy, views


def _extent(tensor: torch.Tensor) -> int:
    """Elements of its storage from the tensor's first to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _move(devices: Iterable[tuple[list[torch.Tensor], torch.device]]) -> None:
    """Moves the tensors of slots to a device for good; all of them or, if it raises, none."""
    moved: list[tuple[torch.Tensor, torch.Tensor]] = []
    for of_slot, device in devices:
        if elsewhere := [it for it in of_slot if not is_on(it, device)]:
            for tensors in _by_memory(elsewhere):
                moved += zip(tensors, _copy_memory(tensors, device)[2], strict=True)
    for tensor, view in moved:
        tensor.data = view


def _moved(value: Any, device: torch.device) -> Any:
    """The value with all tensors in it on the device; a container in which none moves is the same object."""
    if isinstance(value, torch.Tensor | PackedSequence):
        return value.to(device)  # type: ignore[arg-type]  # PackedSequence is typed too narrowly
    if isinstance(value, list | tuple):
        items = [_moved(item, device) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        moved = {key: _moved(item, device) for key, item in value.items()}
        return value if all(moved[key] is value[key] for key in value) else type(value)(moved)
    return value


def is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether it is there; a device without an index stands for any of its type."""
    there = tensor.device
    return there == device or (device.index is None and there.type == device.type)


def _version(tensor: torch.Tensor) -> int | None:
    """How often torch counted a change in place; it counts none of inference tensors."""
    return None if tensor.is_inference() else tensor._version
