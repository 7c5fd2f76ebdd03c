"""Disk offloading: weights stay in the safetensors files they came from, and are read as they are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from attrs import evolve, field, frozen

from hookcore import (
    Binding,
    CheckpointError,
    JointTechnique,
    Phase,
    Skipped,
    Technique,
    hookimpl,
    parse_bytes,
    parse_kwarg_names,
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
    StreamMover,
    SynchronousMover,
    check_movable,
    check_ties,
    choose_residents,
    cost,
    dtype_hooks,
    has_streams,
    known_origins,
    leaf_units,
    make_groups,
    origins_in,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Iterable, Iterator, Sequence

    from hookcore import Component


_GROUPS_AHEAD = 3
"""Copied ahead of use where there is no budget to fill; neighbours differ in how long they take."""


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value)


def _budget(value: int | str | None) -> int | None:
    return None if value is None else parse_bytes(value)


@frozen
class DiskOffload(JointTechnique):
    """Streams weights from the checkpoint's own files. Nothing is written.

    Parameters take no memory between calls, and read true at any time: they are mapped. For its call a
    layer's weights are brought into memory, in the order that the last call has shown, ahead of use: on a
    device with streams by copies from a little page-locked memory, which never wait for the device but where
    that is full. Buffers stay in memory, that of the device where the model computes.

    Attributes:
        checkpoint: A safetensors file, an index, or a folder, as `save_pretrained` writes it. None for a
            model that `hookcore.load` makes, which knows.
        execution_device: Where the model computes; inputs are moved there.
        memory_budget: Bytes, or text such as "512MiB", that all weights of all components together may take
            in memory, or on an execution device with streams, there. As many as it has room for stay. None:
            as little as one call needs, and `read_ahead`, or a few layers on the device.
        read_ahead: Bytes of host memory for weights that are read ahead of their use.
        exclude_kwargs: Names of keyword inputs that are not moved to the execution device, such as caches
            that calls fill; None for what the model's library says.
    """

    name: ClassVar[str] = "disk_offload"
    phase: ClassVar[Phase] = Phase.PLACE
    replans: ClassVar[bool] = True
    materializes: ClassVar[bool] = True

    checkpoint: Path | None = field(default=None, converter=_path)
    execution_device: torch.device = field(
        default=torch.device("cpu"), converter=parse_onload_device, kw_only=True
    )
    memory_budget: int | None = field(default=None, converter=_budget, kw_only=True)
    read_ahead: int = field(default=128 * 2**20, converter=parse_bytes, kw_only=True)
    exclude_kwargs: tuple[str, ...] | None = field(default=None, converter=parse_kwarg_names, kw_only=True)

    @property
    def joint_key(self) -> Hashable:
        """Components share a budget wherever the files of each lie."""
        return evolve(self, checkpoint=None)

    @classmethod
    def bind_jointly(cls, places: Sequence[tuple[Self, Component]]) -> Iterable[Iterable[Binding | Skipped]]:
        """List the hooks at the components' entries and at the calls of all layers.

        Raises:
            CheckpointError: The checkpoint is damaged, or is not one of this model.
            BudgetError: The budget is less than one call needs.
            UnsupportedModelError: A parameter is of a kind that cannot be exchanged.
        """
        first = places[0][0]
        if has_streams(first.execution_device):
            pool: DevicePool | HostPool = DevicePool(first.execution_device, first.memory_budget)
        else:
            pool = HostPool(first.memory_budget, first.read_ahead, is_shared=len(places) > 1)
        return [list(technique._bind(component, pool)) for technique, component in places]

    def _bind(self, component: Component, pool: DevicePool | HostPool) -> Iterator[Binding | Skipped]:
        origins = self._origins(component)
        if not origins:
            yield Skipped("", "none of its parameters is in the checkpoint")
            return
        check_movable(component, origins)
        groups = make_groups(component, leaf_units(component), origins)
        yield from dtype_hooks(component, origins)
        if isinstance(pool, DevicePool):
            yield from self._streamed(component, groups, origins, pool)
        else:
            yield from self._brought(component, groups, origins, pool)
        staying = [slot for slot in component.slots if slot not in origins]
        if staying and self.execution_device.type != "cpu":
            check_movable(component, staying)
            beside = SynchronousMover(self.execution_device, torch.device("cpu"))
            group = Group("in memory", tuple(staying), ())
            yield from self._placement(component, [], [group], beside).bindings()
        for slot in staying:
            yield Skipped(slot.name, "stays in memory: a buffer, or not in the checkpoint")

    def _streamed(
        self,
        component: Component,
        groups: Sequence[Group],
        origins: FileOrigins,
        pool: DevicePool,
    ) -> Iterator[Binding]:
        """List hooks that read groups ahead of use, and copy them to the device while others compute."""
        here = self.execution_device
        store = FileStore(origins, self.read_ahead)
        mover = StreamMover(here, prefetch=_GROUPS_AHEAD, store=store, pool=pool)
        return self._placement(component, groups, [], mover).bindings()

    def _brought(
        self,
        component: Component,
        groups: Sequence[Group],
        origins: FileOrigins,
        pool: HostPool,
    ) -> Iterator[Binding]:
        """List hooks that bring groups into host memory, where the CPU uses them."""
        costs = {group: cost([origins[slot] for slot in group.slots]) for group in groups}
        resident: list[Group] = []
        if not pool.is_shared:
            resident = choose_residents(costs, self.memory_budget, self.read_ahead, component.label(""))
        streamed = [group for group in groups if group not in set(resident)]
        here = self.execution_device
        mover = FileMover(streamed, origins, here, pool, costs=costs, what=component.label(""))
        return self._placement(component, streamed, resident, mover).bindings()

    def _placement(
        self, component: Component, groups: Sequence[Group], resident: Sequence[Group], mover: GroupMover
    ) -> Placement:
        here = self.execution_device
        return Placement(component, groups, resident, mover, here, exclude_kwargs=self.exclude_kwargs)

    def _origins(self, component: Component) -> FileOrigins:
        """Find where each parameter's values lie: known from loading, or by name in the checkpoint."""
        parameters = [slot for slot in component.slots if not slot.is_buffer]
        check_ties(component, parameters)
        # While it is on the model and only planned anew, names may have changed and weights been replaced: it
        # is known which ones it has streamed, and all others are in memory.
        again = self.name in status(component.module).techniques
        known = known_origins(parameters, again=again)
        if known or again:
            return FileOrigins(known)
        if self.checkpoint is None:
            raise CheckpointError(
                f"{component.label('')!r} was not made by hookcore.load, so nobody knows where its weights "
                "lie. Give DiskOffload the path of its safetensors files as checkpoint="
            )
        return FileOrigins(origins_in(component, parameters, Checkpoint.open(self.checkpoint)))


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Bring disk offloading."""
    return [DiskOffload]
