"""Where tiles lie along an axis, with which weights they are added up, and what they are added up in.

Everything is counted in cells: a cell is the smallest piece of the input that the output has whole pixels
for. It is one latent for a decoder, and as many pixels as make one latent for an encoder.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from torch import Tensor


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@frozen
class Span:
    """A tile's extent along one axis, in cells."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Cells in it."""
        return self.stop - self.start


def cut(cells: int, tile: int, overlap: int) -> tuple[Span, ...]:
    """Covers an axis with tiles of equal length, as few as there can be.

    Args:
        cells: Length of the axis.
        tile: The most that a tile may have.
        overlap: The least that neighbours have in common; less than `tile`.

    Returns:
        The tiles, in order. One, of the whole axis, if that is not longer than a tile.
    """
    if cells <= tile:
        return (Span(0, cells),)
    count = -(-(cells - overlap) // (tile - overlap))
    length = -(-(cells + (count - 1) * overlap) // count)
    starts = [round(index * (cells - length) / (count - 1)) for index in range(count)]
    return tuple(Span(start, start + length) for start in starts)


def ramps(spans: Sequence[Span], scale: int, share: float) -> tuple[Tensor, ...]:
    """Weights of each tile's pixels, which add up to one wherever tiles meet.

    Between two tiles the weight goes from one to the other along a line, around the middle of what they have
    in common. The weight of a tile is the difference of the steps at its two sides, so that the sum over all
    tiles is one whatever the overlaps are, also where more than two tiles lie on each other.

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


@frozen
class Tile:
    """One tile: its extent down and across."""

    rows: Span
    columns: Span

    def of(self, tensor: Tensor, scale: Fraction) -> Tensor:
        """What the tile has of a tensor `(..., height, width)` that has `scale` pixels for each cell."""
        rows, columns = (
            slice(int(span.start * scale), int(span.stop * scale)) for span in (self.rows, self.columns)
        )
        return tensor[..., rows, columns]


@frozen
class Grid:
    """All tiles of an image.

    Attributes:
        rows: Extents down.
        columns: Extents across.
    """

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @property
    def tiles(self) -> list[Tile]:
        """All tiles, the last first: it tells how large the whole output is."""
        return [Tile(row, column) for row in reversed(self.rows) for column in reversed(self.columns)]

    def core_of(self, tile: Tile) -> Tile:
        """What of a tile is nearer to its middle than to others'; all cores together cover the image once."""
        return Tile(_core(tile.rows, self.rows), _core(tile.columns, self.columns))

    def in_core(self, tile: Tile, tensor: Tensor) -> Tensor:
        """The core's part of a tile's tensor; one without height and width is taken as it is."""
        if tensor.ndim < 4:
            return tensor
        core = self.core_of(tile)
        rows, columns = (
            _within(part, span, spans[-1].stop, length)
            for part, span, spans, length in zip(
                (core.rows, core.columns),
                (tile.rows, tile.columns),
                (self.rows, self.columns),
                tensor.shape[-2:],
                strict=True,
            )
        )
        return tensor[..., rows, columns]

    @staticmethod
    def corner(height: int, width: int) -> Tile:
        """The tile of so many cells where an image begins."""
        return Tile(Span(0, height), Span(0, width))

    @property
    def area(self) -> int:
        """Cells of the largest tile."""
        return self.rows[0].length * self.columns[0].length


def _core(span: Span, spans: Sequence[Span]) -> Span:
    """The cells of a tile that lie between the middles of what it has in common with its neighbours."""
    index = spans.index(span)
    start = span.start if index == 0 else (span.start + spans[index - 1].stop) // 2
    stop = span.stop if index == len(spans) - 1 else (spans[index + 1].start + span.stop) // 2
    return Span(start, stop)


def _within(part: Span, span: Span, cells: int, length: int) -> slice:
    """The pixels of a part of a tile that has so many; the image's last cell has what is left over."""
    pixels = length // span.length
    stop = length if part.stop == cells else (part.stop - span.start) * pixels
    return slice((part.start - span.start) * pixels, stop)


class Mosaic:
    """What stages put out for a whole image, put together of the cores of tiles.

    It is made when the first tile comes, which has to be the grid's last.

    Args:
        grid: The tiles.
        scale: Pixels of a cell.
        device: Where it lies.
    """

    def __init__(self, grid: Grid, scale: int, device: torch.device) -> None:
        self._grid = grid
        self._scale = scale
        self._device = device
        self.whole: Tensor | None = None

    def add(self, tile: Tile, pixels: Tensor) -> None:
        """Adds what came out for a tile, `(..., height, width)`."""
        if self.whole is None:
            height, width = (
                span.start * self._scale + length
                for span, length in zip((tile.rows, tile.columns), pixels.shape[-2:], strict=True)
            )
            self.whole = _empty(pixels, (height, width), self._device)
        core, part = self._grid.core_of(tile), self._grid.in_core(tile, pixels)
        top, left = core.rows.start * self._scale, core.columns.start * self._scale
        self.whole[..., top : top + part.shape[-2], left : left + part.shape[-1]] = part


class Canvas:
    """What tiles are added up in. It is made when the first tile comes, which has to be the grid's last.

    Args:
        grid: The tiles.
        scale: Pixels of a cell; `Fraction` of one where a pixel has several cells.
        share: How much of an overlap is blended.
        device: Where it lies; None: where the tiles do.
    """

    def __init__(self, grid: Grid, scale: int, share: float, device: torch.device | None) -> None:
        self._scale = scale
        self._device = device
        self._rows = dict(zip(grid.rows, ramps(grid.rows, scale, share), strict=True))
        self._columns = dict(zip(grid.columns, ramps(grid.columns, scale, share), strict=True))
        self._last = Tile(grid.rows[-1], grid.columns[-1])
        self.whole: Tensor | None = None

    def add(self, tile: Tile, pixels: Tensor) -> None:
        """Adds a tile.

        Args:
            tile: Where it lies.
            pixels: What came out for it, `(..., height, width)`.

        Raises:
            ValueError: It has not the size that the scale makes of the tile.
        """
        top, left = tile.rows.start * self._scale, tile.columns.start * self._scale
        height, width = pixels.shape[-2:]
        if self.whole is None:
            self.whole = _empty(pixels, (top + height, left + width), self._device).zero_()
        weights = [
            _lengthened(self._rows[tile.rows], height if tile.rows == self._last.rows else None),
            _lengthened(self._columns[tile.columns], width if tile.columns == self._last.columns else None),
        ]
        if [len(weight) for weight in weights] != [height, width]:
            expected = tuple(len(weight) for weight in weights)
            raise ValueError(f"a tile came out as {(height, width)} pixels, expected {expected}")
        down, across = (weight.to(pixels.device, pixels.dtype) for weight in weights)
        weighted = pixels * (down[:, None] * across)
        self.whole[..., top : top + height, left : left + width] += weighted.to(self.whole.device)


def _empty(pixels: Tensor, size: tuple[int, int], device: torch.device | None) -> Tensor:
    """Memory for an image of a height and width, laid out as this part of it is."""
    layout = _CHANNELS_LAST.get(pixels.ndim, torch.contiguous_format)
    if pixels.is_contiguous() or not pixels.is_contiguous(memory_format=layout):
        layout = torch.contiguous_format
    shape = *pixels.shape[:-2], *size
    return torch.empty(shape, dtype=pixels.dtype, device=device or pixels.device, memory_format=layout)


def _lengthened(weight: Tensor, length: int | None) -> Tensor:
    """The weight of a last tile for as many pixels as it has: an odd rest may make one more or less."""
    if length is None or length == len(weight):
        return weight
    if length < len(weight):
        return weight[:length]
    return torch.cat([weight, weight.new_ones(length - len(weight))])
