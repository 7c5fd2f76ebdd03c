"""The point at which a pass is split: on one side stages see the whole image, on the other side a tile."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from attrs import frozen

from hookcore_plugins.tiling.stage_trace import END

if TYPE_CHECKING:
    from hookcore_plugins.tiling.grid import Grid, Size
    from hookcore_plugins.tiling.stage_trace import StageTrace

_INSIDE = 3.0
"""While a stage computes, so many tensors of its largest size are in memory: a residual, a norm of it and its
activation. Measured on diffusers' AutoencoderKL: 3.0 in the decoder, 5.0 in the encoder."""

_MARGIN = 1.05
"""By so much the peak may be above that of a tile and the output."""


@frozen
class SplitPoint:
    """A point between two stages.

    Attributes:
        stages: The stages before it, in the order of their calls.
        scale: How many times as large their output is as the input of the pass.
        fits: Whether a pass that is split here takes no more memory than a tile and the output.
    """

    stages: tuple[int, ...]
    scale: Fraction
    fits: bool


def stages_in_tiles(trace: StageTrace, *, from_the_end: bool) -> list[int]:
    """The stages of which some pass computes tiles, where as few as possible see the whole image.

    Args:
        trace: What a pass does.
        from_the_end: Whether it is the last stages that see the whole image, as in an encoder, or the first.
    """
    order = trace.chain()
    candidates = _candidates(trace, from_the_end)
    if not candidates:
        return [*order, END]
    return order[: candidates[0] + 1] if from_the_end else [*order[candidates[0] + 1 :], END]


def choose_split_point(trace: StageTrace, grid: Grid, tile: Size, *, from_the_end: bool) -> SplitPoint | None:
    """Let as many stages as possible see the whole image, in no more memory than a tile takes.

    What is at the lowest resolution always sees it: attention stands there.

    Args:
        trace: What a pass does.
        grid: The tiles.
        tile: Cells of a tile that memory is counted with; those of the grid may be smaller.
        from_the_end: Whether it is the last stages that see the whole image, as in an encoder, or the first.

    Returns:
        The point, or None if the stages cannot be told apart, or attention cannot see the whole image.
    """
    order = trace.chain()
    if not order:
        return None
    area = math.prod(trace.size)
    numels = [sum(math.prod(shape) for shape in trace.tall.outputs[stage]) / area for stage in order]
    scales = [trace.stage_scale(stage) for stage in order]
    live = [_INSIDE * it for it in _largest(numels, scales)]
    cell = (1 / scales[-1]) ** 2 if from_the_end else 1  # input pixels of a cell
    whole = grid.rows[-1].stop * grid.columns[-1].stop * cell
    output = sum(math.prod(shape) for shape in trace.tall.results) / area * whole
    bound = _MARGIN * (max(live) * tile[0] * tile[1] * cell + output)
    held = (
        _MARGIN * max(live) / _INSIDE * tile[0] * tile[1] * cell
    )  # what a block was given, while it computes
    if trace.mask * float(whole / area) ** 2 > bound + held:
        return None  # a mask over the whole image would take more than all else, as in HunyuanVideo
    best: SplitPoint | None = None
    for index in _candidates(trace, from_the_end):
        before, after = live[: index + 1], live[index + 1 :]
        once, many = (after, before) if from_the_end else (before, after)
        peak = max(max(once) * whole, max(many) * grid.area * cell + output)
        fits = peak <= bound
        if best is None or fits:
            best = SplitPoint(tuple(order[: index + 1]), scales[index], fits)
        if not fits:
            break
    return best


def _candidates(trace: StageTrace, from_the_end: bool) -> list[int]:
    """Places in the chain of stages after which a pass can be split, the least that sees the whole first.

    Tiles are computed neither of stages at the lowest resolution nor of those known to look at everything.
    """
    order = trace.chain()
    lowest = min((trace.stage_scale(stage) for stage in order), default=0)

    def sees_whole(stage: int) -> bool:
        return trace.stage_scale(stage) == lowest or math.isinf(trace.reach.get(stage, 0.0))

    found = [
        index
        for index in range(len(order) - 1)
        if trace.can_be_cut(order[index])
        and not any(map(sees_whole, order[:index] if from_the_end else order[index + 1 :]))
    ]
    return found[::-1] if from_the_end else found


def _largest(numels: list[float], scales: list[Fraction]) -> list[float]:
    """The largest tensor in each stage: what goes in, comes out, or is as wide as this and as large as that.

    A stage that makes images smaller widens them first; one that makes them larger narrows them first.
    """
    found = []
    for index, (numel, scale) in enumerate(zip(numels, scales, strict=True)):
        before, size = (numels[index - 1], scales[index - 1]) if index else (0.0, Fraction(1))
        found.append(max(before, numel, numel * float(size / scale) ** 2))
    return found
