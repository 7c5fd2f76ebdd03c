"""Taking a pass through an encoder or decoder apart: it ends after some stage, or begins there.

The modules themselves stay as they are and go through their own forward. Hooks on the stages either end the
pass after one of them and keep what it has put out, or stand in for the first ones and hand on what was kept.
A decoder inside of a loop over frames is called several times in a pass: one tensor is kept for each.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import define, field
from torch import Tensor

from hookcore import Hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from fractions import Fraction

    from torch import nn

    Shape = tuple[int, ...]


class _Ended(Exception):  # noqa: N818 -- no error: it ends a pass
    """Leaves the spine after the last stage that is wanted."""


@define
class Course:
    """What a pass was seen to do.

    Attributes:
        outputs: By stage, in the order of their calls, the shapes of what it put out at each call.
        results: What the spine put out at each call.
        calls: How often the spine was called.
        mask: Numbers in the largest mask that attention was given; it grows with the square of the image.
        odd: Stages that put out something other than a tensor of as many dimensions as the input.
    """

    outputs: dict[int, list[Shape]] = field(factory=dict)
    results: list[Shape] = field(factory=list)
    calls: int = 0
    mask: int = 0
    odd: set[int] = field(factory=set)


@define
class _Pass:
    """The state of a pass under way.

    Attributes:
        stages: The stages that are left out, in order, or after the last of which the pass ends.
        features: What that last one puts out, at each call of the spine.
        keeps: Whether the pass ends there; it begins there otherwise.
        course: What a whole pass does, to stand in for what is left out.
        sizes: Height and width of the pass's input, as multiples of those of the course's.
        call: Number of the spine's call.
    """

    stages: Sequence[int]
    features: list[Tensor]
    keeps: bool
    course: Course
    sizes: tuple[Fraction, Fraction]
    call: int = -1

    def stand_in(self, like: Tensor, shape: Shape) -> Tensor:
        """A tensor of the right shape that takes no memory."""
        height, width = (int(size * times) for size, times in zip(shape[-2:], self.sizes, strict=True))
        return like.new_zeros(()).expand(*shape[:-2], height, width)


class Passes(threading.local):
    """What the hooks on one encoder or decoder have in common; of each thread its own.

    Attributes:
        watching: Where to note what a pass does, if anywhere.
        under_way: The pass that is taken apart, if one is.
    """

    def __init__(self) -> None:
        self.watching: Course | None = None
        self.under_way: _Pass | None = None

    @contextmanager
    def watch(self) -> Iterator[Course]:
        """Notes what the pass in this block does."""
        self.watching = course = Course()
        try:
            yield course
        finally:
            self.watching = None

    @contextmanager
    def ending(
        self, stages: Sequence[int], course: Course, sizes: tuple[Fraction, Fraction]
    ) -> Iterator[list[Tensor]]:
        """Ends the pass in this block after these stages; gives what the last of them puts out."""
        features: list[Tensor] = []
        self.under_way = _Pass(stages, features, True, course, sizes)
        try:
            yield features
        finally:
            self.under_way = None

    @contextmanager
    def beginning(
        self,
        stages: Sequence[int],
        features: list[Tensor],
        course: Course,
        sizes: tuple[Fraction, Fraction],
    ) -> Iterator[None]:
        """Has the pass in this block begin after these stages with what the last of them has put out."""
        self.under_way = _Pass(stages, features, False, course, sizes)
        try:
            yield
        finally:
            self.under_way = None


class SpineHook(Hook):
    """Counts the calls of an encoder or decoder, and ends them where a pass is to end."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns a stand-in for what a pass that ended does not put out."""
        course, under_way = self._passes.watching, self._passes.under_way
        if course is not None:
            course.calls += 1
            output = call(*args, **kwargs)
            course.results.append(output.shape if isinstance(output, Tensor) else ())
            return output
        if under_way is None:
            return call(*args, **kwargs)
        under_way.call += 1
        try:
            return call(*args, **kwargs)
        except _Ended:
            shape = under_way.course.results[under_way.call]
            return under_way.stand_in(under_way.features[-1], shape)


class StageHook(Hook):
    """Stands in for a stage, or ends the pass after it.

    Args:
        passes: The state that it shares.
        number: Its number among the stages.
    """

    def __init__(self, passes: Passes, number: int) -> None:
        self._passes = passes
        self._number = number

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls on where the pass has nothing else to do here."""
        course, under_way = self._passes.watching, self._passes.under_way
        if course is not None:
            output = call(*args, **kwargs)
            self._note(course, args, output)
            return output
        if under_way is None or self._number not in under_way.stages:
            return call(*args, **kwargs)
        is_last = self._number == under_way.stages[-1]
        if under_way.keeps:
            output = call(*args, **kwargs)
            if is_last:
                under_way.features.append(output)
                raise _Ended
            return output
        features = under_way.features[under_way.call]
        if is_last:
            return features
        return under_way.stand_in(features, under_way.course.outputs[self._number][under_way.call])

    def _note(self, course: Course, args: Sequence[Any], output: Any) -> None:
        taken = args[0] if args else None
        fits = isinstance(output, Tensor) and isinstance(taken, Tensor) and output.ndim == taken.ndim >= 4
        if not fits:
            course.odd.add(self._number)
        course.outputs.setdefault(self._number, []).append(tuple(output.shape) if fits else ())
