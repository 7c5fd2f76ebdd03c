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

from hookcore import Hook
from hookcore_plugins.tiling.stage_trace import Course, image_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from hookcore_plugins.tiling.stage_trace import Shape


class _Ended(Exception):  # noqa: N818 -- no error: it ends a pass
    """Leaves the spine before the first stage that is not wanted."""


@define
class _Pass:
    """The state of a pass under way.

    Attributes:
        skipped: The stages that are left out, in order.
        given: What the last of them would put out, at each call of the spine.
        last: The stage after which the pass ends; None: it goes on to the end.
        kept: What that one puts out, at each call of the spine.
        rests: What stages keep of these frames.
        course: What a whole pass does, to stand in for what is left out.
        size: Height and width of the pass's input.
        call: Number of the spine's call.
    """

    skipped: Sequence[int]
    given: Sequence[Tensor]
    last: int | None
    course: Course
    size: tuple[int, int]
    kept: list[Tensor] = field(factory=list)
    rests: dict[int, Any] = field(factory=dict)
    call: int = -1


def _stand_in(like: Tensor, shape: Shape) -> Tensor:
    """A tensor of a shape that takes no memory."""
    return like.new_zeros(()).expand(shape)


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
    def between(
        self,
        skipped: Sequence[int],
        given: Sequence[Tensor],
        last: int | None,
        course: Course,
        size: tuple[int, int],
    ) -> Iterator[list[Tensor]]:
        """Has the pass in this block begin after some stages, end after some other, or both.

        Args:
            skipped: Stages to leave out, in order.
            given: What the last of them would put out, at each call of the spine.
            last: The stage after which the pass ends; None: it goes on to the end.
            course: What a whole pass does.
            size: Height and width of the pass's input.

        Returns:
            A context manager that gives what the last stage puts out, at each call of the spine.
        """
        self.under_way = _Pass(skipped, given, last, course, size)
        try:
            yield self.under_way.kept
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
            output = call(*args, **kwargs)
            course.returned(output)
            return output
        if under_way is None:
            return call(*args, **kwargs)
        under_way.call += 1
        try:
            return call(*args, **kwargs)
        except _Ended:
            course = under_way.course
            image = _stand_in(under_way.kept[-1], course.result(under_way.call, under_way.size))
            return image if course.memory is None else (image, course.remembered(under_way.rests))


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
            course.entered(args[0] if args else None)
            output = call(*args, **kwargs)
            course.left(self._number, module, output)
            return output
        if under_way is None:
            return call(*args, **kwargs)
        if len(under_way.kept) > under_way.call:
            raise _Ended  # not sooner: a model may note what a stage was given after the stage returns
        if self._number in under_way.skipped:
            return self._skipped(under_way)
        output = call(*args, **kwargs)
        if self._number in under_way.course.pairs:
            under_way.rests[self._number] = output[1]
        if self._number == under_way.last:
            image = image_of(output)
            assert image is not None  # noqa: S101 -- it is of the course's chain
            under_way.kept.append(image)
        return output

    def _skipped(self, under_way: _Pass) -> Any:
        course, image = under_way.course, under_way.given[under_way.call]
        if self._number != under_way.skipped[-1]:
            image = _stand_in(image, course.shape(self._number, under_way.call, under_way.size))
        return (image, None) if self._number in course.pairs else image
