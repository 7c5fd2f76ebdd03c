"""A pass stage by stage, each for all tiles before the next, so that every stage has what is exact.

What a stage puts out for the whole image is kept aside, where there is more memory than where the model
computes. From there each tile of the next stage takes its own part with as much around it as the stage's
convolutions look at. Group norms inside of a stage are measured one after the other, over all tiles, and the
stage is computed once more up to each of them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from hookcore_plugins.tiling.grid import Grid, Mosaic, cut
from hookcore_plugins.tiling.norm_statistics import Measured, Measuring, averaged

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor

    from hookcore_plugins.tiling.crop import ImageCall, Size
    from hookcore_plugins.tiling.grid import Tile
    from hookcore_plugins.tiling.norm_statistics import Moments
    from hookcore_plugins.tiling.stage_trace import Course


@frozen
class Features:
    """What stages have put out for a whole image.

    Attributes:
        stages: Those, in order; none: what goes in.
        tensors: What the last of them put out, at each call of the spine.
        scale: Pixels of a cell.
        cells: The image's size in cells.
    """

    stages: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    scale: int
    cells: Size

    def of(self, tile: Tile, device: torch.device) -> list[Tensor]:
        """A tile's part of them, on a device; the image's last cells have what is left over."""
        rows, columns = (
            slice(span.start * self.scale, None if span.stop == cells else span.stop * self.scale)
            for span, cells in zip((tile.rows, tile.columns), self.cells, strict=True)
        )
        return [tensor[..., rows, columns].to(device) for tensor in self.tensors]


def step(
    before: Features,
    stages: tuple[int, ...],
    *,
    whole: ImageCall,
    course: Course,
    tile: Size,
    device: torch.device,
    between: Callable[[Features, Tile, int | None], AbstractContextManager[list[Tensor]]],
    forget: Callable[[], object] | None,
) -> Features:
    """Computes one stage for the whole image, or several at once that the image cannot be cut between.

    Args:
        before: What the stages before it have put out.
        stages: Which they are.
        whole: The call.
        course: What a pass does.
        tile: The largest tile, in cells.
        device: Where what comes out is put together.
        between: Has a pass with one tile begin after the stages before, and end after some other.
        forget: Has the model forget earlier frames, where it keeps them itself.

    Returns:
        What the last of them puts out.
    """
    scale = int(course.scale(stages[-1]) * whole.scale.denominator)
    halo = -(-sum(course.reach[it] for it in stages) // min(before.scale, scale))
    grid = Grid(
        *(
            cut(cells, most, min(2 * halo, 2 * most // 3))
            for cells, most in zip(whole.cells, tile, strict=True)
        )
    )
    found: list[Moments] = []
    while True:
        parts: list[tuple[Moments, int]] = []  # not the exceptions, which hold a tile's activations
        mosaics = [Mosaic(grid, scale, device) for _ in range(course.calls)]
        for it in grid.tiles:
            try:
                with Measuring(found, partial(grid.in_core, it)), between(before, it, stages[-1]) as kept:
                    whole.tile(it)
            except Measured as part:
                parts.append((part.moments, part.pixels))
                if forget is not None:
                    forget()
            else:
                for mosaic, pixels in zip(mosaics, kept, strict=True):
                    mosaic.add(it, pixels)
        if not parts:
            tensors = tuple(mosaic.whole for mosaic in mosaics if mosaic.whole is not None)
            return Features((*before.stages, *stages), tensors, scale, whole.cells)
        found.append(averaged(*zip(*parts, strict=True)))
