"""Long use: thousands of calls leave no more memory, threads, descriptors and objects than before."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import frozen

import hookcore.testing.simulator as sim
from stress.scenes import SETUPS, Scene, expected_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator

_CALLS = 250
_WARM_UP = 60
_PAGE = os.sysconf("SC_PAGESIZE")
_MOST_BYTES = 2 << 20  # that may come and go, of the allocators' own


@frozen
class _Use:
    """What the process holds.

    Attributes:
        descriptors: Open files.
        threads: Python's and all others.
        objects: Python objects that the garbage collector knows.
        on_device: Bytes on the simulated devices.
        pinned: Bytes of page-locked memory.
        resident: Bytes in memory.
    """

    descriptors: int
    threads: int
    objects: int
    on_device: int
    pinned: int
    resident: int

    @classmethod
    def now(cls) -> _Use:
        """Takes it."""
        gc.collect()
        return cls(
            descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
            threads=sum(1 for _ in Path("/proc/self/task").iterdir()),
            objects=len(gc.get_objects()),
            on_device=torch.get_device_module("sim").memory_allocated(),
            pinned=sim.pinned_bytes(),
            resident=int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE,
        )

    def check(self, before: _Use, calls: int) -> None:
        """Sees that nothing has grown with the number of calls."""
        for name in ("descriptors", "threads", "on_device", "pinned"):
            now, then = getattr(self, name), getattr(before, name)
            assert now <= then, f"{name} went from {then} to {now} in {calls} calls"
        grown = self.objects - before.objects
        assert grown < calls, f"there are {grown} Python objects more after {calls} calls"
        grown = self.resident - before.resident
        assert grown < _MOST_BYTES, f"there are {grown} bytes more in memory after {calls} calls"


@frozen
class Soak:
    """Many calls of one model.

    Attributes:
        technique: Name of what is on the model.
        model: Name of the model.
    """

    technique: str
    model: str
    count: ClassVar[int] = _CALLS
    seconds: ClassVar[float] = 120

    def check(self) -> None:
        """Calls it, with a reset and an error now and then."""
        expected_outputs(self.technique, self.model)
        with Scene(self.technique, self.model) as scene:
            scene.apply()
            for number in range(_WARM_UP):
                self._use(scene, number)
            before = _Use.now()
            for number in range(_CALLS):
                self._use(scene, number)
            _Use.now().check(before, _CALLS)
            scene.check_removal()

    def _use(self, scene: Scene, number: int) -> None:
        scene.check_output(scene.call())
        if number % 50 == 1:
            assert scene.applied is not None
            scene.applied.reset()
            try:
                scene.model(None)
            except (TypeError, AttributeError):
                pass
            else:
                raise AssertionError("a call with None for a tensor went through")


def inputs() -> Iterator[Soak]:
    """Yields models with techniques, again and again."""
    return (Soak(technique, model) for technique, model in itertools.cycle(SETUPS))
