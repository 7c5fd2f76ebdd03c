"""Memory for weights from files that the components of a target have in turn, within one budget.

Components of a pipeline mostly run one after another, and one of them many times. So there is one stretch of
memory for all of them. Whichever runs reads ahead there, and what others had read ahead goes. What stays is
chosen for calls that repeat: a denoiser in its loop, or a ControlNet and a denoiser in turn, as if that were
one pass. A component that runs once gains nothing from weights that stay, and has them read for its call; if
it needs more room for that than there is, groups of others make way, and are read again when they are used.

A single component has the memory for itself. What stays of it is chosen when it is planned.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hookcore.errors import ConcurrentCallError
from hookcore.memory.files.page_arena import PageArena
from hookcore.memory.planning.call_cycle import CallCycle
from hookcore.memory.planning.residency import check_budget, spread_residents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hookcore.memory.files.file_mover import FileMover
    from hookcore.memory.files.page_arena import PageRange
    from hookcore.memory.files.reader_threads import Task
    from hookcore.memory.grouping import Group


class HostPool:
    """Memory for weights that are read from files, and whose calls use it.

    Args:
        budget: Bytes that all weights may take; None for as little as one call needs, and what is read ahead.
        read_ahead: Bytes of them that may be ahead of use.
        is_shared: Whether several components may use it.

    Attributes:
        budget: As given.
        read_ahead: Likewise.
        is_shared: Likewise.
    """

    def __init__(self, budget: int | None, read_ahead: int, *, is_shared: bool = False) -> None:
        self.budget = budget
        self.read_ahead = read_ahead
        self.is_shared = is_shared
        self._arena: PageArena | None = None  # until a call needs it, and when nobody is left who does
        self._leaving: list[tuple[Task[None], PageRange]] = []  # mapped pages that are being let go
        self._left_behind: deque[PageRange] = deque()  # by movers that went away; any thread may add some
        # A model that nobody else keeps goes away, whatever becomes of those that it ran with.
        self._expecting: weakref.WeakValueDictionary[str, FileMover] = weakref.WeakValueDictionary()
        self._movers: weakref.WeakValueDictionary[int, FileMover] = weakref.WeakValueDictionary()
        self._registering = threading.Lock()
        self._numbers = itertools.count()
        self._running: list[FileMover] = []  # innermost last
        self._rounds: CallCycle[int] = CallCycle()
        self._chosen_for: Counter[int] | None = None  # whose groups stay, and how often these are called
        self._lock = threading.RLock()

    # Between calls

    def number(self) -> int:
        """A number for a mover."""
        return next(self._numbers)

    def expect(self, component: str, mover: FileMover) -> None:
        """Note which mover a component will have."""
        self._expecting[component] = mover

    def needs(self, mover: FileMover) -> int:
        """Bytes that all components together will take at most; the first mover says it.

        Raises:
            BudgetError: The budget is too small.
        """
        movers = list(dict.fromkeys(self._expecting.values()))
        if self.budget is not None:
            largest = max(movers, key=lambda it: it.least)
            check_budget(self.budget, largest.least, *largest.where)
        if mover is not movers[0]:
            return 0
        if self.budget is None:
            return max(self._wanted_for(it) for it in movers)
        return min(self.budget, sum(it.whole for it in movers))

    def register(self, mover: FileMover) -> None:
        """Take a mover in, which has groups now."""
        with self._registering:
            if mover.number not in self._movers:
                self._movers[mover.number] = mover
                self._chosen_for = None

    def unregister(self, mover: FileMover) -> None:
        """Let a mover go, which has no groups any more; the last one gives the memory back."""
        with self._registering:
            self._movers.pop(mover.number, None)
            self._chosen_for = None
            if not self._movers:
                self._arena = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep calls out while what they use is changed.

        Raises:
            ConcurrentCallError: Another thread calls a component that has its weights there.
        """
        if not self._lock.acquire(blocking=False):
            raise ConcurrentCallError(
                "cannot change what is offloaded while another thread calls a component that shares its "
                "memory. Do it after the call has returned"
            )
        try:
            yield
        finally:
            self._lock.release()

    def forget(self) -> None:
        """Forget in which order components were called."""
        self._rounds.forget()

    def leave_behind(self, page_ranges: Iterable[PageRange]) -> None:
        """Take over what a mover had that goes away, from whichever thread."""
        self._left_behind.extend(page_ranges)

    # Calls

    def enter(self, mover: FileMover) -> None:
        """Begin an outermost call of a component; it may be within a call of another one.

        Raises:
            ConcurrentCallError: Another thread calls a component that has its weights there.
        """
        if not self._lock.acquire(blocking=False):
            raise ConcurrentCallError(
                f"called {mover.where[1]!r} while another thread calls a component that shares its memory. "
                "Put a lock round the calls, or give each thread a pipeline of its own"
            )
        try:
            self._begin(mover)
        except BaseException:
            self._lock.release()
            raise
        self._running.append(mover)

    def leave(self) -> None:
        """End the call that was entered last."""
        self._running.pop()
        self._lock.release()

    def following(self, mover: FileMover) -> FileMover:
        """Return whose weights are needed after a mover's call: perhaps its own."""
        if not self.is_shared:
            return mover
        if len(self._running) > 1:
            return self._running[-2]
        expected = self._rounds.expected
        return mover if expected is None else self._movers.get(expected, mover)

    def evict_one(self) -> bool:
        """Evict one cached group that is not in use, if there is any."""
        current = self._running[-1] if self._running else None
        others = [it for it in self._all() if it is not current]
        return any(it.evict_one() for it in (*others, *self._running[-1:]))

    # Memory

    def take(self, sizes: Sequence[int]) -> list[PageRange | None] | None:
        """Lend pieces of these sizes, none for a size of 0; None if there is no room for all of them."""
        arena = self.arena
        self._collect()
        page_ranges: list[PageRange | None] = []
        for nbytes in sizes:
            pages = arena.take(nbytes) if nbytes else None
            if nbytes and pages is None:
                for taken in page_ranges:
                    if taken is not None:
                        arena.give_back(taken)
                return None
            page_ranges.append(pages)
        return page_ranges

    def give_back(self, pages: PageRange) -> None:
        """Take a range of pages back, as soon as nobody looks at it."""
        if self._arena is not None:
            self._arena.give_back(pages)

    def give_back_after(self, done: Task[None], pages: PageRange) -> None:
        """Take a range of pages back when the pages that it stands for were let go."""
        self._leaving.append((done, pages))

    @property
    def is_leaving(self) -> bool:
        """Whether pages are still being let go."""
        return bool(self._leaving)

    def wait_for_leaving(self) -> None:
        """Wait for pages to be let go: until then nobody may write to them."""
        for task, _ in self._leaving:
            task.exception()
        self._collect()

    @property
    def arena(self) -> PageArena:
        """The memory."""
        if self._arena is None:
            movers = self._all()
            least = max((it.least for it in movers), default=0) + self.read_ahead
            self._arena = PageArena(least if self.budget is None else self.budget)
        return self._arena

    # How it is done

    def _all(self) -> list[FileMover]:
        with self._registering:
            return list(self._movers.values())

    def _collect(self) -> None:
        """Take back what was let go in the meantime."""
        still = []
        for future, pages in self._leaving:
            if future.done():
                self.give_back(pages)
            else:
                still.append((future, pages))
        self._leaving = still
        while self._left_behind:
            self.give_back(self._left_behind.popleft())

    def _begin(self, mover: FileMover) -> None:
        for other in self._all():
            if other is not mover:
                other.discard_ahead()
        if self.budget is None and self.arena.nbytes < mover.least + self.read_ahead:
            mover.discard_ahead()
            self.wait_for_leaving()
            self._arena = None  # it was made when this mover was not there
        if not self._running:
            self._rounds.note(mover.number)
            if self.is_shared and self.budget is not None:
                self._choose(self.budget)
                self._see_to_room_for(mover)

    def _wanted_for(self, mover: FileMover) -> int:
        """Bytes that a mover takes at most while none of its groups stay."""
        return min(mover.least + self.read_ahead, mover.whole)

    def _see_to_room_for(self, mover: FileMover) -> None:
        """Evict groups of other movers for those that will come and go."""
        arena = self.arena
        wanted = min(self._wanted_for(mover), mover.whole - sum(mover.kept.values())) - mover.ahead_bytes
        self._collect()
        while arena.nbytes - arena.lent() < wanted:
            if not any(it.evict_one() for it in self._all() if it is not mover):
                return
            self._collect()

    def _choose(self, budget: int) -> None:
        """Choose what stays: of what repeats, most often first, or all if there is room for that."""
        movers = {it.number: it for it in self._all()}
        times = Counter(self._rounds.round)
        if len(movers) == 1 or sum(it.whole for it in movers.values()) <= budget:
            times = Counter(list(movers))
        if not times or times == self._chosen_for or not movers.keys() >= times.keys():
            return
        left = budget
        if sum(movers[number].whole for number in times) > budget:
            left -= min(left, max(movers[number].least for number in times) + self.read_ahead)
        chosen: set[Group] = set()
        for count in sorted({*times.values(), 0}, reverse=True):
            costs: dict[Group, int] = {}
            for number, mover in movers.items():
                if times[number] == count:
                    costs |= mover.costs if count else mover.kept  # of others, what they have may stay
            found = spread_residents(costs, left)
            left -= sum(costs[group] for group in found)
            chosen.update(found)
        for mover in movers.values():
            mover.keep(chosen)
        self._chosen_for = times
