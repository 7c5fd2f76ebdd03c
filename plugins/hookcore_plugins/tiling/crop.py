"""A call with an image among its arguments, made with parts of it, and the one tensor that it returns."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hookcore_plugins.tiling.grid import Span, Tile
    from hookcore_plugins.tiling.samples import Sample

    Size = tuple[int, int]


def image_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor with height and width among the arguments."""
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, Tensor) and value.ndim >= 4), None)


@frozen
class ImageCall:
    """A call of which parts can be computed.

    Every tensor is cut alike that has the image's proportions: the latents once more, or a mask as large as
    the output that a decoder is given with them.

    Attributes:
        call: What is called.
        args: Its arguments.
        kwargs: Likewise.
        size: Height and width of the image.
        scale: How many times as large the output is.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: Size
    scale: Fraction

    @property
    def device(self) -> torch.device:
        """Where the image lies."""
        image = image_in(self.args, self.kwargs)
        assert image is not None  # noqa: S101 -- there is one, or nothing would be tiled
        return image.device

    @property
    def cells(self) -> Size:
        """The image's size in cells."""
        height, width = (max(1, it // self.scale.denominator) for it in self.size)
        return height, width

    def whole(self) -> Any:
        """Calls with everything."""
        return self.call(*self.args, **self.kwargs)

    def tile(self, tile: Tile) -> Any:
        """Calls with one tile."""
        cell, cells = self.scale.denominator, self.cells

        def crop(tensor: Tensor, times: Fraction) -> Tensor:
            rows, columns = (
                _pixels(span, cell * times, count, length)
                for span, count, length in zip(
                    (tile.rows, tile.columns), cells, tensor.shape[-2:], strict=True
                )
            )
            return tensor[..., rows, columns]

        return self._on(crop)

    def tile_size(self, tile: Tile) -> Size:
        """Height and width of what a tile has of the image."""
        spans = zip((tile.rows, tile.columns), self.cells, self.size, strict=True)
        rows, columns = (_pixels(span, self.scale.denominator, *rest) for span, *rest in spans)
        return rows.stop - rows.start, columns.stop - columns.start

    def sample_size(self, sample: Sample) -> Size:
        """Height and width of a sample of the image."""
        height, width = (
            length // cells * chosen
            for length, cells, chosen in zip(self.size, self.cells, sample.cells, strict=True)
        )
        return height, width

    def sample(self, sample: Sample) -> Any:
        """Calls with a sample of the image."""
        return self._on(lambda tensor, _times: sample.of(tensor))

    def _on(self, part: Callable[[Tensor, Fraction], Tensor]) -> Any:
        def chosen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim >= 4:
                down, across = (
                    Fraction(it, other) for it, other in zip(value.shape[-2:], self.size, strict=True)
                )
                if down == across > 0:
                    return part(value, down)
            return value

        return self.call(*map(chosen, self.args), **{name: chosen(it) for name, it in self.kwargs.items()})


def _pixels(span: Span, cell: Any, cells: int, length: int) -> slice:
    """The pixels of a span; the last cell has what is left over."""
    return slice(int(span.start * cell), length if span.stop == cells else int(span.stop * cell))


def tensor_of(output: Any) -> Tensor | None:
    """The tensor that a call returns: by itself, alone in a tuple, or as `sample` of an output class."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    found = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    return found if isinstance(found, Tensor) else None


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """The same with another tensor in it."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple) and len(output) == 1:
        return (tensor,)
    changed = copy.copy(output)
    changed.sample = tensor
    return changed
