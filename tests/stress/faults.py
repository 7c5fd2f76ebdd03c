"""Requests that fail, for memory, copies, events and waits, of the host and of the simulated device."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections import Counter
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

import torch
from attrs import frozen

import hookcore
import hookcore.testing.simulator as sim
from hookcore.testing.twins import promise
from stress.scenes import SETUPS, VERBS, Scene, expected_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_GOLDEN = 0.6180339887498949  # its multiples, without the whole part, are spread evenly
_OFFLOADS = [
    (technique, model)
    for technique, model in SETUPS
    if technique not in ("attention", "channels_last", "slicing", "tiling", "trace")
]
_ERRORS: dict[str, BaseException] = {
    "allocate": torch.OutOfMemoryError("injected: out of memory"),
    "pin": RuntimeError("injected: out of page-locked memory"),
    "torch.empty": RuntimeError("injected: not enough memory"),
    "os.preadv": OSError(5, "injected: input/output error"),
}
_ERROR = RuntimeError("injected: device error")


class _OfHost(contextlib.ExitStack):
    """Counts what hookcore asks of the host, and fails one request.

    Attributes:
        counts: How many of each kind there were.
    """

    def __init__(self, request: str = "", nth: int = 0) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._failing = request, nth
        self.enter_context(patch.object(torch, "empty", self._watched("torch.empty", torch.empty)))
        self.enter_context(patch.object(os, "preadv", self._watched("os.preadv", os.preadv)))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("hookcore") and not caller.startswith("hookcore.testing"):
                self.counts[name] += 1
                if (name, self.counts[name]) == self._failing:
                    raise copy(_ERRORS[name])
            return function(*args, **kwargs)

        return watched


def _failing(request: str, nth: int) -> contextlib.AbstractContextManager[Any]:
    """Fails the nth request of a kind inside a `with` block."""
    if request in ("torch.empty", "os.preadv"):
        return _OfHost(request, nth)
    # A copy, as the frames that it comes through live as long as it.
    return sim.fail_at(request, nth, copy(_ERRORS.get(request, _ERROR)))  # type: ignore[arg-type]


@functools.cache
def _requests(technique: str, model: str, verb: str) -> list[tuple[str, int]]:
    """Every request in a verb: its kind, and its number among those of its kind."""
    expected_outputs(technique, model)
    with Scene(technique, model) as scene:
        scene.bring_to(verb)
        with sim.counting() as on_device, _OfHost() as of_host:
            scene.do(verb)
        counts = sorted([*on_device.items(), *of_host.counts.items()])
    return [(request, nth) for request, count in counts for nth in range(1, count + 1)]


@frozen
class Fault:
    """One request that fails.

    Attributes:
        technique: Name of what is on the model.
        model: Name of the model.
        verb: In what it fails.
        where: Which of all requests there, from 0 to 1.
    """

    technique: str
    model: str
    verb: str
    where: float
    count: ClassVar[int] = 1
    seconds: ClassVar[float] = 60

    def check(self) -> None:
        """Fails it, then uses the model on."""
        requests = _requests(self.technique, self.model, self.verb)
        if not requests:
            return
        request, nth = requests[int(self.where * len(requests))]
        with Scene(self.technique, self.model) as scene:
            scene.bring_to(self.verb)
            try:
                try:
                    with _failing(request, nth):
                        scene.do(self.verb)
                except (*map(type, _ERRORS.values()), hookcore.HookcoreError) as error:
                    promise(
                        _is_injected(error),
                        f"the error comes out as it was, not as {type(error).__name__}: {error}",
                    )
                scene.check_still_right()
            except BaseException as fault:
                fault.add_note(f"request {nth} of kind {request} failed")
                raise


def _is_injected(error: BaseException | None) -> bool:
    """Whether an error is what was injected, or says that it came of that."""
    while error is not None:
        if "injected" in str(error) or isinstance(error, hookcore.HookcoreError):
            return True
        error = error.__cause__
    return False


def inputs() -> Iterator[Fault]:
    """Yields faults: all techniques, models and verbs again and again, each time elsewhere."""
    for number in itertools.count(1):
        for technique, model in _OFFLOADS:
            for verb in VERBS:
                if verb != "reset":  # which asks for nothing
                    yield Fault(technique, model, verb, round(number * _GOLDEN % 1, 6))
