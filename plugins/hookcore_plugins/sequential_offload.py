"""Sequential offloading: one layer at a time is on the device, which takes the least memory there."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from attrs import field, frozen

from hookcore import (
    JointTechnique,
    Phase,
    Skipped,
    Technique,
    hookimpl,
    parse_kwarg_names,
    parse_module_names,
    parse_onload_device,
)
from hookcore.memory import (
    DevicePool,
    GroupMover,
    SharedWeights,
    StreamMover,
    SynchronousMover,
    has_streams,
    leaf_units,
    moving_and_staying,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hookcore import Binding, Component


@frozen
class SequentialOffload(JointTechnique):
    """Keeps weights in host memory, and copies each layer's to the device for its calls.

    On a device with streams the next layer is copied while this one computes. It does what accelerate's
    `cpu_offload` and diffusers' `enable_sequential_cpu_offload` are for. They leave buffers on the device
    unless told otherwise (`offload_buffers`); here they stay where there are streams, as a call may change
    them, and move with their layer elsewhere. `preload_module_classes` isn't needed: a weight that is read
    outside of its layer's call is brought at that moment.

    Attributes:
        device: Where the model computes; inputs are moved there, and outputs stay there.
        exclude_modules: FQNs of modules that stay on the device with all that is in them.
        exclude_kwargs: Names of keyword inputs that are not moved to the device, such as caches that calls
            fill; None for what the model's library says.
    """

    name: ClassVar[str] = "sequential_offload"
    phase: ClassVar[Phase] = Phase.PLACE
    replans: ClassVar[bool] = True

    device: torch.device = field(converter=parse_onload_device)
    exclude_modules: tuple[str, ...] = field(default=(), converter=parse_module_names, kw_only=True)
    exclude_kwargs: tuple[str, ...] | None = field(default=None, converter=parse_kwarg_names, kw_only=True)

    @classmethod
    def bind_jointly(cls, places: Sequence[tuple[Self, Component]]) -> Iterable[Iterable[Binding | Skipped]]:
        """List the hooks at the components' entries and at the calls of all layers.

        Raises:
            PlanError: A tensor has no data, or an excluded module doesn't exist.
            UnsupportedModelError: A tensor is of a kind that cannot be moved.
        """
        shared_weights = SharedWeights()
        device = places[0][0].device
        pool = DevicePool(device) if has_streams(device) else None
        return [list(technique._bind(component, shared_weights, pool)) for technique, component in places]

    def _bind(
        self, component: Component, shared_weights: SharedWeights, pool: DevicePool | None
    ) -> Iterator[Binding | Skipped]:
        if not component.slots:
            yield Skipped("", "it has no parameters or buffers")
            return
        moving, resident = moving_and_staying(component, self.exclude_modules, self.device)
        placement = shared_weights.place(
            component,
            leaf_units(component),
            moving,
            resident=resident,
            make_mover=partial(self._mover, pool),
            onload_device=self.device,
            exclude_kwargs=self.exclude_kwargs,
        )
        yield from placement.bindings()

    def _mover(self, pool: DevicePool | None) -> GroupMover:
        if pool is not None:
            return StreamMover(self.device, prefetch=1, most_ahead=1, per_group=True, pool=pool)
        return SynchronousMover(self.device, torch.device("cpu"))


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Bring sequential offloading."""
    return [SequentialOffload]
