"""Group offloading: weights lie on one device and are copied to another, group by group, for their calls."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from attrs import field, frozen

from hookcore import (
    Phase,
    Skipped,
    Technique,
    hookimpl,
    parse_bytes,
    parse_module_names,
    parse_onload_device,
)
from hookcore.memory import (
    DeviceMover,
    GroupMover,
    StreamMover,
    Together,
    find_blocks,
    has_streams,
    leaf_units,
    merge_neighbours,
    moving_and_staying,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attrs import Attribute

    from hookcore import Binding, Component

OffloadType = Literal["auto", "block_level", "leaf_level"]


_LAYERS_AHEAD = 3  # one is seldom enough: neighbours differ in how long they compute and copy


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
class GroupOffload(Technique):
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
        prefetch: How many groups are copied ahead where there is no budget to fill; None for one, or a few
            where it is "auto".
        memory_budget: Bytes of the device that all weights together may take, as a number, as text such as
            "6GiB", or as a share of what is free (0.5). None for as little as the prefetch needs.
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

    def bind(self, component: Component) -> Iterator[Binding | Skipped]:
        """Lists the hooks at the component's entries and at the calls of all blocks or leaves.

        Raises:
            PlanError: A tensor has no data, or an excluded module doesn't exist.
            BudgetError: The budget is less than one group and all that stays need.
            UnsupportedModelError: A tensor is of a kind that cannot be moved.
        """
        if not component.slots:
            yield Skipped("", "it has no parameters or buffers")
            return
        here = self.onload_device
        moving, resident = moving_and_staying(component, self.exclude_modules, here)
        by_blocks = self.offload_type == "block_level" or (self.offload_type == "auto" and not self._streams)
        if by_blocks:
            units = merge_neighbours(find_blocks(component), self.num_blocks_per_group)
        else:
            units = leaf_units(component)
        together = Together.of(component, self)
        placement = together.place(
            component,
            units,
            moving,
            resident=resident,
            make_mover=partial(self._mover, 1 if component.wholes else _LAYERS_AHEAD),
            onload_device=here,
        )
        if self.memory_budget is not None:
            placement.mover.needs()  # raises if that is more
        yield from placement.bindings()

    def _mover(self, layers_ahead: int) -> GroupMover:
        if not self._streams:
            return DeviceMover(self.onload_device, self.offload_device)
        ahead = layers_ahead if self.offload_type == "auto" else 1
        if self.prefetch is not None:
            ahead = self.prefetch
        return StreamMover(self.onload_device, self._budget, ahead, 0 if self.low_cpu_mem_usage else None)

    @property
    def _budget(self) -> int | None:
        if isinstance(self.memory_budget, float):
            free, _ = torch.get_device_module(self.onload_device).mem_get_info(self.onload_device)
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
    """Brings group offloading."""
    return [GroupOffload]
