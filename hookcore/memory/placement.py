"""Which group is in memory when: counts who needs which group, and tells a `GroupMover` to bring or drop it.

A group is brought when the first call that holds it begins. After the last of these calls it lingers until
another group is needed or the outermost call ends. Blocks that share a group thus bring it once, and at
most one group is there that no running call holds.

A tensor that is read outside of the calls that hold its group (by a parent's forward, say) has its group
brought at that moment, until the innermost running call ends.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from hookcore.hook import Hook
from hookcore.memory.grouping import Group, entries_of
from hookcore.memory.model_device import ModelDevice
from hookcore.memory.reads import stop_watching, watch
from hookcore.technique import Binding, Claim, Resource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hookcore.memory.mover import GroupMover
    from hookcore.target import Component


class Placement:
    """Brings each group of a component for the calls that hold it.

    Args:
        component: What is placed.
        groups: The groups that come and go.
        resident: The groups that stay on the onload device.
        mover: Brings and drops them.
        onload_device: Where the inputs of the outermost call are moved to. Models in the component that tell
            their device tell this one.
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
        self._told = ModelDevice(component, onload_device)
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
        watch(self._groups, self._calls, self._before_read)
        self._told.attach()

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
        stop_watching(self._groups)
        self._told.detach()

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
                return moved(args, self._onload_device), moved(kwargs, self._onload_device)
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
        if not self._calls:
            self._mover.expose(group)
        elif not self._uses.get(group):
            self._hold(group)

    def _all_groups(self) -> Iterator[Group]:
        return itertools.chain(self._resident, self._groups)


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


def moved(value: Any, device: torch.device) -> Any:
    """The value with all tensors in it on the device; a container in which none moves is the same object."""
    if isinstance(value, torch.Tensor | PackedSequence):
        return value.to(device)  # type: ignore[arg-type]  # PackedSequence is typed too narrowly
    if isinstance(value, list | tuple):
        items = [moved(item, device) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        new = {key: moved(item, device) for key, item in value.items()}
        return value if all(new[key] is value[key] for key in value) else type(value)(new)
    return value
