"""Putting the outputs of tiles together: blended where they overlap, or each tile's core alone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hookcore_plugins.tiling.grid import Grid, Span, Tile


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def ramps(spans: Sequence[Span], scale: int, share: float) -> tuple[Tensor, ...]:
    """Weights of each tile's pixels, which add up to one wherever tiles meet.

    Between two tiles the weight goes from one to the other along a line, around the middle of their overlap.
    The weight of a tile is the difference of the steps at its two sides, so that the sum over all tiles is
    one whatever the overlaps are, also where more than two tiles lie on each other.

    Args:
        spans: The tiles along an axis.
        scale: Pixels of a cell.
        share: Length of a ramp as a share of the shortest overlap; outside of it one tile counts alone.

    Returns:
        For each tile, `(length * scale,)` in float32.
    """
    between = list(itertools.pairwise(spans))
    shortest = min((first.stop - second.start for first, second in between), default=0)
    length = max(1.0, shortest * scale * share)
    middles = [(first.stop + second.start) * scale / 2 for first, second in between]
    weights = []
    for index, span in enumerate(spans):
        pixels = torch.arange(span.start * scale, span.stop * scale, dtype=torch.float32) + 0.5
        weight = torch.ones_like(pixels)
        if index:
            weight = _step(pixels, middles[index - 1], length)
        if index < len(middles):
            weight = weight - _step(pixels, middles[index], length)
        weights.append(weight)
    return tuple(weights)


def _step(pixels: Tensor, middle: float, length: float) -> Tensor:
    """From zero to one, along a line around the middle."""
    return ((pixels - middle) / length + 0.5).clamp(0, 1)


class Mosaic:
    """A tensor of the whole image, put together of the cores of tiles.

    Its memory is allocated for the first tile, which has to be the grid's last.

    Args:
        grid: The tiles.
        scale: Pixels of a cell.
        device: Where it lies; None: where the tiles do.

    Attributes:
        whole: The tensor; None before the first tile.
    """

    def __init__(self, grid: Grid, scale: int, device: torch.device | None) -> None:
        self._grid = grid
        self._scale = scale
        self._device = device
        self.whole: Tensor | None = None

    def add(self, tile: Tile, pixels: Tensor) -> None:
        """Put in the core of what came out for a tile, `(..., height, width)`."""
        if self.whole is None:
            self.whole = _empty_whole(pixels, tile, self._scale, self._device)
        core = self._grid.core(tile)
        self._grid.crop(self.whole, core)[:] = self._grid.crop(pixels, core, of=tile)


class Canvas:
    """A tensor of the whole image, to which tiles are added with weights.

    Its memory is allocated for the first tile, which has to be the grid's last.

    Args:
        grid: The tiles.
        scale: Pixels of a cell.
        share: How much of an overlap is blended.
        device: Where it lies; None: where the tiles do.

    Attributes:
        whole: The tensor; None before the first tile.
    """

    def __init__(self, grid: Grid, scale: int, share: float, device: torch.device | None) -> None:
        self._scale = scale
        self._device = device
        self._rows = dict(zip(grid.rows, ramps(grid.rows, scale, share), strict=True))
        self._columns = dict(zip(grid.columns, ramps(grid.columns, scale, share), strict=True))
        self._last = grid.tiles[0]
        self.whole: Tensor | None = None

    def add(self, tile: Tile, pixels: Tensor) -> None:
        """Add a tile.

        Args:
            tile: Where it lies.
            pixels: What came out for it, `(..., height, width)`.

        Raises:
            ValueError: It has not the size that the scale makes of the tile.
        """
        if self.whole is None:
            self.whole = _empty_whole(pixels, tile, self._scale, self._device).zero_()
        height, width = pixels.shape[-2:]
        weights = [
            _lengthened(self._rows[tile.rows], height if tile.rows == self._last.rows else None),
            _lengthened(self._columns[tile.columns], width if tile.columns == self._last.columns else None),
        ]
        if [len(weight) for weight in weights] != [height, width]:
            expected = tuple(len(weight) for weight in weights)
            raise ValueError(f"a tile came out as {(height, width)} pixels, expected {expected}")
        down, across = (weight.to(pixels.device, pixels.dtype) for weight in weights)
        weighted = pixels * (down[:, None] * across)
        top, left = tile.rows.start * self._scale, tile.columns.start * self._scale
        self.whole[..., top : top + height, left : left + width] += weighted.to(self.whole.device)


def _empty_whole(last: Tensor, tile: Tile, scale: int, device: torch.device | None) -> Tensor:
    """Memory for an image of which a tensor is the last tile, with the strides in the same order."""
    height, width = (
        span.start * scale + length
        for span, length in zip((tile.rows, tile.columns), last.shape[-2:], strict=True)
    )
    layout = _CHANNELS_LAST.get(last.ndim, torch.contiguous_format)
    if last.is_contiguous() or not last.is_contiguous(memory_format=layout):
        layout = torch.contiguous_format
    shape = *last.shape[:-2], height, width
    return torch.empty(shape, dtype=last.dtype, device=device or last.device, memory_format=layout)


def _lengthened(weight: Tensor, length: int | None) -> Tensor:
    """The weight of a last tile for as many pixels as it has: what is left over may make one more or less."""
    if length is None or length == len(weight):
        return weight
    if length < len(weight):
        return weight[:length]
    return torch.cat([weight, weight.new_ones(length - len(weight))])
