"""The part of a pass through an encoder or decoder that lies between two of its stages.

The modules stay as they are and run their own forward. Hooks on the stages stand in for the first ones, hand
on what those have put out before, and end the pass after a later one. A decoder inside of a loop over frames
is called several times in a pass: there is one tensor for each call.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import define, field

from hookcore import Hook
from hookcore_plugins.tiling.pass_record import image_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from hookcore_plugins.tiling.grid import Size
    from hookcore_plugins.tiling.pass_record import Shape
    from hookcore_plugins.tiling.stage_trace import StageTrace


class _Ended(Exception):  # noqa: N818 -- no error: it ends a pass
    """Leaves the spine before the first stage that is not wanted."""


@define
class _Run:
    """A partial pass under way.

    Attributes:
        skipped: The stages that are left out, in order.
        given: What the last of them puts out, at each call of the spine.
        last: The stage after which the pass ends; None: it goes on to the end.
        trace: What a whole pass does, to stand in for what is left out.
        size: Height and width of the pass's image.
        outputs: What the last stage puts out, at each call of the spine.
        kept: What stages keep of these frames.
        call: Number of the spine's call.
    """

    skipped: Sequence[int]
    given: Sequence[Tensor]
    last: int | None
    trace: StageTrace
    size: Size
    outputs: list[Tensor] = field(factory=list)
    kept: dict[int, Any] = field(factory=dict)
    call: int = -1


def _stand_in(like: Tensor, shape: Shape) -> Tensor:
    """A tensor of a shape that takes no memory."""
    return like.new_zeros(()).expand(shape)


class PartialForward(threading.local):
    """What the hooks on one encoder or decoder share; of each thread its own.

    Attributes:
        run: The partial pass under way, if one is.
    """

    def __init__(self) -> None:
        self.run: _Run | None = None

    @contextmanager
    def between(
        self,
        skipped: Sequence[int],
        given: Sequence[Tensor],
        last: int | None,
        trace: StageTrace,
        size: Size,
    ) -> Iterator[list[Tensor]]:
        """Let the pass in this block begin after some stages, end after another, or both.

        Args:
            skipped: Stages to leave out, in order.
            given: What the last of them puts out, at each call of the spine.
            last: The stage after which the pass ends; None: it goes on to the end.
            trace: What a whole pass does.
            size: Height and width of the pass's image.

        Yields:
            What the last stage puts out, at each call of the spine.
        """
        self.run = _Run(skipped, given, last, trace, size)
        try:
            yield self.run.outputs
        finally:
            self.run = None


class SpineHook(Hook):
    """Counts the calls of an encoder or decoder, and returns from those that are ended."""

    def __init__(self, partial_forward: PartialForward) -> None:
        self._partial = partial_forward

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Return a stand-in where the pass is ended."""
        run = self._partial.run
        if run is None:
            return call(*args, **kwargs)
        run.call += 1
        try:
            return call(*args, **kwargs)
        except _Ended:
            image = _stand_in(run.outputs[-1], run.trace.result(run.call, run.size))
            return run.trace.returned(image, run.kept)


class StageHook(Hook):
    """Stands in for a stage, or ends the pass after it.

    Args:
        partial_forward: The state that all hooks share.
        number: The stage's number.
    """

    def __init__(self, partial_forward: PartialForward, number: int) -> None:
        self._partial = partial_forward
        self._number = number

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the stage, unless the pass leaves it out or has ended."""
        run = self._partial.run
        if run is None:
            return call(*args, **kwargs)
        if len(run.outputs) > run.call:
            raise _Ended  # not sooner: a model may note what a stage was given after the stage returns
        if self._number in run.skipped:
            return self._skip(run)
        output = call(*args, **kwargs)
        if self._number in run.trace.tall.pairs:
            run.kept[self._number] = output[1]
        if self._number == run.last:
            image = image_of(output)
            assert image is not None  # noqa: S101 -- it is of the chain
            run.outputs.append(image)
        return output

    def _skip(self, run: _Run) -> Any:
        image = run.given[run.call]
        if self._number != run.skipped[-1]:
            image = _stand_in(image, run.trace.shape(self._number, run.call, run.size))
        return (image, None) if self._number in run.trace.tall.pairs else image
