"""Tries many inputs of a kind in children of this process, so that a crash or a hang is a violation, too."""

from __future__ import annotations

import gc
import multiprocessing
import time
import traceback
from collections import deque
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from attrs import field, frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection

_FORK = multiprocessing.get_context("fork")  # what is imported and installed is there in a child at once
_WORKERS = 2


class Input(Protocol):
    """One thing to try: a frozen attrs class whose repr is the code that makes it again.

    Attributes:
        count: How many inputs it counts for.
        seconds: How long it may take before it counts as hanging.
    """

    count: int
    seconds: float

    def check(self) -> None:
        """Tries it; raises whatever shows that a promise was broken."""


@frozen
class Kind:
    """Inputs of a kind.

    Attributes:
        name: What they are, for people.
        inputs: Yields them, the same at each call, as many as anybody asks for.
        least: How many a full run tries.
        short: How many a test of the normal suite tries; 0 for none.
    """

    name: str
    inputs: Callable[[], Iterator[Input]]
    least: int
    short: int


@frozen
class Violation:
    """A broken promise.

    Attributes:
        item: The input.
        what: What was found, for people.
    """

    item: Input
    what: str

    def __str__(self) -> str:
        module = type(self.item).__module__
        return (
            f"{self.what}\n    reproduce: PYTHONPATH=tests:tests/support python -c "
            f'"from {module} import *; {self.item!r}.check()"'
        )


@frozen
class Result:
    """What became of the inputs of a kind.

    Attributes:
        kind: The kind.
        tried: How many inputs were tried.
        violations: What was found.
    """

    kind: Kind
    tried: int
    violations: list[Violation] = field(repr=False)


def run(kind: Kind, count: int, *, until: float = float("inf")) -> Result:
    """Tries the first inputs of a kind.

    Args:
        kind: The kind.
        count: How many.
        until: No input is begun after this time, in seconds of `time.monotonic`.
    """
    inputs = list(_first(kind.inputs(), count))
    workers = [_Worker(range(start, len(inputs), _WORKERS), inputs) for start in range(_WORKERS)]
    done: list[tuple[Input, str]] = []
    while running := [worker for worker in workers if worker.is_open]:
        now = time.monotonic()
        patience = min(until, *(worker.deadline for worker in running)) - now
        ready = wait([worker.reports for worker in running], timeout=max(0.0, patience))
        for worker in running:
            if worker.reports in ready:
                done.append(worker.read())
            elif time.monotonic() > worker.deadline:
                done.append(worker.give_up("hangs"))
            if time.monotonic() > until and worker.is_open:
                worker.stop()
    violations = [Violation(item, fault) for item, fault in done if fault]
    return Result(kind, sum(item.count for item, _ in done), violations)


class _Worker:
    """A child that tries some inputs, and is replaced when one of them ends or stops it.

    Attributes:
        is_open: Whether there is anything left to try.
        reports: Where the child says what it does.
        deadline: When the input that is tried now counts as hanging, in seconds of `time.monotonic`.
    """

    def __init__(self, indices: Iterable[int], inputs: list[Input]) -> None:
        self._left = deque(indices)
        self._inputs = inputs
        self.is_open = bool(self._left)
        if self.is_open:
            self._start()

    def _start(self) -> None:
        left = [self._inputs[index] for index in self._left]
        self.reports, sending = _FORK.Pipe(duplex=False)
        self._child = _FORK.Process(target=_try_all, args=(left, sending), daemon=True)
        self._child.start()
        sending.close()
        self._allow()

    def _allow(self) -> None:
        self.deadline = time.monotonic() + self._inputs[self._left[0]].seconds

    def read(self) -> tuple[Input, str]:
        """Returns the input that the child is done with, and what was wrong with it; empty for nothing."""
        try:
            fault = self.reports.recv()
        except EOFError:
            self._child.join()
            fault = f"the process ended with {self._child.exitcode}"
        return self.give_up(fault) if fault else (self._next(), fault)

    def _next(self) -> Input:
        item = self._inputs[self._left.popleft()]
        if self._left:
            self._allow()
        else:
            self.stop()
        return item

    def give_up(self, fault: str) -> tuple[Input, str]:
        """Leaves the input of now, and goes on with the next in a child that is not spoiled by it."""
        self.stop()
        item = self._inputs[self._left.popleft()]
        if self._left:
            self.is_open = True
            self._start()
        return item, fault

    def stop(self) -> None:
        """Ends the child."""
        self._child.kill()
        self._child.join()
        self.reports.close()
        self.is_open = False


def _first(inputs: Iterable[Input], count: int) -> Iterator[Input]:
    """Yields inputs until they count for as many as there are to be."""
    so_far = 0
    for item in inputs:
        if so_far >= count:
            return
        so_far += item.count
        yield item


def _try_all(inputs: Iterable[Input], reports: Connection) -> None:
    """What a child does: says of each input what was wrong, and ends with the first of which anything was."""
    gc.collect()
    gc.freeze()  # what was imported is not looked through again and again
    for item in inputs:
        try:
            item.check()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            reports.send(_said(error))
            return
        reports.send("")


def _said(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    text = " ".join(str(error)[:300].split())
    return f"{type(error).__name__}: {text} [{Path(last.filename).name}:{last.lineno}]{notes}"
