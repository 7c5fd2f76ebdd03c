"""Who is on the device: the component that runs, and the next one where there is room for both."""

from __future__ import annotations

import contextlib
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING

import torch

from hookcore import BudgetError, ConcurrentCallError, format_bytes
from hookcore_plugins.model_offload.link import Link
from hookcore_plugins.model_offload.order import ComponentOrder
from hookcore_plugins.model_offload.weights import divide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hookcore.memory import Group
    from hookcore_plugins.model_offload.part import Part
    from hookcore_plugins.model_offload.weights import ComponentWeights

_RUN_END = "the end of the run"
"""What follows the last component in the order of those whose run ends: no other is to come early then."""


class Coordinator:
    """Brings components for their calls and drops them when another one runs.

    While a call is under way nothing goes off: what is called or read inside of it comes besides.

    The next component comes while this one computes if a budget has room for both. Without a budget it comes
    if this one has run before, and would have room for what it took then.

    Args:
        device: Where components run.
        sequence: The order in which they are expected to run at first.
        budget: Bytes that all their weights together may take; None for what is free.
        goes_at_once: The component that goes off after its own call; None for none.
        at_run_end: Has a function be called when a run of all of them ends, and returns what undoes that;
            None if nobody tells.

    Attributes:
        link: The way to the device.
    """

    def __init__(
        self,
        device: torch.device,
        sequence: Sequence[str],
        budget: int | None,
        goes_at_once: str | None,
        at_run_end: Callable[[Callable[[], object]], Callable[[], object]] | None = None,
    ) -> None:
        self.link = Link(device)
        self._device = device
        self._budget = budget
        self._goes_at_once = goes_at_once
        self._at_run_end = at_run_end
        self._stop_asking: Callable[[], object] | None = None
        ends = at_run_end is not None and sequence
        self._order = ComponentOrder([*sequence, _RUN_END] if ends else sequence)
        # A model that nobody else keeps goes away, whatever becomes of those that it ran with.
        self._attached: weakref.WeakValueDictionary[str, ComponentWeights] = weakref.WeakValueDictionary()
        self._planned: weakref.WeakValueDictionary[str, ComponentWeights] = weakref.WeakValueDictionary()
        self._calls: list[ComponentWeights] = []
        self._before = 0  # bytes allocated when the outermost call began
        self._lock = threading.RLock()

    def plan(self, weights: ComponentWeights) -> None:
        """Plan for a component that may be attached.

        Raises:
            UnsupportedModelError: It shares weights with another one in a way that cannot be kept.
        """
        self._planned[weights.name] = weights
        divide(list(self._planned.values()), self._device, self.link)

    def needs(self, weights: ComponentWeights) -> dict[str, int]:
        """Return what a component's buffers take on the device; the first one says, too, what they share.

        This is the largest component, or a budget. Without one, the next component takes what is free.

        Raises:
            BudgetError: The budget is too small for a component.
        """
        planned = list(self._planned.values())
        nbytes = sum(part.staying for part in weights.homes)
        if weights is planned[0]:
            parts = _parts_of(planned)
            size = {part: part.size for part in parts}
            sizes = {it: sum(size[part] for part in it.all_parts) for it in planned}
            largest = max(planned, key=sizes.__getitem__)
            staying = sum(part.staying for part in parts)
            self._check_budget(largest, sizes[largest] + staying)
            room = sizes[largest] if self._budget is None else self._budget - staying
            nbytes += min(sum(size.values()), room)
        return {str(self._device): nbytes}

    def attach(self, weights: ComponentWeights) -> None:
        """Take a component in."""
        with self._lock:
            weights.attach(self._calls, partial(self._before_read, weights))
            self._attached[weights.name] = weights
            if self._at_run_end is not None and self._stop_asking is None:
                self._stop_asking = self._at_run_end(self._end_run)

    def detach(self, weights: ComponentWeights) -> None:
        """Let a component go, with its weights where they came from."""
        with self._lock:
            weights.detach()
            del self._attached[weights.name]
            if not self._attached and self._stop_asking is not None:
                self._stop_asking()
                self._stop_asking = None

    def reset(self, weights: ComponentWeights) -> None:
        """Forget in which order components ran, and what a component counted."""
        with self._lock:
            self._order.forget()
            weights.reset()

    def offload(self, weights: ComponentWeights) -> None:
        """Offload a component.

        Raises:
            ConcurrentCallError: It is being called.
        """
        with self._lock:
            if weights.calls:
                raise ConcurrentCallError(
                    f"cannot offload {weights.name or 'the model'!r} during one of its calls. Do it after "
                    "the call has returned"
                )
            weights.turn_off()

    def enter(self, weights: ComponentWeights, parts: Sequence[Part]) -> None:
        """Begin a call of a component.

        Args:
            weights: The component's.
            parts: Those that are needed if this is within another call.

        Raises:
            torch.OutOfMemoryError: The device has no room for it.
        """
        with self._lock:
            if not self._calls:
                self.link.recorder = weights.recorder
            copied = weights.turn_on(parts) if self._calls else self._bring_alone(weights)
            if torch.is_grad_enabled():
                weights.watch_gradients()
            if not self._calls:
                weights.begin_timing()
            # What calls a layer that is another component's, too, does not call that one.
            if not weights.calls and (not self._calls or len(parts) == len(weights.all_parts)):
                weights.count_call(copied=copied)
            weights.calls += 1
            self._calls.append(weights)

    def leave(self, weights: ComponentWeights) -> None:
        """End a call, whichever way it ended."""
        with self._lock:
            weights.calls -= 1
            self._calls.remove(weights)
            if self._calls:
                return
            weights.end_timing()
            if self.link.copies_ahead:
                weights.needed = self.link.peak - self._before
            if weights.name == self._goes_at_once or weights.is_trained:
                weights.turn_off()

    # How it is done

    def _end_run(self) -> None:
        """Offload all components, unless this run was only a part of a call."""
        with self._lock:
            if not self._calls:
                self._order.note(_RUN_END)
                for weights in list(self._attached.values()):
                    weights.turn_off()

    def _bring_alone(self, weights: ComponentWeights) -> bool:
        """Bring a component, and offload all others but the one that comes next, if there is room for it.

        Returns:
            Whether any of it had to be copied.
        """
        self._order.note(weights.name)
        weights.want()
        following = self._following(weights)
        for other in self._others(weights):
            if other is not following:
                other.turn_off()
        if following is not None and not weights.is_loaded and not self._fits(weights, following):
            following.turn_off()
        try:
            copied = weights.turn_on()
        except torch.OutOfMemoryError:
            if following is None or not following.is_wanted:
                raise
            following.turn_off()
            copied = weights.turn_on()
        if following is not None:
            self._bring_ahead(weights, following)
        if self.link.copies_ahead:
            self._before = self.link.allocated
        return copied

    def _bring_ahead(self, weights: ComponentWeights, following: ComponentWeights) -> None:
        """Begin to copy the next component if there is room; drop it if there no longer is."""
        if not self._fits(weights, following):
            following.turn_off()
        elif not following.is_loaded and following.is_locked:
            with contextlib.suppress(torch.OutOfMemoryError):  # it comes when it is called, then
                following.begin_copy()

    def _following(self, weights: ComponentWeights) -> ComponentWeights | None:
        """The component that is to come while this one runs, if there is room."""
        expected = self._order.expected
        if expected is None or not self.link.copies_ahead or weights.name == self._goes_at_once:
            return None
        following = self._attached.get(expected)
        return None if following is weights else following

    def _others(self, weights: ComponentWeights) -> Iterator[ComponentWeights]:
        return (other for other in list(self._attached.values()) if other is not weights)

    def _fits(self, weights: ComponentWeights, following: ComponentWeights) -> bool:
        """Return whether there is room for a component besides the one that runs."""
        parts = _parts_of((weights, following))
        if self._budget is not None:
            return sum(part.nbytes for part in parts) + self._staying() <= self._budget
        if weights.needed is None:
            return False
        missing = sum(part.nbytes for part in parts if not part.is_loaded)
        return weights.needed + missing <= self.link.room

    def _check_budget(self, weights: ComponentWeights, least: int) -> None:
        if self._budget is not None and least > self._budget:
            raise BudgetError(
                f"memory_budget is {format_bytes(self._budget)}, but {weights.name or 'the model'!r} and all "
                f"buffers together take {format_bytes(least)}. The smallest budget with which it runs is "
                f"{least} bytes"
            )

    def _staying(self) -> int:
        return sum(part.staying for part in _parts_of(self._attached.values()))

    def _before_read(self, weights: ComponentWeights, group: Group) -> None:
        """Make a tensor right for whoever reads it outside of its component's calls."""
        if weights.calls:
            return
        with self._lock:
            if self._calls:
                weights.turn_on([weights.part_of(group)])
            weights.invalidate(group)


def _parts_of(components: Iterable[ComponentWeights]) -> list[Part]:
    """The parts of components, each once."""
    return list(dict.fromkeys(part for it in components for part in it.all_parts))
