"""Group offloading: weights lie on one device and are copied to another, group by group, for their calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch
from attrs import evolve, field, frozen

from hookcore import (
    BudgetError,
    JointTechnique,
    Phase,
    Skipped,
    Technique,
    hookimpl,
    parse_bytes,
    parse_kwarg_names,
    parse_module_names,
    parse_onload_device,
    status,
)
from hookcore.memory import (
    Checkpoint,
    DevicePool,
    FileMover,
    FileOrigins,
    FileStore,
    Group,
    GroupMover,
    HostPool,
    Placement,
    SharedWeights,
    StreamMover,
    SynchronousMover,
    can_be_written,
    check_ties,
    dtype_hooks,
    find_blocks,
    free_device_bytes,
    has_streams,
    known_origins,
    leaf_units,
    make_groups,
    merge_neighbours,
    moving_and_staying,
    origins_in,
    origins_of_mapped,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Iterable, Iterator, Sequence

    from attrs import Attribute
    from torch import nn

    from hookcore import Binding, Component, TensorSlot
    from hookcore.memory import Store

OffloadType = Literal["auto", "block_level", "leaf_level"]


_LAYERS_AHEAD = 3  # one is seldom enough: neighbours differ in how long they compute and copy


_READ_AHEAD = 128 * 2**20  # bytes of host memory for what is read from files before it can be copied

PinGroups = Literal["first_last", "all"] | Callable[..., object]


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value)


def _names(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    return None if value is None else parse_module_names(value)


def _ask(wanted: Callable[..., object], module: nn.Module, group: Group, index: int) -> bool:
    """Ask whether a group stays; tells a function as much as it takes."""
    told = (module, group.holders[0][0], index)
    kinds = [it.kind for it in inspect.signature(wanted).parameters.values()]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes = 3 if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in by_position for kind in kinds)
    return bool(wanted(*told[:takes]))


def _budget(value: str | float | None) -> int | float | None:
    if not isinstance(value, float):
        return None if value is None else parse_bytes(value)
    if not 0 < value <= 1:
        raise ValueError(
            f"memory_budget is {value!r}; give bytes, text such as '6GiB', or a share of the free memory "
            "between 0 and 1"
        )
    return value


@frozen
class GroupOffload(JointTechnique):
    """Keeps weights in host memory, and copies each group to the onload device for its calls.

    On a device with streams, groups are copied ahead of their use while others compute, and those that a
    memory budget has room for stay on the device: which ones is chosen after the first call has shown in what
    order groups are used and how long computing and copying take. The host never waits for a copy.

    The options of diffusers' `apply_group_offloading` have the same names and meanings here.

    Attributes:
        onload_device: Where the model computes; inputs are moved there, and outputs stay there.
        offload_device: Where the weights lie between their calls.
        offload_type: "leaf_level": a group is one layer, which takes the least memory and the most copies.
            "block_level": a group is one or more of the model's repeated blocks, and what is outside of
            blocks stays for the whole call. "auto": by layers where copies run ahead of use, else by blocks.
        num_blocks_per_group: How many neighbouring blocks make a group, at block level.
        exclude_modules: FQNs of modules that stay on the onload device with all that is in them.
        use_stream: Whether groups are copied ahead of use on a stream of their own; None: where that can be.
        prefetch: How many groups may be copied ahead of use. None for as many as there is room for: in the
            budget or, without one, room for one, or a few where it is "auto".
        memory_budget: Bytes of the device that all weights together may take, as a number, as text such as
            "6GiB", or as a share of what is free (0.5). None for as little as the prefetch needs.
        pin_groups: Which groups stay on the onload device: "first_last", "all", or a function that is called
            with a group's first module, and if it takes more, that module's FQN and the group's number.
        block_modules: FQNs of modules that hold the blocks; None for what the model's library says.
        exclude_kwargs: Names of keyword inputs that are not moved to the onload device, such as caches that
            calls fill; None for what the model's library says.
        offload_to_disk_path: A folder. Weights stay in files and are read for each call, as with
            `DiskOffload`; those that lie in no file yet are written to one there, which goes away with the
            technique.
        checkpoint: Safetensors files, their index or their folder, that hold these very weights, so that
            nothing has to be written.
        low_cpu_mem_usage: Whether weights lie in ordinary host memory and are copied through a little that is
            page-locked, which costs the host the time of a second copy.
        non_blocking: Taken for diffusers' sake: a stream is never waited for, and without one always.
        record_stream: Taken for diffusers' sake: memory is never freed while it is used, so nothing need be
            recorded.
    """

    name: ClassVar[str] = "group_offload"
    phase: ClassVar[Phase] = Phase.PLACE
    replans: ClassVar[bool] = True

    onload_device: torch.device = field(converter=parse_onload_device)
    offload_device: torch.device = field(
        default=torch.device("cpu"), converter=parse_onload_device, kw_only=True
    )
    offload_type: OffloadType = field(default="auto", kw_only=True)
    num_blocks_per_group: int = field(default=1, kw_only=True)
    exclude_modules: tuple[str, ...] = field(default=(), converter=parse_module_names, kw_only=True)
    use_stream: bool | None = field(default=None, kw_only=True)
    prefetch: int | None = field(default=None, kw_only=True)
    memory_budget: int | float | None = field(default=None, converter=_budget, kw_only=True)
    pin_groups: PinGroups | None = field(default=None, kw_only=True)
    block_modules: tuple[str, ...] | None = field(default=None, converter=_names, kw_only=True)
    exclude_kwargs: tuple[str, ...] | None = field(default=None, converter=parse_kwarg_names, kw_only=True)
    offload_to_disk_path: Path | None = field(default=None, converter=_path, kw_only=True)
    checkpoint: Path | None = field(default=None, converter=_path, kw_only=True)
    low_cpu_mem_usage: bool = field(default=False, kw_only=True)
    non_blocking: bool = field(default=False, kw_only=True)
    record_stream: bool = field(default=False, kw_only=True)

    @offload_type.validator
    def _check_type(self, _attribute: Attribute[str], value: str) -> None:
        if value not in get_args(OffloadType):
            known = " or ".join(map(repr, get_args(OffloadType)))
            raise ValueError(f"offload_type is {value!r}; choose {known}")

    @num_blocks_per_group.validator
    def _check_number(self, _attribute: Attribute[int], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"num_blocks_per_group is {value!r}, expected an int of 1 or more; 1 needs least memory"
            )

    @prefetch.validator
    def _check_prefetch(self, _attribute: Attribute[int | None], value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(
                f"prefetch is {value!r}, expected an int of 0 or more, or None to have it chosen"
            )

    @pin_groups.validator
    def _check_pins(self, _attribute: Attribute[PinGroups | None], value: PinGroups | None) -> None:
        if value not in (None, "first_last", "all") and not callable(value):
            raise ValueError(
                f"pin_groups is {value!r}; choose 'first_last' or 'all', or give a function of a module that "
                "says whether it stays"
            )

    @use_stream.validator
    def _check_stream(self, _attribute: Attribute[bool | None], value: bool | None) -> None:
        if value and not self._can_stream:
            raise ValueError(
                f"use_stream=True needs an onload device with streams and offload_device='cpu', found "
                f"{str(self.onload_device)!r} and {str(self.offload_device)!r}. Leave use_stream out to have "
                "it chosen"
            )

    @memory_budget.validator
    def _check_budget(self, _attribute: Attribute[int | None], value: float | None) -> None:
        if value is not None and not self._streams:
            raise ValueError(
                f"memory_budget needs groups that are copied on a stream, which "
                f"{str(self.onload_device)!r} {'is told not to do' if self._can_stream else 'cannot do'}. "
                "Leave memory_budget out, or set exclude_modules= for what is to stay"
            )

    @property
    def joint_key(self) -> Hashable:
        """Components share memory wherever the files of each lie."""
        return evolve(self, checkpoint=None)

    @classmethod
    def bind_jointly(cls, places: Sequence[tuple[Self, Component]]) -> Iterable[Iterable[Binding | Skipped]]:
        """List the hooks at the components' entries and at the calls of all blocks or leave.

        Raises:
            PlanError: A tensor has no data, or an excluded module doesn't exist.
            BudgetError: The budget is less than one group and all that stays need.
            UnsupportedModelError: A tensor is of a kind that cannot be moved.
        """
        first = places[0][0]
        if first._streams:
            pool: DevicePool | HostPool = DevicePool(first.onload_device, first._budget)
        else:
            pool = HostPool(None, _READ_AHEAD, is_shared=len(places) > 1)
        shared_weights = SharedWeights()
        return [list(technique._bind(component, shared_weights, pool)) for technique, component in places]

    def _bind(
        self, component: Component, shared_weights: SharedWeights, pool: DevicePool | HostPool
    ) -> Iterator[Binding | Skipped]:
        if not component.slots:
            yield Skipped("", "it has no parameters or buffers")
            return
        here = self.onload_device
        moving, resident = moving_and_staying(component, self.exclude_modules, here)
        by_blocks = self.offload_type == "block_level" or (self.offload_type == "auto" and not self._streams)
        if by_blocks:
            units = merge_neighbours(find_blocks(component, self.block_modules), self.num_blocks_per_group)
        else:
            units = leaf_units(component)
        if self.pin_groups is not None:
            pinned = self._pinned(component, make_groups(component, units, moving))
            moving = [slot for slot in moving if not any(slot in group.slots for group in pinned)]
            resident += [Group(f"pinned {group.name}", group.slots, ()) for group in pinned]
        if self.offload_to_disk_path is not None or self.checkpoint is not None:
            yield from self._from_files(component, units, moving, resident, pool)
            return
        placement = shared_weights.place(
            component,
            units,
            moving,
            resident=resident,
            make_mover=partial(self._mover, component, pool),
            onload_device=here,
            exclude_kwargs=self.exclude_kwargs,
            offload_device=self.offload_device,
        )
        yield from placement.bindings()

    def _pinned(self, component: Component, groups: Sequence[Group]) -> list[Group]:
        """The groups that stay, as `pin_groups` says."""
        if callable(self.pin_groups):
            return [
                group
                for index, group in enumerate(groups)
                if _ask(self.pin_groups, component.module.get_submodule(group.holders[0][0]), group, index)
            ]
        # Of blocks, or of layers: what is held for the whole call is neither.
        groups = [group for group in groups if all(fqn for fqn, _ in group.holders)] or groups
        return list(groups) if self.pin_groups == "all" else [*groups[:1], *groups[1:][-1:]]

    def _from_files(
        self,
        component: Component,
        units: Sequence[tuple[str, ...]],
        moving: Sequence[TensorSlot],
        resident: Sequence[Group],
        pool: DevicePool | HostPool,
    ) -> Iterator[Binding | Skipped]:
        """List hooks that read weights from files."""
        here = self.onload_device
        parameters = [slot for slot in moving if not slot.is_buffer]
        check_ties(component, parameters)
        again = self.name in status(component.module).techniques
        known = known_origins(parameters, again=again)
        if self.checkpoint is not None and not known and not again:
            known = origins_in(component, parameters, Checkpoint.open(self.checkpoint))
        known |= origins_of_mapped([slot for slot in parameters if slot not in known])
        others = [slot for slot in parameters if slot not in known]
        resident = list(resident)
        left, why = others, "it is not in the checkpoint"
        if self.offload_to_disk_path is not None:
            left = [slot for slot in others if not can_be_written(slot)]
            why = "a safetensors file cannot hold its dtype"
        if left:
            resident.append(Group("in memory", tuple(left), ()))
            moving = [slot for slot in moving if slot not in left]
            others = [slot for slot in others if slot not in left]
            for slot in left:
                yield Skipped(slot.name, f"stays on the onload device: {why}")
        origins = FileOrigins(known, others, self.offload_to_disk_path)
        yield from dtype_hooks(component, known)
        if isinstance(pool, DevicePool):
            groups = make_groups(component, units, moving)
            mover: GroupMover = self._stream_mover(component, pool, FileStore(origins, _READ_AHEAD))
        else:
            groups = make_groups(component, units, [slot for slot in moving if not slot.is_buffer])
            resident.append(Group("buffers", tuple(slot for slot in moving if slot.is_buffer), ()))
            beside = SynchronousMover(here, here)
            unmoved = self.exclude_kwargs
            yield from Placement(component, [], resident, beside, here, exclude_kwargs=unmoved).bindings()
            resident = []
            costs = {group: group.nbytes for group in groups}
            mover = FileMover(groups, origins, here, pool, costs=costs, what=component.label(""))
        placement = Placement(component, groups, resident, mover, here, exclude_kwargs=self.exclude_kwargs)
        yield from placement.bindings()

    def _mover(self, component: Component, pool: DevicePool | HostPool) -> GroupMover:
        if isinstance(pool, DevicePool):
            return self._stream_mover(component, pool)
        return SynchronousMover(self.onload_device, self.offload_device)

    def _stream_mover(
        self, component: Component, pool: DevicePool, store: Store | None = None
    ) -> StreamMover:
        # What runs as a whole is a group as large as a block: one ahead is enough.
        ahead = _LAYERS_AHEAD if self.offload_type == "auto" and not component.wholes else 1
        if self.prefetch is not None:
            ahead = self.prefetch
        return StreamMover(
            self.onload_device,
            prefetch=ahead,
            lock_limit=0 if self.low_cpu_mem_usage else None,
            store=store,
            most_ahead=self.prefetch,
            pool=pool,
        )

    @property
    def _budget(self) -> int | None:
        if isinstance(self.memory_budget, float):
            free = free_device_bytes(self.onload_device)
            if free is None:
                raise BudgetError(
                    f"memory_budget is {self.memory_budget!r}, a share of the free memory, but torch cannot "
                    f"tell how much {str(self.onload_device)!r} has. Give bytes, or text such as '6GiB'"
                )
            return int(self.memory_budget * free)
        return self.memory_budget

    @property
    def _can_stream(self) -> bool:
        return has_streams(self.onload_device) and self.offload_device.type == "cpu"

    @property
    def _streams(self) -> bool:
        return self._can_stream if self.use_stream is None else self.use_stream


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Bring group offloading."""
    return [GroupOffload]
