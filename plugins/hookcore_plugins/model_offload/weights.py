"""The weights of one component: its own, and those that it has in common with others."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from attrs import define, evolve

from hookcore import UnsupportedModelError
from hookcore.memory import Gradients, Group, Recorder, current_tensors, stop_watching, watch
from hookcore_plugins.model_offload.part import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence, Sized

    import torch

    from hookcore import Component, TensorSlot
    from hookcore.memory import Timeline
    from hookcore_plugins.model_offload.link import Link


@define
class OffloadReport:
    """What was moved since the technique was applied or last reset, and the memory that it takes now.

    Weights that several components share count for each that has them copied; where they lie, for the first.

    Attributes:
        calls: Outermost calls of the component, and calls of it within those of others.
        copies: Copies of its weights to the device.
        moved_bytes: Bytes of these copies.
        hits: Calls that found all weights there, or on their way.
        on_demand: Calls for which weights had to be copied.
        resident_bytes: Bytes on the device now: weights, and buffers, which stay.
        locked_bytes: Bytes of host memory that are page-locked.
        timed_calls: Outermost calls that `record_timeline` timed.
        stalled_seconds: How long computing waited for copies in these; None if there were none.
    """

    calls: int = 0
    copies: int = 0
    moved_bytes: int = 0
    hits: int = 0
    on_demand: int = 0
    resident_bytes: int = 0
    locked_bytes: int = 0
    timed_calls: int = 0
    stalled_seconds: float | None = None


class ComponentWeights:
    """A component's weights, which come when it is called.

    Args:
        component: The component. Nothing is changed before `attach`.
        device: Where it runs.
        link: The way there.

    Attributes:
        name: The component's name.
        slots: All of its weights and buffers.
        parts: Those that go together, by its slots.
        homes: The parts that it is the first component to have.
        calls: How many of its calls are under way.
        needed: Bytes of the device that a call took besides what was there when it began; None before the
            first one. Never too few, as it is read off the peak so far.
        recorder: Times its calls; None for nothing.
        is_trained: Whether gradients have been computed for it.
    """

    def __init__(self, component: Component, device: torch.device, link: Link) -> None:
        self.name = component.name
        self.slots = component.slots
        self.parts: dict[TensorSlot, Part] = {}
        self.homes: frozenset[Part] = frozenset()
        self.calls = 0
        self.needed: int | None = None
        self.recorder: Recorder | None = None
        self._began: Any = None  # an event at the beginning of an outermost call that is timed
        self._link = link
        self._label = component.label
        self._device = device
        self._counts = OffloadReport()
        self.is_trained = False
        self._gradients = Gradients(component.slots, self._train)
        # To be watched, each alone:
        self._groups = {Group(slot.name, (slot,), ()): slot for slot in component.slots}

    def homes_of(self, known: dict[int, TensorSlot]) -> list[tuple[TensorSlot, TensorSlot]]:
        """Its slots, each with the one that stands for it: an earlier component's if it has that tensor, too.

        Args:
            known: The slots of earlier components that stand for others, by identity of their tensors.

        Raises:
            UnsupportedModelError: A tensor is tied to one of another component in a way that is none there.
        """
        found = []
        for slot in self.slots:
            homes = {known.get(id(tensor)) for tensor in slot.tensors}
            if len(homes) > 1:
                raise UnsupportedModelError(
                    f"{self._label(slot.name)!r} is a weight of another component, too, but only here tied "
                    "to a further one that shares its memory. Have all of them be one parameter"
                )
            found.append((slot, homes.pop() or slot))
        return found

    @property
    def all_parts(self) -> list[Part]:
        """Its parts, each once."""
        return list(dict.fromkeys(self.parts.values()))

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without buffers."""
        return sum(part.nbytes for part in self.all_parts)

    @property
    def is_loaded(self) -> bool:
        """Whether all of it takes memory on the device, or will when its copy is there."""
        return all(part.is_loaded for part in self.all_parts)

    @property
    def is_locked(self) -> bool:
        """Whether the device copies it without the host's waiting."""
        return all(part.is_locked for part in self.all_parts)

    @property
    def is_wanted(self) -> bool:
        """Whether any of it is on the device, or comes there, for its sake."""
        return any(self.name in part.wanted_by and part.is_loaded for part in self.all_parts)

    def attach(self, calls: Sized, before_read: Callable[[Group], None]) -> None:
        """Move parameters to locked host memory and buffers to the device, and watches reads."""
        done: list[Part] = []
        try:
            for part in self.all_parts:
                part.attach()
                done.append(part)
        except BaseException:
            for part in reversed(done):
                part.detach()
            raise
        watch(list(self._groups), calls, before_read)

    def detach(self) -> None:
        """Move all to where it came from, but what another component needs to host memory."""
        for part in self.all_parts:
            part.wanted_by.discard(self.name)
            part.turn_off()
        done: list[Part] = []
        try:
            for part in self.all_parts:
                part.detach()
                done.append(part)
        except BaseException:
            for part in reversed(done):
                part.attach()
            raise
        stop_watching(list(self._groups))
        self._gradients.stop()

    def _train(self) -> None:
        """Take the component off between calls from now on, so that optimizers find it on the host."""
        self.is_trained = True
        if not self.calls:
            self.turn_off()

    def watch_gradients(self) -> None:
        """Keep gradients, from now on, where the parameters are."""
        self._gradients.watch()

    def begin_copy(self) -> None:
        """Begin to copy what isn't there to the device.

        Raises:
            torch.OutOfMemoryError: The device has no room for it.
        """
        for part in self.all_parts:
            part.wanted_by.add(self.name)
            if not part.is_loaded:
                part.begin_copy()
                self._count_copy(part)

    def turn_on(self, parts: Iterable[Part] | None = None) -> bool:
        """Show the device's memory in its tensors, for what is computed from now on.

        Args:
            parts: Only these; None for all.

        Returns:
            Whether any of it had to be copied.

        Raises:
            torch.OutOfMemoryError: The device has no room for it.
        """
        copied = False
        for part in self.all_parts if parts is None else parts:
            part.wanted_by.add(self.name)
            if part.turn_on():
                copied = True
                self._count_copy(part)
        return copied

    def count_call(self, *, copied: bool) -> None:
        """Count a call, for which weights had to be copied or not."""
        self._counts.calls += 1
        self._counts.on_demand += copied
        self._counts.hits += not copied

    def want(self) -> None:
        """Mark what is there to stay when other components are offloaded."""
        for part in self.all_parts:
            part.wanted_by.add(self.name)

    def turn_off(self) -> None:
        """Offload it, but for what another component wants."""
        for part in self.all_parts:
            part.wanted_by.discard(self.name)
            if not part.wanted_by:
                part.turn_off()

    def invalidate(self, group: Group) -> None:
        """Invalidate copies of a tensor that somebody reads, and may change, between calls."""
        self.part_of(group).invalidate(current_tensors(group.slots[0]))

    def part_of(self, group: Group) -> Part:
        """Return where a tensor is."""
        return self.parts[self._groups[group]]

    def parts_of(self, slots: Sequence[TensorSlot]) -> list[Part]:
        """Return where tensors are."""
        return list(dict.fromkeys(self.parts[slot] for slot in slots))

    def report(self) -> dict[str, int]:
        """Bytes by where they lie, of what it is the first component to have."""
        found: dict[str, int] = {}
        for part in self.homes:
            where = f"on {self._device}" if part.is_on else "offloaded on cpu"
            for label, nbytes in ((where, part.nbytes), (f"resident on {self._device}", part.staying)):
                if nbytes:
                    found[label] = found.get(label, 0) + nbytes
        return found

    def run_report(self) -> OffloadReport:
        """Return what was counted since the last reset, with the bytes that are taken now."""
        there = [part.nbytes for part in self.homes if part.is_loaded]
        return evolve(
            self._counts,
            resident_bytes=sum(there) + sum(part.staying for part in self.homes),
            locked_bytes=sum(part.locked for part in self.homes),
        )

    def begin_timing(self) -> None:
        """Take down the beginning of an outermost call, if it is timed."""
        if self.recorder is not None:
            self._began = self._link.mark(self._link.stream)

    def end_timing(self) -> None:
        """Take down its end."""
        if self._began is not None:
            self._link.add("compute", self.name, self._began, self._link.stream)
            self._counts.timed_calls += 1
            self._began = None

    @contextlib.contextmanager
    def recording(self, timeline: Timeline) -> Iterator[None]:
        """Time copies, calls and stalls until the end of the block, where copies run beside computing."""
        if not self._link.copies_ahead:
            yield
            return
        recorder = self.recorder = Recorder(self._device)
        timeline.recorders.append(recorder)
        try:
            yield
        finally:
            self.recorder = self._link.recorder = None
            recorder.close()
            self._counts.stalled_seconds = (self._counts.stalled_seconds or 0.0) + recorder.stalled

    def reset(self) -> None:
        """Begin to count anew."""
        self._counts = OffloadReport()

    def _count_copy(self, part: Part) -> None:
        self._counts.copies += 1
        self._counts.moved_bytes += part.nbytes


def divide(components: Sequence[ComponentWeights], device: torch.device, link: Link) -> None:
    """Give components their parts: one for the weights of each set of components that share them.

    Args:
        components: Those that run on one device, before any of them is attached.
        device: Where they run.
        link: The way there.
    """
    known: dict[int, TensorSlot] = {}
    users: dict[TensorSlot, list[str]] = {}
    homes: list[list[tuple[TensorSlot, TensorSlot]]] = []
    for component in components:
        homes.append(component.homes_of(known))
        for home in dict.fromkeys(home for _, home in homes[-1]):
            users.setdefault(home, []).append(component.name)
            known |= dict.fromkeys(map(id, home.tensors), home)
    by_users: dict[tuple[str, ...], list[TensorSlot]] = {}
    for home, names in users.items():
        by_users.setdefault(tuple(names), []).append(home)
    made = {names: Part(" and ".join(names), slots, device, link) for names, slots in by_users.items()}
    for component, slots in zip(components, homes, strict=True):
        component.parts = {slot: made[tuple(users[home])] for slot, home in slots}
        component.homes = frozenset(part for names, part in made.items() if names[0] == component.name)
