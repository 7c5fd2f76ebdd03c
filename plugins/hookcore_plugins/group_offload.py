"""Group offloading: weights lie on one device and are copied to another, group by group, for their calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from attrs import field, frozen

from hookcore import Phase, Skipped, Technique, hookimpl, parse_device
from hookcore.memory import (
    DeviceMover,
    Group,
    Placement,
    check_movable,
    find_blocks,
    is_on,
    leaf_units,
    make_groups,
    merge_neighbours,
    slots_below,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from attrs import Attribute

    from hookcore import Binding, Component

OffloadType = Literal["block_level", "leaf_level"]


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"exclude_modules has {name!r}, expected FQNs of modules, such as 'blocks.0'")
    return names


def _device(value: torch.device | str | int) -> torch.device:
    device = parse_device(value)
    if device.type == "meta":
        raise ValueError(
            "weights cannot be moved to 'meta', which holds no data; name a device such as 'cuda'"
        )
    return device


@frozen
class GroupOffload(Technique):
    """Keeps weights on the offload device, and copies each group to the onload device for its calls.

    The options are those of diffusers' `apply_group_offloading`.

    Attributes:
        onload_device: Where the model computes; inputs are moved there, and outputs stay there.
        offload_device: Where the weights lie between their calls.
        offload_type: "block_level": a group is one or more of the model's repeated blocks, and what is
            outside of blocks stays for the whole call. "leaf_level": a group is one layer, which takes the
            least memory and the most copies.
        num_blocks_per_group: How many neighbouring blocks make a group, at block level.
        exclude_modules: FQNs of modules that stay on the onload device with all that is in them.
    """

    name: ClassVar[str] = "group_offload"
    phase: ClassVar[Phase] = Phase.PLACE
    replans: ClassVar[bool] = True

    onload_device: torch.device = field(converter=_device)
    offload_device: torch.device = field(default=torch.device("cpu"), converter=_device, kw_only=True)
    offload_type: OffloadType = field(default="block_level", kw_only=True)
    num_blocks_per_group: int = field(default=1, kw_only=True)
    exclude_modules: tuple[str, ...] = field(default=(), converter=_names, kw_only=True)

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

    def bind(self, component: Component) -> Iterator[Binding | Skipped]:
        """Lists the hooks at the component's entries and at the calls of all blocks or leaves.

        Raises:
            PlanError: A tensor has no data, or an excluded module doesn't exist.
            UnsupportedModelError: A tensor is of a kind that cannot be moved.
        """
        if not component.slots:
            yield Skipped("", "it has no parameters or buffers")
            return
        staying = slots_below(component, self.exclude_modules)
        kept = set(staying)
        moving = [slot for slot in component.slots if slot not in kept]
        here = self.onload_device
        check_movable(component, moving)
        check_movable(
            component, [it for it in staying if not all(is_on(tensor, here) for tensor in it.tensors)]
        )
        if self.offload_type == "block_level":
            units = merge_neighbours(find_blocks(component), self.num_blocks_per_group)
        else:
            units = leaf_units(component)
        resident = [Group("excluded", staying, ())] if staying else []
        mover = DeviceMover(self.onload_device, self.offload_device)
        groups = make_groups(component, units, moving)
        yield from Placement(component, groups, resident, mover, self.onload_device).bindings()


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Brings group offloading."""
    return [GroupOffload]
