"""Where a pass through an encoder or decoder is cut: what sees the whole image, and what a tile."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from hookcore_plugins.tiling.calls import Size
    from hookcore_plugins.tiling.grid import Grid
    from hookcore_plugins.tiling.passes import Course

_INSIDE = 3.0
"""While a stage computes, so many tensors as large as its input or output are in memory."""


@frozen
class Cut:
    """A cut between two stages.

    Attributes:
        stages: The stages before it, in the order of their calls.
        scale: How many times as large their output is as the input of the pass.
    """

    stages: tuple[int, ...]
    scale: Fraction


def choose_cut(course: Course, size: Size, grid: Grid, tile: Size, *, from_the_end: bool) -> Cut | None:
    """Has as many stages as possible see the whole image, in no more memory than a tile takes.

    What is at the lowest resolution always sees it: attention stands there.

    Args:
        course: What a pass does.
        size: Height and width of that pass's input.
        grid: The tiles, in cells.
        tile: Cells of a tile that memory is counted with; those of the grid may be smaller.
        from_the_end: Whether it is the last stages that see the whole image, as in an encoder, or the first.

    Returns:
        The cut, or None if the stages cannot be told apart.
    """
    order = _chain(course)
    if not order:
        return None
    area = size[0] * size[1]
    numels = [sum(math.prod(shape) for shape in course.outputs[stage]) / area for stage in order]
    scales = [Fraction(course.outputs[stage][0][-2], size[0]) for stage in order]
    live = [_INSIDE * max(numels[max(0, index - 1)], numels[index]) for index in range(len(order))]
    cell = (1 / scales[-1]) ** 2 if from_the_end else 1  # input pixels of a cell
    whole = grid.rows[-1].stop * grid.columns[-1].stop * cell
    bound = max(live) * tile[0] * tile[1] * cell
    lowest = min(scales)
    candidates = [index for index in range(len(order) - 1) if _is_beyond(index, scales, lowest, from_the_end)]
    if from_the_end:
        candidates.reverse()
    best = None
    for index in candidates:
        before, after = live[: index + 1], live[index + 1 :]
        once, many = (after, before) if from_the_end else (before, after)
        kept = numels[index] * whole
        fits = max(once) * whole <= bound and kept + max(many) * grid.area * cell <= bound
        if best is None or fits:
            best = index
        if not fits:
            break
    return None if best is None else Cut(tuple(order[: best + 1]), scales[best])


def _is_beyond(index: int, scales: list[Fraction], lowest: Fraction, from_the_end: bool) -> bool:
    """Whether all stages of the lowest resolution are on the side that sees the whole image."""
    if from_the_end:
        return all(scale > lowest for scale in scales[:index])
    return all(scale > lowest for scale in scales[index + 1 :])


def _chain(course: Course) -> list[int]:
    """The stages in order, up to the first that does not turn one tensor into one at each call."""
    chain = []
    for stage, shapes in course.outputs.items():
        if stage in course.odd or len(shapes) != course.calls:
            break
        chain.append(stage)
    return chain
