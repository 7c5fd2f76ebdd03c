"""Device memory that the components of a target have in turn, within one budget.

Components of a pipeline mostly run one after another. So there is one engine for all of them, and whichever
runs has the memory: what others had copied ahead goes, and what they keep there goes as far as it is in the
way. Nothing is copied back, as all weights have their home in a store.

Where calls repeat in rounds (a denoiser in its loop; a ControlNet and a denoiser in turn), what stays is
chosen for the whole round, as if it were one pass.

A single component has its memory for itself. What stays of it then has its home on the device.

An exception may come at any moment: the device fails, or somebody interrupts the program. What was under way
then is not mended. `is_sound` is set only when nothing is, and a call that finds it unset gives all memory
back and begins anew, from the stores.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from hookcore.errors import ConcurrentCallError
from hookcore.guard import CallLock, Turn, current_turn
from hookcore.memory.planning.budget_split import split_budget
from hookcore.memory.planning.call_cycle import CallCycle
from hookcore.memory.planning.pool_layout import choose_layout
from hookcore.memory.planning.schedule import Use

_COMFORT = 2  # of the largest group; one is copied while another is used

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hookcore.memory.device.copy_engine import CopyEngine, Transfer
    from hookcore.memory.device.flat_group import FlatGroup
    from hookcore.memory.device.stream_mover import StreamMover
    from hookcore.memory.device.timeline import Recorder


@frozen(eq=False)
class _Kept:
    """What stays on the device while a round repeats.

    Attributes:
        groups: Each by the number of its mover and its own there.
        large: Bytes from which others lie at the end of what is left.
    """

    groups: tuple[tuple[int, int], ...]
    large: int | None


def with_index(device: torch.device) -> torch.device:
    """The device, with its number."""
    if device.index is not None:
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


class DevicePool:
    """Device memory for weights, and whose calls use it.

    Args:
        device: Where it is.
        budget: Bytes that all weights may take; None for as little as the prefetch needs.

    Attributes:
        device: As given.
        budget: Likewise.
        engine: Copies there; None before the first call, and when what it is for has changed.
        is_shared: Whether several movers use it.
        is_sound: Whether what is noted of the device is true; not while it changes, nor when that has failed.
        left: What calls used of memory in which nothing is sure any more, while the device may use it.
        last: The number of the mover that it was used by last.
    """

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        self.device = with_index(device)
        self.budget = budget
        self.engine: CopyEngine | None = None
        self.is_shared = False
        self.is_sound = True
        self.left: list[Transfer] = []
        self.last = -1
        # A model that nobody else keeps goes away, whatever becomes of those that it ran with.
        self._expecting: weakref.WeakValueDictionary[str, StreamMover] = weakref.WeakValueDictionary()
        self._movers: weakref.WeakValueDictionary[int, StreamMover] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._running: list[tuple[StreamMover, Any]] = []  # with the streams that compute, innermost last
        self._is_outdated = False
        self._rounds: CallCycle[int] = CallCycle()
        self._kept: dict[tuple[int, ...], _Kept | None] = {}  # by round
        self._chosen: _Kept | None = None  # what the memory is divided by now
        self._lock = CallLock()
        self._turn = Turn(None)  # a call's that nobody has taken a turn for

    # Between calls

    def number(self) -> int:
        """A number for a mover."""
        return next(self._numbers)

    def expect(self, component: str, mover: StreamMover) -> None:
        """Note which mover a component will have."""
        self._expecting[component] = mover

    def needs(self, mover: StreamMover) -> dict[str, int]:
        """Return what the first call will allocate for all components; the first mover says it.

        Raises:
            BudgetError: The budget is too small.
        """
        movers = list(dict.fromkeys(self._expecting.values()))
        owns = [it.own for it in movers]
        shares = [own.expected_share() for own in owns]
        allotment = split_budget(shares, budget=self.budget, device=self.device)
        taken = allotment.ring
        for own, share in zip(owns, shares, strict=True):
            taken += share.fixed + own.expected_staying_bytes(allotment.staying)
        return {str(self.device): taken} if mover is movers[0] else {}

    def register(self, mover: StreamMover) -> None:
        """Take a mover in, which has groups now."""
        self._movers[mover.number] = mover

    def unregister(self, mover: StreamMover) -> None:
        """Let a mover go, which has no groups any more."""
        self._movers.pop(mover.number, None)

    def dissolve(self) -> None:
        """Give the memory back, since what it is for changes; during a call, when that has ended.

        Raises:
            ConcurrentCallError: Another thread calls a component that has its weights there.
        """
        if self.engine is None and self.is_sound:
            return
        with self._changing():
            if self._running:
                if self.engine is not None:
                    self.engine.synchronize()
                self._is_outdated = True
            else:
                self._discard()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Keep other threads from calling or changing anything meanwhile."""
        turn = Turn(get_ident())
        try:
            if not (self._lock.is_ours or self._lock.take(turn)):
                raise ConcurrentCallError(
                    "cannot change what is offloaded while another thread calls a component that shares its "
                    "memory on the device. Do it after the call has returned"
                )
            if turn is self._lock.turn:
                self._running.clear()  # of calls that an interrupt has ended
            yield
        finally:
            turn.thread = None

    def _discard(self) -> None:
        """Give all memory on the device back, whatever is there; all weights are in their stores."""
        self.is_sound = False
        if self.engine is not None:
            self.engine.end()
        for mover in self._movers.values():
            mover.discard()
        self.engine = self._chosen = None
        self._kept.clear()
        self.left.clear()
        self.is_sound = True

    def forget(self) -> None:
        """Forget in which order components were called."""
        self._rounds.forget()
        self._kept.clear()

    # Calls

    def enter(self, mover: StreamMover) -> None:
        """Begin an outermost call of a component; it may be within a call of another one.

        Raises:
            BudgetError: The budget is too small.
            ConcurrentCallError: Another thread calls a component that has its weights there.
            torch.OutOfMemoryError: The device has less memory than the budget.
        """
        if not self._lock.is_ours:
            turn = current_turn()
            if turn is None:
                turn = self._turn = Turn(get_ident())
            if not self._lock.take(turn):
                raise ConcurrentCallError(
                    f"called {mover.what!r} while another thread calls a component that shares its memory on "
                    "the device. Put a lock round the calls, or give each thread a pipeline of its own"
                )
            self._running.clear()  # of calls that an interrupt has ended
        stream = None
        try:
            if self.is_sound or not self._running:
                self.is_sound, was_sound = False, self.is_sound
                engine = self._begin(mover, anew=not was_sound)
                engine.timeline = mover.recorder
                stream = engine.stream
                self.is_sound = True
        except BaseException:
            if not self._running:
                self._turn.thread = None
            raise
        self._running.append((mover, stream))

    def leave(self, mover: StreamMover) -> None:
        """End a call, if it had begun."""
        if not self._running or self._running[-1][0] is not mover:
            return
        self._running.pop()
        engine = self.engine
        if engine is not None and self.is_sound:
            if self._running:
                outer, stream = self._running[-1]
                self.is_sound = False
                engine.begin(stream)
                engine.timeline = outer.recorder
                self.is_sound = True
            else:
                mover.end_measuring(engine)
        if not self._running:
            self._turn.thread = None

    def stop_recording(self, recorder: Recorder) -> None:
        """Stop using a recorder."""
        if self.engine is not None and self.engine.timeline is recorder:
            self.engine.timeline = None

    @property
    def is_sure(self) -> bool:
        """Whether `following` may be relied on."""
        return not self.is_shared or self._rounds.is_sure

    def following(self, mover: StreamMover) -> StreamMover | None:
        """Return the mover whose weights are needed next, perhaps the same one; None if they have no room."""
        if not self.is_shared or len(self._running) > 1:
            return mover
        expected = self._rounds.expected
        if expected in (None, mover.number):
            return mover
        found = self._movers.get(expected)
        if found is None or not self._suits(found, _COMFORT if self._chosen is None else 1):
            return None
        return found

    def drop_ahead(self) -> None:
        """Give up what was copied ahead."""
        for mover in self._movers.values():
            mover.prefetcher.drop_ahead()

    def evict_one(self) -> bool:
        """Give up one group that is kept; False if there is none that isn't in use."""
        kept = self.allocator.kept
        flat = next(reversed(kept), None)
        if flat is None or not all(mover.prefetcher.evict([flat]) for mover in self._movers.values()):
            return False
        self.allocator.drop(flat)
        return True

    # How it is done

    @property
    def allocator(self) -> Any:
        """The engine's memory."""
        assert self.engine is not None  # noqa: S101 -- asked during calls only
        return self.engine.allocator

    def _begin(self, mover: StreamMover, *, anew: bool) -> CopyEngine:
        outermost = not self._running
        if outermost and (self.engine is None or self._is_outdated or anew):
            self._discard()
            self.is_sound = False
            self.register(mover)
            self.engine = self._make_engine()
        assert self.engine is not None  # noqa: S101 -- a running call has made it
        self.engine.begin(self.engine.stream_of_caller)
        self.allocator.collect()
        self.last = mover.number
        if outermost:
            self._rounds.note(mover.number)
            for other in self._movers.values():
                if other is not mover:
                    other.prefetcher.drop_ahead()
        mover.drop_exposed()
        if outermost:
            if not mover.begin_measuring(self.engine) and not self.is_shared:
                mover.learn_layout()
            if self.is_shared:
                self._divide(mover)
        return self.engine

    def _make_engine(self) -> CopyEngine:
        """Allocate the memory, and decides what stays from the start."""
        movers = list(self._movers.values())
        self._is_outdated = False
        self.is_shared = len(movers) > 1
        shares = [mover.own.share() for mover in movers]
        allotment = split_budget(shares, budget=self.budget, device=self.device)
        per_group = allotment.per_group or any(mover.per_group for mover in movers)
        for mover, share in zip(movers, shares, strict=True):
            ring = allotment.ring + (0 if self.is_shared else share.always)
            mover.move_in(
                allotment.staying, share, lingers=not per_group, one_by_one=not share.has_room_for_two(ring)
            )
        coming = [flat for mover in movers for flat in mover.coming]
        return movers[0].store.make_engine(self.device, allotment.ring, coming, per_group=per_group)

    def _suits(self, mover: StreamMover, times: int = _COMFORT) -> bool:
        """Whether a mover's groups can come and go beside what is kept, so many of the largest at once."""
        kept = self.allocator.kept
        if not all(flat in kept for flat in mover.held):
            return False
        return self._beside(kept) >= min(times * mover.largest, self._beside(mover.held))

    def _beside(self, kept: Iterable[FlatGroup]) -> int:
        """Bytes that are left beside groups that are kept."""
        size: int = self.allocator.size
        return size - sum(flat.nbytes for flat in kept)

    def _divide(self, mover: StreamMover) -> None:
        """Make room for a mover's groups."""
        allocator = self.allocator
        chosen = self._choose()
        if chosen is not None:
            wanted = self._packed(chosen)
            if self._chosen is chosen and len(allocator.kept) == len(wanted) and not allocator.unkept(wanted):
                return
        elif self._suits(mover):
            self._chosen = None
            return
        else:
            wanted = dict.fromkeys([*self._keepable(mover), *mover.held])
        self._chosen = chosen
        self.drop_ahead()
        leaving = allocator.unkept(wanted)
        for other in self._movers.values():
            other.prefetcher.evict(leaving)
        allocator.keep(wanted, None if chosen is None else chosen.large)

    def _keepable(self, mover: StreamMover) -> list[FlatGroup]:
        """Return what may still be kept, of those that are, while this mover runs."""
        left = self._beside(mover.held)
        left -= min(_COMFORT * mover.largest, left)
        found = []
        for flat in self.allocator.kept:
            if flat not in mover.held:
                left -= flat.nbytes
                if left < 0:
                    break
            found.append(flat)
        return found

    def _choose(self) -> _Kept | None:
        """Return what stays while the last round repeats; None if that isn't known."""
        numbers = self._rounds.round
        if not numbers or self.budget is None or any(number not in self._movers for number in numbers):
            return None
        key = min(numbers[at:] + numbers[:at] for at in range(len(numbers)))
        if key not in self._kept:
            movers = [self._movers[number] for number in key]
            if not all(mover.is_measured for mover in movers):
                return None
            self._kept[key] = self._choose_for(movers)
        return self._kept[key]

    def _packed(self, chosen: _Kept) -> dict[FlatGroup, None]:
        """Return what stays, by what it is now."""
        every = {number: self._movers[number].all_packed for number, _ in chosen.groups}
        return dict.fromkeys(every[number][index] for number, index in chosen.groups)

    def _choose_for(self, movers: Sequence[StreamMover]) -> _Kept | None:
        """Choose what stays in a round, in which these run one after another."""
        different = list(dict.fromkeys(movers))
        place = {flat: (it.number, at) for it in different for at, flat in enumerate(it.all_packed)}
        held = {flat: None for it in different for flat in it.held}
        uses = [use for it in movers for use in it.measured_uses()]
        unseen = {flat for it in different for flat in it.coming} - held.keys()
        unseen -= {use.group for use in uses}
        pool, least = self._beside(held), max((it.nbytes for it in unseen), default=0)
        if not uses or pool < max(least, *(it.largest for it in different)):
            return None
        renamed = [Use(place[use.group], use.nbytes, use.compute, use.copy, use.after) for use in uses]
        ahead, anywhere = movers[0].allowed_ahead, self.allocator.is_shared
        layout = choose_layout(renamed, pool, least, ahead=ahead, anywhere=anywhere)
        if layout is None:
            return None
        return _Kept((*(place[flat] for flat in held), *layout.resident), layout.large)
