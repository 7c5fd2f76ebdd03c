"""A pass stage by stage, each for all tiles before the next, so that every stage has what is exact.

What a stage puts out for the whole image is kept aside, where there is more memory than where the model
computes. From there each tile of the next stage takes its own part and as much around it as the stage looks
at. Group norms inside of a stage are measured one after the other, over all tiles, and the stage is computed
once more up to each of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from hookcore_plugins.tiling.blend import Mosaic
from hookcore_plugins.tiling.norm_statistics import Measured, Measuring, averaged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from hookcore_plugins.tiling.crop import ImageCall
    from hookcore_plugins.tiling.grid import Grid, Size, Tile
    from hookcore_plugins.tiling.norm_statistics import Moments


@frozen
class Features:
    """What stages have put out for a whole image.

    Attributes:
        stages: Those stages, in order; none: the image itself.
        tensors: What the last of them put out, at each call of the spine.
    """

    stages: tuple[int, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    def crop(self, grid: Grid, tile: Tile, device: torch.device) -> list[Tensor]:
        """A tile's part of them, on a device."""
        return [grid.crop(tensor, tile).to(device) for tensor in self.tensors]


def compute_by_tiles(
    whole: ImageCall,
    on_tile: Callable[[Grid, Tile], Sequence[Tensor]],
    *,
    reach: float,
    tile: Size,
    scale: int,
    device: torch.device | None,
    forget: Callable[[], object] | None,
) -> tuple[Tensor, ...]:
    """Compute something for the whole image, tile by tile, to the same result as at once.

    Args:
        whole: The call.
        on_tile: Computes a tile; what is returned has the same number of tensors each time.
        reach: How many cells away is looked at. Where a tile is less than three times as large, larger ones
            are computed.
        tile: Height and width of a tile in cells.
        scale: Pixels of what comes out for a cell.
        device: Where what comes out is put together; None: where tiles are computed.
        forget: Lets the model forget earlier frames, where it keeps them itself.

    Returns:
        The tensors for the whole image.
    """
    halo = math.ceil(reach)
    height, width = (max(it, 3 * halo) for it in tile)
    grid = whole.grid((height, width), (2 * halo, 2 * halo))
    found: list[Moments] = []
    while True:
        parts: list[tuple[Moments, int]] = []  # not the exceptions, which hold a tile's activations
        mosaics: list[Mosaic] = []
        for it in grid.tiles:
            try:
                with Measuring(found, partial(grid.crop, part=grid.core(it), of=it)):
                    tensors = on_tile(grid, it)
            except Measured as part:
                parts.append((part.moments, part.pixels))
                if forget is not None:
                    forget()
            else:
                mosaics = mosaics or [Mosaic(grid, scale, device) for _ in tensors]
                for mosaic, pixels in zip(mosaics, tensors, strict=True):
                    mosaic.add(it, pixels)
                del tensors
        if not parts:
            return tuple(mosaic.whole for mosaic in mosaics if mosaic.whole is not None)
        found.append(averaged(*zip(*parts, strict=True)))
