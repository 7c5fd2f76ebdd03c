"""Where a pass through an encoder or decoder is cut: what sees the whole image, and what a tile."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from hookcore_plugins.tiling.crop import Size
    from hookcore_plugins.tiling.grid import Grid
    from hookcore_plugins.tiling.stage_trace import Course

_INSIDE = 3.0
"""While a stage computes, so many tensors of its largest size are in memory: a residual, a norm of it and its
activation. Measured on diffusers' AutoencoderKL: 3.0 in the decoder, 5.0 in the encoder."""

_MARGIN = 1.05
"""By so much the peak may be above that of a tile and the output."""


@frozen
class Cut:
    """A cut between two stages.

    Attributes:
        stages: The stages before it, in the order of their calls.
        scale: How many times as large their output is as the input of the pass.
        fits: Whether a pass that is cut here takes no more memory than a tile and the output.
    """

    stages: tuple[int, ...]
    scale: Fraction
    fits: bool


def choose_cut(course: Course, grid: Grid, tile: Size, *, from_the_end: bool) -> Cut | None:
    """Has as many stages as possible see the whole image, in no more memory than a tile takes.

    What is at the lowest resolution always sees it: attention stands there.

    Args:
        course: What a pass does.
        grid: The tiles, in cells.
        tile: Cells of a tile that memory is counted with; those of the grid may be smaller.
        from_the_end: Whether it is the last stages that see the whole image, as in an encoder, or the first.

    Returns:
        The cut, or None if the stages cannot be told apart, or attention cannot see the whole image.
    """
    order = course.chain()
    if not order:
        return None
    area = math.prod(course.size)
    numels = [sum(math.prod(shape) for shape in course.outputs[stage]) / area for stage in order]
    scales = [course.scale(stage) for stage in order]
    live = [_INSIDE * it for it in _largest(numels, scales)]
    cell = (1 / scales[-1]) ** 2 if from_the_end else 1  # input pixels of a cell
    whole = grid.rows[-1].stop * grid.columns[-1].stop * cell
    output = sum(math.prod(shape) for shape in course.results) / area * whole
    bound = _MARGIN * (max(live) * tile[0] * tile[1] * cell + output)
    held = (
        _MARGIN * max(live) / _INSIDE * tile[0] * tile[1] * cell
    )  # what a block was given, while it computes
    if course.mask * float(whole / area) ** 2 > bound + held:
        return None  # a mask over the whole image would take more than all else, as in HunyuanVideo
    lowest = min(scales)
    candidates = [
        index
        for index in range(len(order) - 1)
        if course.can_be_cut(order[index]) and _is_beyond(index, scales, lowest, from_the_end)
    ]
    if from_the_end:
        candidates.reverse()
    best: Cut | None = None
    for index in candidates:
        before, after = live[: index + 1], live[index + 1 :]
        once, many = (after, before) if from_the_end else (before, after)
        peak = max(max(once) * whole, max(many) * grid.area * cell + output)
        fits = peak <= bound
        if best is None or fits:
            best = Cut(tuple(order[: index + 1]), scales[index], fits)
        if not fits:
            break
    return best


def _largest(numels: list[float], scales: list[Fraction]) -> list[float]:
    """The largest tensor in each stage: what goes in, comes out, or is as wide as this and as large as that.

    A stage that makes images smaller widens them first; one that makes them larger narrows them first.
    """
    found = []
    for index, (numel, scale) in enumerate(zip(numels, scales, strict=True)):
        before, size = (numels[index - 1], scales[index - 1]) if index else (0.0, Fraction(1))
        found.append(max(before, numel, numel * float(size / scale) ** 2))
    return found


def _is_beyond(index: int, scales: list[Fraction], lowest: Fraction, from_the_end: bool) -> bool:
    """Whether all stages of the lowest resolution are on the side that sees the whole image."""
    if from_the_end:
        return all(scale > lowest for scale in scales[:index])
    return all(scale > lowest for scale in scales[index + 1 :])
