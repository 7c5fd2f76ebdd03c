"""Samples of an image, to estimate statistics of the whole on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from hookcore_plugins.tiling.grid import Grid, Size

_BANDS = 3
"""Along each axis. More of them are more alike to the whole; fewer have fewer seams, which it has not."""

_WIDTH = {"encode": 4, "decode": 7}
"""Cells of a band, at least, if there is room for two: in a decoder, many layers have looked across seams."""

_SHARE = {"encode": 8, "decode": 4}
"""All samples together have about one of so many pixels of the image. A decoder begins with fewer of them."""

_SEAM = 1
"""Pixels at a patch's border that are not measured: what was computed there has looked at another patch."""

_GOLDEN = 0.618034  # steps of it are spread evenly, however many there are


@frozen
class Sample:
    """A picture put together of patches from all over an image, on a regular raster.

    Attributes:
        rows: The cells of the image that it has, down.
        columns: The same across.
        size: The image's size in cells.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    size: Size

    def of(self, tensor: Tensor) -> Tensor:
        """The sample of a tensor `(B, C, ..., height, width)` as large as the image or larger.

        Each channel is given the mean and the deviation that it has in the whole: a few patches have others.
        """
        part = tensor
        for dim, chosen, cells in ((-2, self.rows, self.size[0]), (-1, self.columns, self.size[1])):
            pixels = tensor.shape[dim] // cells
            index = torch.tensor(chosen)[:, None] * pixels + torch.arange(pixels)
            part = part.index_select(dim, index.flatten().to(tensor.device))
        dims = tuple(range(2, tensor.ndim))
        wide = torch.promote_types(tensor.dtype, torch.float32)
        deviation, mean = torch.std_mean(tensor, dims, keepdim=True)
        own_deviation, own_mean = torch.std_mean(part, dims, keepdim=True)
        scale = deviation.to(wide) / own_deviation.to(wide).clamp_min(torch.finfo(wide).tiny)
        return ((part.to(wide) - own_mean.to(wide)) * scale + mean.to(wide)).to(tensor.dtype)

    def in_patches(self, tensor: Tensor) -> Tensor:
        """What of a tensor `(B, C, ..., height, width)` of the sample's lies well inside of the patches."""
        if tensor.ndim < 4:
            return tensor
        for dim, chosen in ((-2, self.rows), (-1, self.columns)):
            index = torch.tensor(_inside(chosen, tensor.shape[dim]))
            tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor

    @property
    def cells(self) -> Size:
        """Height and width of the sample in cells."""
        return len(self.rows), len(self.columns)


def samples(cells: Size, grid: Grid, method: str) -> Iterator[Sample]:
    """Samples that are no larger than a tile, each of other pixels, to encode or to decode."""
    tile = grid.rows[0].length, grid.columns[0].length
    count = max(1, cells[0] * cells[1] // (tile[0] * tile[1] * _SHARE[method]))
    for number in range(count):
        phases = (number + 0.5) / count, (0.5 + number * _GOLDEN) % 1
        rows, columns = (_bands(*it, _WIDTH[method]) for it in zip(cells, tile, phases, strict=True))
        yield Sample(rows, columns, cells)


def _bands(cells: int, most: int, phase: float, width: int) -> tuple[int, ...]:
    """Some cells of an axis, in bands: one in each part of the axis, all at the same place there."""
    most = min(most, cells)
    count = min(_BANDS, max(2, most // width))
    part = cells / count
    length = max(1, most // count)
    starts = (round(part * band + phase * (part - length)) for band in range(count))
    found = {cell for start in starts for cell in range(start, start + length) if cell < cells}
    return tuple(sorted(found))


def _inside(chosen: Sequence[int], length: int) -> list[int]:
    """The pixels of an axis that lie well inside of its bands; all of a band that is narrow."""
    pixels = length // len(chosen)
    ends = [
        *(index for index in range(1, len(chosen)) if chosen[index] != chosen[index - 1] + 1),
        len(chosen),
    ]
    found: list[int] = []
    start = 0
    for end in ends:
        band = range(start * pixels, end * pixels)
        seam = min(_SEAM, max(0, (len(band) - 2) // 2))
        found += band[seam : len(band) - seam]
        start = end
    return found
