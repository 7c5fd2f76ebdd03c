"""Taking a pass through an encoder or decoder apart: it ends after some stage, or begins there.

The modules themselves stay as they are and go through their own forward. Hooks on the stages either end the
pass after one of them and keep what it has put out, or stand in for the first ones and hand on what was kept.
A decoder inside of a loop over frames is called several times in a pass: one tensor is kept for each.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from attrs import define, field
from torch import Tensor, nn

from hookcore import Hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
        size: Height and width of the pass's input.
        reach: By stage, to how many pixels away its convolutions look.
        mask: Numbers in the largest mask that attention was given; it grows with the square of the image.
        odd: Stages that put out something other than a tensor of as many dimensions as the input.
        blocks: Stages that do nothing but call others one after the other, each with what the last put out.
        mixed: Stages that call others, and do something else as well.
    """

    outputs: dict[int, list[Shape]] = field(factory=dict)
    results: list[Shape] = field(factory=list)
    calls: int = 0
    size: tuple[int, int] = (1, 1)
    reach: dict[int, int] = field(factory=dict)
    mask: int = 0
    odd: set[int] = field(factory=set)
    blocks: dict[int, list[int]] = field(factory=dict)
    mixed: set[int] = field(factory=set)
    _under_way: list[_Thread] = field(factory=list)

    def entered(self, taken: Any) -> None:
        """A stage is called."""
        if self._under_way:
            self._under_way[-1].goes_in(taken)
        self._under_way.append(_Thread.beginning(taken))

    def left(self, number: int, output: Any) -> None:
        """It returns."""
        inner = self._under_way.pop()
        fits = (
            isinstance(output, Tensor)
            and isinstance(inner.taken, Tensor)
            and output.ndim == inner.taken.ndim >= 4
        )
        if not fits:
            self.odd.add(number)
        if inner.stages:
            inner.goes_in(output)
            known = self.blocks.setdefault(number, inner.stages)
            if not inner.is_whole or known != inner.stages or len(set(known)) < len(known):
                self.mixed.add(number)
        if self._under_way:
            self._under_way[-1].comes_out(number, output)
        self.outputs.setdefault(number, []).append(tuple(output.shape) if fits else ())

    def chain(self) -> list[int]:
        """The smallest stages in order, up to the first that does not turn one image into another."""
        inner = {part for number in self.mixed for part in self._inside(number)}
        chain: list[int] = []
        if () in self.results:
            return chain
        for stage in self.outputs:
            if stage in inner or (stage in self.blocks and stage not in self.mixed):
                continue
            if stage in self.odd or len(self.outputs[stage]) != self.calls or not self._is_spatial(stage):
                break
            chain.append(stage)
        return chain

    def _is_spatial(self, stage: int) -> bool:
        """Whether height and width are the last dimensions of what a stage puts out, not channels."""
        height, width = self.outputs[stage][0][-2:]
        return height * self.size[1] == width * self.size[0]

    def scale(self, stage: int) -> Fraction:
        """How many times as large as the pass's input a stage's output is."""
        return Fraction(self.outputs[stage][0][-2], self.size[0])

    def _inside(self, number: int) -> list[int]:
        parts = self.blocks.get(number, [])
        return [*parts, *(it for part in parts for it in self._inside(part))]


@define
class _Thread:
    """The way of a tensor through a stage that calls others.

    Attributes:
        taken: What the stage was given.
        at: What was last put out.
        version: How often that had been changed in place.
        stages: Those that it was seen to call.
        is_whole: Whether each was given what the last had put out.
    """

    taken: Any
    at: Any
    version: int
    stages: list[int] = field(factory=list)
    is_whole: bool = True

    @classmethod
    def beginning(cls, taken: Any) -> _Thread:
        """That of a stage which is given this."""
        return cls(taken, taken, _version(taken))

    def goes_in(self, taken: Any) -> None:
        """One is called, or the stage returns."""
        self.is_whole = self.is_whole and taken is self.at and _version(taken) == self.version

    def comes_out(self, number: int, output: Any) -> None:
        """One returns."""
        self.at, self.version = output, _version(output)
        self.stages.append(number)


def _version(value: Any) -> int:
    """How often a tensor was changed in place."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


@define
class _Pass:
    """The state of a pass under way.

    Attributes:
        skipped: The stages that are left out, in order.
        given: What the last of them would put out, at each call of the spine.
        last: The stage after which the pass ends; None: it goes on to the end.
        kept: What that one puts out, at each call of the spine.
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
    call: int = -1

    def stand_in(self, like: Tensor, shape: Shape) -> Tensor:
        """A tensor of the right shape that takes no memory."""
        height, width = (
            length * own // seen
            for length, own, seen in zip(shape[-2:], self.size, self.course.size, strict=True)
        )
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
            return under_way.stand_in(under_way.kept[-1], shape)


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
            course.left(self._number, output)
            course.reach[self._number] = _reach(module)
            return output
        if under_way is None:
            return call(*args, **kwargs)
        if self._number in under_way.skipped:
            given = under_way.given[under_way.call]
            if self._number == under_way.skipped[-1]:
                return given
            return under_way.stand_in(given, under_way.course.outputs[self._number][under_way.call])
        output = call(*args, **kwargs)
        if self._number == under_way.last:
            under_way.kept.append(output)
            raise _Ended
        return output


def _reach(module: nn.Module) -> int:
    """To how many pixels away the convolutions in a module look together, at most."""
    kernels = [
        max(size // 2 * step for size, step in zip(it.kernel_size[-2:], it.dilation[-2:], strict=True))
        for it in module.modules()
        if isinstance(it, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    ]
    return sum(kernels)
