"""Where the tiles of an image lie, and their parts of tensors.

Extents are counted in cells: a cell is the smallest piece of the input for which the output has whole pixels.
It is one latent of a decoder, and as many pixels of an encoder as make one latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Size = tuple[int, int]
"""Height and width."""


@frozen
class Span:
    """An extent along one axis, in cells."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of cells."""
        return self.stop - self.start


def cut(cells: int, tile: int, overlap: int) -> tuple[Span, ...]:
    """Cover an axis with the fewest tiles of one length.

    Args:
        cells: Length of the axis.
        tile: Maximal length of a tile.
        overlap: Minimal length that neighbours share; less than `tile`.

    Returns:
        The tiles, in order; a single one if the axis is no longer than a tile.
    """
    if cells <= tile:
        return (Span(0, cells),)
    count = -(-(cells - overlap) // (tile - overlap))
    length = -(-(cells + (count - 1) * overlap) // count)
    starts = [round(index * (cells - length) / (count - 1)) for index in range(count)]
    return tuple(Span(start, start + length) for start in starts)


@frozen
class Tile:
    """A rectangle of cells."""

    rows: Span
    columns: Span


@frozen
class Grid:
    """All tiles of an image.

    Attributes:
        rows: Their extents down.
        columns: Their extents across.
        size: Height and width of the image in pixels.
        cell: Pixels along a side of a cell. The last cell has the pixels that are left over, too.
    """

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    size: Size
    cell: int = 1

    @property
    def tiles(self) -> list[Tile]:
        """All tiles, the last first: it shows how large the whole output is."""
        return [Tile(row, column) for row in reversed(self.rows) for column in reversed(self.columns)]

    @property
    def whole(self) -> Tile:
        """The whole image."""
        return Tile(Span(0, self.rows[-1].stop), Span(0, self.columns[-1].stop))

    @property
    def area(self) -> int:
        """Cells of the largest tile."""
        return self.rows[0].length * self.columns[0].length

    def core(self, tile: Tile) -> Tile:
        """The cells of a tile that are nearer to its middle than to others'; cores cover the image once."""
        return Tile(_core(tile.rows, self.rows), _core(tile.columns, self.columns))

    def crop(self, tensor: Tensor, part: Tile, *, of: Tile | None = None) -> Tensor:
        """Return the view of a tensor on a part of the image.

        Args:
            tensor: `(..., height, width)`, of the whole image in any resolution. A tensor without height and
                width is returned as it is.
            part: The cells to take.
            of: What the tensor has of the image; None: all of it.
        """
        if tensor.ndim < 4:
            return tensor
        of = of or self.whole
        rows, columns = (
            self._pixels(*it)
            for it in zip(
                (part.rows, part.columns),
                (of.rows, of.columns),
                self.size,
                tensor.shape[-2:],
                strict=True,
            )
        )
        return tensor[..., rows, columns]

    def size_of(self, tile: Tile) -> Size:
        """Height and width of a tile in pixels of the image."""
        height, width = (
            self._end(span, size) - span.start * self.cell
            for span, size in zip((tile.rows, tile.columns), self.size, strict=True)
        )
        return height, width

    def _pixels(self, part: Span, of: Span, size: int, length: int) -> slice:
        """The pixels of a part, in a resolution in which what it is taken of has this length."""
        pixels = max(1, round(length * self.cell / (self._end(of, size) - of.start * self.cell)))
        stop = length if part.stop == of.stop else (part.stop - of.start) * pixels
        return slice((part.start - of.start) * pixels, stop)

    def _end(self, span: Span, size: int) -> int:
        """The pixel of the image at which an extent ends."""
        return size if span.stop == max(1, size // self.cell) else span.stop * self.cell


def _core(span: Span, spans: Sequence[Span]) -> Span:
    """The cells of a tile between the middles of what it shares with its neighbours."""
    index = spans.index(span)
    start = span.start if index == 0 else (span.start + spans[index - 1].stop) // 2
    stop = span.stop if index == len(spans) - 1 else (spans[index + 1].start + span.stop) // 2
    return Span(start, stop)
