"""Which group is in memory when: counts who needs which group, and tells a `GroupMover` to bring or drop it.

A group is brought when the first call that holds it begins. After the last of these calls it lingers until
another group is needed or the outermost call ends, unless its mover wants the memory at once. Blocks that
share a group thus bring it once, and at most one group is there that no running call holds.

A tensor that is read outside of the calls that hold its group (by a parent's forward, say) has its group
brought at that moment, until the innermost running call ends.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import define, field
from torch import nn

from hookcore.guard import current_turn
from hookcore.hook import Hook
from hookcore.memory.copies import copy_to, stand_in, step_back, stop_copying_to
from hookcore.memory.gradients import Gradients
from hookcore.memory.grouping import Group, callable_parts, entries_of
from hookcore.memory.inputs import InputMover
from hookcore.memory.model_device import ModelDevice
from hookcore.memory.mover import ComponentGroups
from hookcore.memory.watched_reads import stop_watching, watch
from hookcore.technique import Binding, Claim, Resource

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from hookcore.guard import Turn
    from hookcore.memory.device.timeline import Timeline
    from hookcore.memory.mover import GroupMover
    from hookcore.target import Component


_CPU = torch.device("cpu")


@define(eq=False)
class _Calls:
    """The calls under way on placements that are joined; its length is their number.

    Attributes:
        held: What each of them holds, the innermost last.
        uses: How often each group that is in memory, or on its way there, is held.
        lingering: In memory though nobody holds it; one at most.
        turn: The outermost one's; none of them is under way when that is over. None where nobody tells.
    """

    held: list[list[Group]] = field(factory=list)
    uses: dict[Group, int] = field(factory=dict)
    lingering: list[Group] = field(factory=list)
    turn: Turn | None = None

    def __len__(self) -> int:
        return 0 if self.turn is not None and self.turn.thread is None else len(self.held)


@define(eq=False)
class _Attached:
    """A group that is where it lies between calls, or on its way there or back.

    Attributes:
        came_from: Its tensors, with the devices that they were on.
        by: The placements that need it there, by identity: they must not keep each other alive.
    """

    came_from: list[tuple[torch.Tensor, torch.device]]
    by: set[int] = field(factory=set)


class Placement:
    """Brings each group of a component for the calls that hold it.

    Args:
        component: What is placed.
        groups: The groups that come and go.
        resident: The groups that stay on the onload device.
        mover: Brings and drops them.
        onload_device: Where the inputs of the outermost call are moved to. Models in the component that tell
            their device tell this one.
        aliases: Groups whose tensors have their home in a group of another placement, which this one joins.
        exclude_kwargs: Names of keyword inputs that are not moved; None for what the model's library says.
        offload_device: Where the weights lie between calls.

    Attributes:
        groups: As given.
        resident: As given.
        mover: Brings and drops the groups.
    """

    def __init__(
        self,
        component: Component,
        groups: Sequence[Group],
        resident: Sequence[Group],
        mover: GroupMover,
        onload_device: torch.device,
        *,
        aliases: Mapping[Group, Group] | None = None,
        exclude_kwargs: Collection[str] | None = None,
        offload_device: torch.device = _CPU,
    ) -> None:
        self._component = component
        self.groups = tuple(groups)
        self.resident = tuple(resident)
        self.mover = mover
        self._aliases = dict(aliases or {})
        self._move_inputs = InputMover(component, onload_device, exclude_kwargs)
        self._stand_ins: list[tuple[nn.Module, str]] = []
        self._is_watching = False
        self._told = ModelDevice(component, onload_device, offload_device)
        # What placements that are joined have in common:
        self._refs = [weakref.ref(self)]  # or it would keep itself, and the groups' tensors, alive
        self._attached: dict[Group, _Attached] = {}
        self._calls = _Calls()
        self._gradients = Gradients(component.slots, self._train)
        mover.expect(self._needed())

    def join(self, other: Placement) -> None:
        """Count from now on, before anything is attached, who holds what together with another placement."""
        if self._refs is other._refs:
            return
        for placement in self._joined:
            placement.mover = other.mover
            placement._attached, placement._calls = other._attached, other._calls
            placement._refs = other._refs
            other._refs.append(weakref.ref(placement))
            other.mover.expect(placement._needed())

    @property
    def _joined(self) -> list[Placement]:
        """The placements that it is joined with, itself among them, in the order in which they were made."""
        return [placement for ref in self._refs if (placement := ref()) is not None]

    def _needed(self) -> ComponentGroups:
        return ComponentGroups(self._component.name, self.groups, self.resident, self._aliases)

    def _homes(self) -> Iterator[Group]:
        """All groups, its own and those that it borrows, each once."""
        return iter(dict.fromkeys((*self.resident, *self.groups, *self._aliases.values())))

    def bindings(self) -> Iterator[Binding]:
        """List the hooks: at the component's entries, at each call that holds a group, and at all parts.

        Somebody may call a part by itself, as `generate` calls an encoder. The hook there then does what
        those at the component's entries do.
        """
        held: dict[tuple[str, str], list[Group]] = {("", entry): [] for entry in entries_of(self._component)}
        claimed: dict[tuple[str, str], list[Group]] = {}
        first = next(iter(held))
        for group in (*self.groups, *self._aliases):
            home = self._aliases.get(group, group)
            for holder in group.holders:
                if home not in (holding := held.setdefault(holder, [])):
                    holding.append(home)
            claimed.setdefault(group.holders[0] if group.holders else first, []).append(group)
        claimed.setdefault(first, []).extend(self.resident)
        for (fqn, entry), groups in held.items():
            hook_class = _PlacementHook if (fqn, entry) == first else _HoldHook
            claims = [
                Claim(Resource.PLACEMENT, slot.name, shared=True)
                for group in claimed.get((fqn, entry), ())
                for slot in group.slots
            ]
            yield Binding(fqn, hook_class(self, tuple(groups)), entry, claims)
        if self.groups or self._aliases:
            for fqn in callable_parts(self._component):
                if (fqn, "forward") not in held:
                    yield Binding(fqn, _PartHook(self))

    def attach(self) -> None:
        """Put all groups where they lie between calls, and begins to watch reads."""
        try:
            self._put_all()
        except BaseException:
            self._take_all()
            raise

    def detach(self) -> None:
        """Put all groups back where they were, and stop watching."""
        self._drop_left()
        try:
            self._take_all()
        except BaseException:
            self._put_all()
            raise

    # Both go on where an exception, or an interrupt, has left the other, or an earlier one.

    def _put_all(self) -> None:
        for group in self._homes():
            self._put(group)
        stand_in((slot for group in self.resident for slot in group.slots), self._stand_ins)
        self._is_watching = True
        watch(self._watched, self._calls, self._before_read, self._calls.uses)
        self._told.attach()

    def _take_all(self) -> None:
        self._told.detach()
        if self._is_watching:
            stop_watching(self._watched)
            self._is_watching = False
        step_back(self._stand_ins)
        for group in self._homes():
            self._take(group)
        self._gradients.stop()

    def _train(self) -> None:
        self.mover.train()

    def _put(self, group: Group) -> None:
        """Attach a group, unless another placement has done so."""
        if group not in self._attached:
            came_from = [(tensor, tensor.device) for slot in group.slots for tensor in slot.tensors]
            self._attached[group] = _Attached(came_from)
        attached = self._attached[group]
        if attached.by <= {id(self)}:
            attached.by.add(id(self))
            self.mover.attach(group, resident=self._stays(group))
            for tensor, device in attached.came_from:
                copy_to(tensor, device)
        attached.by.add(id(self))

    def _take(self, group: Group) -> None:
        """Detach a group, unless another placement needs it."""
        attached = self._attached.get(group)
        if attached is None:
            return
        if attached.by <= {id(self)}:
            self.mover.detach(group)
            for tensor, _ in attached.came_from:
                stop_copying_to(tensor)
            del self._attached[group]
        attached.by.discard(id(self))

    def _stays(self, group: Group) -> bool:
        return any(group in placement.resident for placement in self._joined)

    def finalize(self) -> None:
        """Tell the mover that all groups were detached for good."""
        for group in self._homes():
            if group not in self._attached:
                self.mover.finalize(group)

    def reset(self) -> None:
        """Reset the mover."""
        self._drop_left()
        self.mover.reset()

    @property
    def _leads(self) -> bool:
        """Whether it tells what the placements that are joined have in common."""
        there = [it for it in self._joined if any(group in it._attached for group in it._homes())]
        return self is (there or self._joined)[0]

    def needs(self) -> Mapping[str, int]:
        """Bytes of each device that weights will take at once."""
        return self.mover.needs() if self._leads else {}

    def run_report(self) -> object:
        """Return what the mover counted."""
        return self.mover.run_report() if self._leads else None

    def recording(self, timeline: Timeline) -> AbstractContextManager[None]:
        """Time what the mover does until the end of the block."""
        return self.mover.recording(timeline) if self._leads else nullcontext()

    def report(self) -> dict[str, int]:
        """Bytes by where they lie between calls."""
        total: dict[str, int] = {}
        for group in (*self.resident, *self.groups):
            for label, nbytes in self.mover.report(group, resident=group in self.resident).items():
                total[label] = total.get(label, 0) + nbytes
        return total

    def enter(
        self, groups: tuple[Group, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a call that holds these groups; return the inputs of the outermost one, moved."""
        calls = self._calls
        held: list[Group] = []
        if is_outermost := not calls:
            self._drop_left()
            calls.turn = current_turn()
        calls.held.append(held)
        try:
            if is_outermost:
                self.mover.begin()
                if torch.is_grad_enabled():
                    self._gradients.watch()
            # What is there comes first, or it could be dropped to make room for the others.
            for group in groups:
                if group in calls.uses:
                    self._hold(group)
            for group in groups:
                if group not in held:
                    self._hold(group)
            if is_outermost:
                return self._move_inputs(args, kwargs)
        except BaseException:
            self.leave()
            raise
        return None

    def leave(self) -> None:
        """End the innermost call, whichever way it ended."""
        calls = self._calls
        for group in reversed(calls.held.pop()):
            calls.uses[group] -= 1
            if not calls.uses[group]:
                self._drop_lingering()
                calls.lingering.append(group)
                if not self.mover.lingers:
                    self._drop_lingering()
        if not calls.held:
            self._drop_lingering()
            self.mover.end()

    def _hold(self, group: Group) -> None:
        """Hold a group for the innermost call."""
        calls = self._calls
        if group not in calls.uses:
            self._drop_lingering()
            calls.uses[group] = 0  # before it is there: an interrupt must not leave it unseen
            try:
                self.mover.onload(group)
            except BaseException:
                self._drop(group)
                raise
        elif group in calls.lingering:
            calls.lingering.clear()
        calls.uses[group] += 1
        calls.held[-1].append(group)

    def _drop(self, group: Group) -> None:
        """Drop a group that nobody holds; what fails or is interrupted can be done again."""
        self.mover.offload(group)
        self._calls.uses.pop(group, None)

    def _drop_lingering(self) -> None:
        lingering = self._calls.lingering
        if lingering:
            self._drop(lingering[0])
            lingering.clear()

    def _drop_left(self) -> None:
        """Drop what calls have left that were interrupted, before the next one or when none follows."""
        calls = self._calls
        if not calls and (calls.uses or calls.held):
            for group in list(calls.uses):
                self._drop(group)
            calls.lingering.clear()
            calls.held.clear()

    @property
    def is_called(self) -> bool:
        """Whether a call is under way."""
        return bool(self._calls)

    def groups_for(self, module: nn.Module) -> tuple[Group, ...]:
        """The groups that a call of a module needs which neither it nor a call below it brings."""
        below = set(module.modules())
        modules = self._component.modules
        return tuple(
            self._aliases.get(group, group)
            for group in (*self.groups, *self._aliases)
            if any(owner in below for slot in group.slots for owner, _ in slot.owners)
            and not any(fqn in modules and modules[fqn] in below for fqn, _ in group.holders)
        )

    @property
    def _watched(self) -> list[Group]:
        return [*self.groups, *(group for group in self._aliases if group.holders)]

    def _before_read(self, group: Group) -> None:
        group = self._aliases.get(group, group)
        if not self._calls:
            self._drop_left()
            self.mover.invalidate(group)
        elif not self._calls.uses.get(group):
            self._hold(group)


class _HoldHook(Hook):
    """Holds groups for the length of a call."""

    swaps_weights: ClassVar[bool] = True
    only_brings_weights: ClassVar[bool] = True

    def __init__(self, placement: Placement, groups: tuple[Group, ...]) -> None:
        self._placement = placement
        self._groups = groups

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bring what is not there yet."""
        return self._placement.enter(self._groups, args, kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """Let go of it."""
        self._placement.leave()

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """Let go of it."""
        self._placement.leave()


class _PlacementHook(_HoldHook):
    """The one hook, at the component's first entry, that attaches and detaches for all of them."""

    def attach(self, module: nn.Module) -> None:
        """Put the whole component's groups where they lie between calls."""
        self._placement.attach()

    def detach(self, module: nn.Module) -> None:
        """Put them back."""
        self._placement.detach()

    def after_removal(self, module: nn.Module) -> None:
        """Finalize the component's groups."""
        self._placement.finalize()

    def reset(self, module: nn.Module) -> None:
        """Reset the mover."""
        self._placement.reset()

    def report(self, module: nn.Module) -> Mapping[str, int]:
        """Return where the component's bytes lie between calls."""
        return self._placement.report()

    def needs(self, module: nn.Module) -> Mapping[str, int]:
        """Return what the whole component will take."""
        return self._placement.needs()

    def run_report(self, module: nn.Module) -> object:
        """Return what the mover counted."""
        return self._placement.run_report()

    def recording(self, timeline: Timeline) -> AbstractContextManager[None]:
        """Time what is moved until the end of the block."""
        return self._placement.recording(timeline)


class _PartHook(Hook):
    """Makes a call of a part of the component by itself an outermost call."""

    swaps_weights: ClassVar[bool] = True
    only_brings_weights: ClassVar[bool] = True
    outermost_only: ClassVar[bool] = True

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._needed: tuple[Group, ...] | None = None
        self._entered: list[bool] = []  # for each call under way

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bring what the part needs, unless a call is under way that has or brings it."""
        placement = self._placement
        moved_inputs = None
        if enters := not placement.is_called:
            if self._needed is None:
                self._needed = placement.groups_for(module)
            moved_inputs = placement.enter(self._needed, args, kwargs)
        self._entered.append(enters)
        return moved_inputs

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """Let go of it."""
        if self._entered.pop():
            self._placement.leave()

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """Let go of it."""
        self.post_forward(module, None)
