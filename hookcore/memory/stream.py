"""Groups copied ahead of use, on a stream of their own, into device memory that is allocated once.

Weights lie in page-locked host memory, a group side by side, and are never copied back. The order of use is
learned; whatever is expected next is copied as soon as there is room for it. Two kinds of events are all
that keeps this right: a copy waits for the end of the last use of the memory that it fills, and a use waits
for its copy. The host waits for neither.

Once a pass has shown the order and the times of use, the memory that streaming doesn't need is given to groups
that stay (see `schedule`). These have their home on the device from then on.

Streaming weights for each pass is FlexGen's idea (Sheng et al., 2023), prefetching them in a learned order
FSDP's and DeepSpeed ZeRO-Infinity's (Rajbhandari et al., 2021).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import define

from hookcore.errors import BudgetError
from hookcore.memory.device import DeviceMover
from hookcore.memory.grouping import Group
from hookcore.memory.host import HostMemory
from hookcore.memory.mover import GroupMover
from hookcore.memory.order import LearnedOrder
from hookcore.memory.packed import ALIGNMENT, Packed
from hookcore.memory.schedule import choose_layout
from hookcore.memory.slab import Slab
from hookcore.memory.tensors import by_memory, copy_memory, current_tensors
from hookcore.memory.timing import PassTimes
from hookcore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hookcore.memory.slab import Place
    from hookcore.target import TensorSlot

_CPU = torch.device("cpu")
_AHEAD_OF_A_GUESS = 4  # groups; modules are often registered in another order than they run


@define(eq=False)
class _Load:
    """A copy of a group on its way to the device, or there.

    Attributes:
        packed: What is copied.
        place: Where it goes.
        ready: Recorded after the copy.
        begun: Recorded before the copy, where times are measured.
        used: Recorded at the begin of its use, where times are measured.
    """

    packed: Packed
    place: Place
    ready: Any
    begun: Any = None
    used: Any = None


@define(eq=False)
class _Member:
    """A group and where it is.

    Attributes:
        parameters: Its parameters, as a group for the plain mover.
        buffers: Its buffers, which always stay on the device.
        homes: The device that each parameter came from.
        packed: Its parameters.
        copied: Recorded after its last copy to the device; None before the first.
        in_use: Where it is while it is used, unless it stays or was brought by the plain mover.
        stays: Where it stays, or will once its copy is there.
        is_there: Whether it stays and has been shown there.
    """

    parameters: Group
    buffers: Group
    homes: dict[TensorSlot, torch.device]
    packed: Packed
    copied: Any = None
    in_use: _Load | None = None
    stays: _Load | None = None
    is_there: bool = False


class StreamMover(GroupMover):
    """Streams groups from page-locked host memory to a device that has streams.

    Buffers stay on the device, where calls may change them; so do groups that are held while others come and
    go. While gradients are recorded, nothing is copied ahead and no memory is used again: autograd keeps what
    it needs.

    Args:
        onload_device: Where groups are used.
        budget: Bytes of the device that all weights may take; None for as little as the prefetch needs.
        prefetch: How many groups may be copied ahead of use where there is no budget to fill.
        lock_limit: Bytes of host memory that may be locked; None for a share of what is free.
    """

    def __init__(
        self,
        onload_device: torch.device,
        budget: int | None = None,
        prefetch: int = 1,
        lock_limit: int | None = None,
    ) -> None:
        self._device = onload_device
        self._module: Any = torch.get_device_module(onload_device)
        self._budget = budget
        self._prefetched = prefetch
        self._host = HostMemory(onload_device, lock_limit)
        self._plain = DeviceMover(onload_device, _CPU)
        self._members: dict[Group, _Member] = {}
        self._fixed: dict[Group, int] = {}  # bytes on the device that are not in the slab
        self._order: LearnedOrder[Group] = LearnedOrder(())
        self._slab: Slab | None = None
        self._ahead: dict[Group, _Load] = {}
        self._copying: Any = None  # the stream
        self._computing: Any = None
        self._left: Any = None  # recorded whenever a group has been used
        self._times: PassTimes | None = None
        self._settled: list[_Member] = []  # whose host memory can go once its last copy has ended

    # Between calls

    def attach(self, group: Group, *, resident: bool) -> None:
        """Moves a group's parameters to locked host memory, and its buffers to the device."""
        if resident or any(tensor.is_inference() for slot in group.slots for tensor in current_tensors(slot)):
            self._plain.attach(group, resident=resident)
            self._fixed[group] = group.nbytes if resident else 0
            return
        parameters, buffers = _split(group)
        self._plain.attach(buffers, resident=True)
        try:
            homes = {slot: it[0].device for slot in parameters.slots if (it := current_tensors(slot))}
            packed = self._pack(parameters)
        except BaseException:
            self._plain.detach(buffers)
            raise
        self._fixed[group] = buffers.nbytes
        self._members[group] = _Member(parameters, buffers, homes, packed)

    def detach(self, group: Group) -> None:
        """Moves a group back to the device that it came from, into memory of its own."""
        self._wait_for_device()
        member = self._members.get(group)
        if member is None:
            self._plain.detach(group)
        else:
            _move_apart(member.homes)
            self._plain.detach(member.buffers)
            self._release_host(member)
            del self._members[group]
        del self._fixed[group]
        if not self._members:
            self._slab = self._times = None

    def reset(self) -> None:
        """Forgets the order of use."""
        self._order.forget()

    def report(self, group: Group, *, resident: bool) -> dict[str, int]:
        """Where the bytes of the group lie."""
        here, there = f"resident on {self._device}", f"offloaded on {_CPU}"
        if (member := self._members.get(group)) is None:
            return {here if resident else there: group.nbytes}
        staying = member.parameters.nbytes if member.stays is not None else 0
        return {
            here: member.buffers.nbytes + staying,
            there: member.parameters.nbytes - staying,
        }

    def expose(self, group: Group) -> None:
        """Sees to it that a group's tensors can be changed: no copy reads them, and none has read them."""
        member = self._members.get(group)
        if member is not None and member.copied is not None and not member.is_there:
            member.copied.synchronize()
            if group in self._ahead:
                self._give_back(self._ahead.pop(group))

    # Calls

    def begin(self) -> None:
        """Begins an outermost call.

        Raises:
            BudgetError: The budget is too small.
            torch.OutOfMemoryError: The device has less memory than the budget.
        """
        stream = self._module.current_stream(self._device)
        if self._slab is None:
            self._set_up()
        elif stream != self._computing:
            stream.wait_stream(self._computing)
        self._computing = stream
        self._copying.wait_stream(stream)
        if self._times is not None and self._times.is_known:
            self._learn_layout(self._times)
        self._prefetch()

    def end(self) -> None:
        """Ends an outermost call; what the next one needs first is copied meanwhile."""
        self._order.end_pass()
        if self._times is not None:
            self._times.end_pass()
        for member in [it for it in self._settled if it.copied.query()]:
            self._settled.remove(member)
            self._release_host(member)

    def onload(self, group: Group) -> None:
        """Has the group's parameters hold their values on the device, once its stream gets there."""
        member = self._members.get(group)
        if member is None:
            self._plain.onload(group)
            return
        if member.stays is not None:
            self._show_where_it_stays(member, member.stays)
            return
        if not self._order.note(group):
            self._drop_unexpected(group)
        load = self._load_of(group, member)
        if load is None:
            self._plain.onload(member.parameters)
            return
        self._computing.wait_event(load.ready)
        member.packed.show(load.place.views)
        member.in_use = load
        if self._times is not None:
            load.used = self._times.mark(self._computing)

    def offload(self, group: Group) -> None:
        """Has the group's parameters show host memory again, and copies what is used next."""
        member = self._members.get(group)
        if member is None:
            self._plain.offload(group)
            return
        load, member.in_use = member.in_use, None
        if load is None:
            if member.stays is None:
                self._plain.offload(member.parameters)
            return
        packed, views = member.packed, load.place.views
        changed, replaced = packed.is_changed, packed.replaced(views)
        packed.show_host()
        if changed:
            packed.keep(views)
        for tensor, data in replaced:  # the call gave it other data, as `weight.data = ...` does
            tensor.data = data.to(_CPU)
        self._left.record(self._computing)
        if self._times is not None:
            self._times.use(packed, packed.nbytes, load.used, self._times.mark(self._computing))
        self._give_back(load)
        self._prefetch()

    # How

    def _pack(self, parameters: Group) -> Packed:
        packed = Packed(parameters.slots)
        host = self._host.make(packed.nbytes)
        packed.take(host)
        self._host.lock(host)
        return packed

    def _release_host(self, member: _Member) -> None:
        host, member.packed.host = member.packed.host, None
        if host is not None:
            self._host.release(host)

    def _set_up(self) -> None:
        """Allocates all memory on the device, and decides what stays from the start."""
        sizes = {group: member.packed.nbytes for group, member in self._members.items()}
        spanning = _spanning(sizes)
        passing = [nbytes for group, nbytes in sizes.items() if group not in spanning]
        always = sum(sizes[group] for group in spanning)
        fixed = sum(self._fixed.values())
        least = always + max(passing, default=0)
        if self._budget is None:
            count = self._prefetched + 1
            windows = (sum(passing[at : at + count]) for at in range(len(passing)))
            room = always + max(windows, default=0)
        else:
            room = self._budget - fixed
            if room < least:
                raise BudgetError(
                    f"memory_budget is {format_bytes(self._budget)}, but the weights that have to be on "
                    f"{self._device} at once take {format_bytes(fixed + least)}. The smallest budget that "
                    f"works is {fixed + least} bytes"
                )
        with torch.inference_mode(False):
            nbytes = min(room, sum(sizes.values())) // ALIGNMENT * ALIGNMENT
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._slab = Slab(memory)
        self._order = LearnedOrder(tuple(sizes))
        self._computing = self._module.current_stream(self._device)
        self._copying = self._module.Stream(self._device)
        self._left = self._module.Event()
        if sum(sizes.values()) <= room:
            self._lay_out(sizes)
        else:
            self._lay_out(spanning)
            if self._budget is not None:
                self._times = PassTimes(lambda: self._module.Event(enable_timing=True))

    def _learn_layout(self, times: PassTimes) -> None:
        """Divides memory by what the first pass has shown."""
        self._times = None
        uses = times.uses()
        seen = {use.group for use in uses}
        by_packed = {member.packed: group for group, member in self._members.items()}
        staying = [group for group, member in self._members.items() if member.stays is not None]
        unseen = [
            packed.nbytes
            for packed, group in by_packed.items()
            if packed not in seen and group not in staying
        ]
        room = self._slab.memory.nbytes - sum(self._members[it].packed.nbytes for it in staying)
        layout = choose_layout(uses, room, max(unseen, default=0))
        if layout is not None:
            self._lay_out([*staying, *(by_packed[it] for it in layout.resident if it in by_packed)])

    def _lay_out(self, staying: Iterable[Group]) -> None:
        """Has groups stay, each at its place; what is left of the memory is the ring."""
        self._drop_ahead()
        places = self._slab.divide([self._members[group].packed for group in staying])
        loads = []
        for group in staying:
            member = self._members[group]
            if member.stays is None:
                member.stays = self._new_load(member, places[member.packed])
                loads.append(member.stays)
        self._order.leave_out(set(staying))
        self._copying.wait_stream(self._computing)
        self._copy(loads)

    def _load_of(self, group: Group, member: _Member) -> _Load | None:
        """The copy of a group's values as they are now; None if the plain mover has to bring it."""
        load = self._ahead.pop(group, None)
        is_home = member.packed.is_home
        if load is not None and (torch.is_grad_enabled() or not is_home or member.packed.is_changed):
            self._give_back(load)
            load = None
        if load is None and not torch.is_grad_enabled():
            if not is_home:  # somebody gave a tensor other data, as `weight.data = ...` does
                self._pack_again(member)
            load = self._make_room(member)
            if load is not None:
                self._copy([load])
        return load

    def _make_room(self, member: _Member) -> _Load | None:
        """A place for a group that is needed now; None if even an empty ring is too small for it."""
        start = self._slab.ring.take(member.packed.nbytes)
        if start is None:
            self._drop_ahead()
            start = self._slab.ring.take(member.packed.nbytes)
        return None if start is None else self._new_load(member, start)

    def _new_load(self, member: _Member, start: int) -> _Load:
        place = self._slab.place(member.packed, start)
        if member.copied is None or self._times is not None:
            member.copied = self._module.Event(enable_timing=self._times is not None)
        return _Load(member.packed, place, member.copied)

    def _pack_again(self, member: _Member) -> None:
        """Takes the data that tensors were given into host memory of the group's own."""
        if member.copied is not None:
            member.copied.synchronize()
        self._slab.forget(member.packed)
        self._release_host(member)
        member.packed = self._pack(member.parameters)

    def _prefetch(self) -> None:
        """Begins to copy what is used next, as far as there is room."""
        if torch.is_grad_enabled():
            return
        loads = []
        most = _AHEAD_OF_A_GUESS if self._order.is_guess else len(self._members)
        while (group := self._order.ahead(len(self._ahead))) is not None and group not in self._ahead:
            member = self._members[group]
            if member.in_use is not None or len(self._ahead) >= most:
                break
            start = self._slab.ring.take(member.packed.nbytes)
            if start is None:
                break
            load = self._ahead[group] = self._new_load(member, start)
            loads.append(load)
        if loads:
            self._copy(loads)

    def _copy(self, loads: Iterable[_Load]) -> None:
        """Copies groups to their places, after all use so far of the memory there."""
        copying = self._copying
        copying.wait_event(self._left)
        with self._module.stream(copying):
            for load in loads:
                if self._times is not None:
                    load.begun = self._times.mark(copying)
                load.place.memory.copy_(load.packed.host, non_blocking=True)
                load.ready.record(copying)
                load.packed.note_versions()
                if self._times is not None:
                    self._times.copy(load.packed, load.begun, load.ready)

    def _give_back(self, load: _Load) -> None:
        self._slab.ring.give_back(load.place.start, load.packed.nbytes)

    def _drop_ahead(self) -> None:
        for load in self._ahead.values():
            self._give_back(load)
        self._ahead.clear()

    def _drop_unexpected(self, used: Group) -> None:
        """Keeps, of what was copied ahead, only what is still expected next."""
        expected = {used}
        while (group := self._order.ahead(len(expected) - 1)) in self._ahead and group not in expected:
            expected.add(group)
        for group in self._ahead.keys() - expected:
            self._give_back(self._ahead.pop(group))

    def _show_where_it_stays(self, member: _Member, load: _Load) -> None:
        """Has parameters hold their values where they stay, whatever they were given since."""
        packed, views = member.packed, load.place.views
        if member.is_there:
            if packed.shows(views):
                return
            given = packed.replaced(views)
        else:
            self._computing.wait_event(load.ready)
            given = packed.replaced(views) if packed.is_changed or not packed.is_home else []
            member.is_there = True
            self._settled.append(member)
        packed.show(views)
        for tensor, data in given:
            if data.shape == tensor.shape and data.dtype == tensor.dtype:
                tensor.data.copy_(data)
            else:
                tensor.data = data.to(self._device)

    def _wait_for_device(self) -> None:
        """Waits for all copies, and has the caller's stream come after all use."""
        if self._copying is not None:
            self._copying.synchronize()
            self._module.current_stream(self._device).wait_stream(self._computing)
            self._drop_ahead()
            self._settled.clear()


def _split(group: Group) -> tuple[Group, Group]:
    """Its parameters, and its buffers."""
    parts = [tuple(slot for slot in group.slots if slot.is_buffer == wanted) for wanted in (False, True)]
    return Group(group.name, parts[0], group.holders), Group(group.name, parts[1], ())


def _spanning(groups: Iterable[Group]) -> list[Group]:
    """The groups that a call holds while calls below it hold others."""
    groups = list(groups)
    above: set[str] = set()
    for group in groups:
        for fqn, _ in group.holders:
            while fqn:
                fqn = fqn.rpartition(".")[0]
                above.add(fqn)
    return [group for group in groups if any(fqn in above for fqn, _ in group.holders)]


def _move_apart(homes: Mapping[TensorSlot, torch.device]) -> None:
    """Gives each slot memory of its own on a device; all of them or, if it raises, none."""
    moved = []
    for slot, device in homes.items():
        for tensors in by_memory(current_tensors(slot)):
            moved += zip(tensors, copy_memory(tensors, device)[2], strict=True)
    for tensor, data in moved:
        tensor.data = data
