"""KeyboardInterrupt at any line of hookcore's in an apply, a call, a reset or a removal."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from stress.scenes import SETUPS, VERBS, Scene, expected_outputs
from stress.tracing import Tracer

if TYPE_CHECKING:
    from collections.abc import Iterator

_GOLDEN = 0.6180339887498949  # its multiples, without the whole part, are spread evenly


@functools.cache
def _interruptible(technique: str, model: str, verb: str) -> list[int]:
    """The places where an interrupt can come in a verb, by number."""
    expected_outputs(technique, model)
    for _ in range(2):  # once for what is done only once in a process
        tracer = Tracer()
        with Scene(technique, model) as scene:
            scene.bring_to(verb)
            with tracer:
                scene.do(verb)
    return tracer.first_and_last()


@frozen
class Interrupt:
    """One interrupt.

    Attributes:
        technique: Name of what is on the model.
        model: Name of the model.
        verb: What is interrupted.
        where: How far on, from 0 to 1.
    """

    technique: str
    model: str
    verb: str
    where: float
    count: ClassVar[int] = 1
    seconds: ClassVar[float] = 60

    def check(self) -> None:
        """Interrupts, then uses the model on."""
        numbers = _interruptible(self.technique, self.model, self.verb)
        tracer = Tracer(numbers[int(self.where * len(numbers))])
        with Scene(self.technique, self.model) as scene:
            scene.bring_to(self.verb)
            try:
                with tracer:
                    scene.do(self.verb)
            except KeyboardInterrupt as error:
                kept = error  # with all its frames, as an interactive session keeps it
            else:
                return  # it came where errors are printed and go no further
            try:
                scene.check_still_right()
            except BaseException as fault:
                fault.add_note(f"interrupted before {tracer.where}")
                raise
            del kept


def inputs() -> Iterator[Interrupt]:
    """Yields interrupts: all techniques, models and verbs again and again, each time elsewhere."""
    for number in itertools.count(1):
        for technique, model in SETUPS:
            for verb in VERBS:
                yield Interrupt(technique, model, verb, round(number * _GOLDEN % 1, 6))
