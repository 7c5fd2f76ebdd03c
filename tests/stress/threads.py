"""Calls from many threads at once, while techniques are taken off: right, or refused with a HookcoreError."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

import hookcore
from hookcore.testing import same_bits
from stress.scenes import SETUPS, Scene, expected_outputs, make_input, output_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_THREADS, _CALLS = 8, 5


@frozen
class Threads:
    """Some threads that call one model.

    Attributes:
        technique: Name of what is on the model.
        model: Name of the model.
        disturbs: Whether another thread has the technique forget, and takes it off, meanwhile. To put it on
            then would change weights under calls of the bare model, of which nobody knows.
        seed: Draws what the threads do.
    """

    technique: str
    model: str
    disturbs: bool
    seed: int
    count: ClassVar[int] = _THREADS * _CALLS
    seconds: ClassVar[float] = 120

    def check(self) -> None:
        """Starts them, and compares each output with those of the input."""
        expected_outputs(self.technique, self.model)
        chance = random.Random(self.seed)
        given = [make_input(self.model, seed) for seed in range(1, 4)]
        with Scene(self.technique, self.model) as scene:
            bare = [output_of(scene.model, x) for x in given]
            scene.apply()
            right = list(zip([output_of(scene.model, x) for x in given], bare, strict=True))
            faults: list[BaseException] = []
            threads = [
                threading.Thread(target=self._call, args=(scene, given, right, number, faults))
                for number in range(_THREADS)
            ]
            for thread in threads:
                thread.start()
            for use in chance.choices((scene.reset, scene.remove), k=4) if self.disturbs else ():
                with contextlib.suppress(hookcore.HookcoreError):
                    use()
            for thread in threads:
                thread.join()
            if faults:
                raise faults[0]
            scene.check_call()
            scene.check_removal()

    def _call(
        self,
        scene: Scene,
        given: list[torch.Tensor],
        right: list[tuple[torch.Tensor, torch.Tensor]],
        number: int,
        faults: list[BaseException],
    ) -> None:
        chance = random.Random(f"{self.seed} {number}")
        try:
            for _ in range(_CALLS):
                index = chance.randrange(len(given))
                with contextlib.suppress(hookcore.HookcoreError):
                    output = output_of(scene.model, given[index])
                    assert any(same_bits(output, it) for it in right[index]), "wrong output in a thread"
        except BaseException as error:  # noqa: BLE001 - is raised by the thread that started this one
            faults.append(error)


def inputs() -> Iterator[Threads]:
    """Yields models with techniques, again and again, with and without disturbance."""
    for seed in itertools.count():
        for technique, model in SETUPS:
            yield Threads(technique, model, bool((seed + len(technique)) % 2), seed)
