"""A call with an image among its arguments, repeated with parts of the image."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import Tensor

from hookcore_plugins.tiling.grid import Grid, cut

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hookcore_plugins.tiling.grid import Size, Tile
    from hookcore_plugins.tiling.samples import Sample


def image_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor with height and width among the arguments."""
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, Tensor) and value.ndim >= 4), None)


def size_of(image: Tensor) -> Size:
    """Height and width of an image `(..., height, width)`."""
    height, width = image.shape[-2:]
    return height, width


def with_images(
    args: tuple[Any, ...], kwargs: dict[str, Any], changed: Callable[[Tensor, Fraction], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace every argument that has the image's proportions.

    That is the image, the same once more in another resolution, or a mask as large as the output.

    Args:
        args: The arguments.
        kwargs: Likewise.
        changed: Given such a tensor, and how many times as large as the image it is, what replaces it.
    """
    image = image_in(args, kwargs)

    def replaced(value: Any) -> Any:
        if image is not None and isinstance(value, Tensor) and value.ndim >= 4:
            down, across = (
                Fraction(*it) for it in zip(value.shape[-2:], image.shape[-2:], strict=True) if it[1]
            )
            if down == across > 0:
                return changed(value, down)
        return value

    return tuple(map(replaced, args)), {name: replaced(value) for name, value in kwargs.items()}


@frozen
class ImageCall:
    """A call that can be made with parts of its image.

    Attributes:
        call: What is called.
        args: Its arguments.
        kwargs: Likewise.
        size: Height and width of the image in pixels.
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
        """Height and width of the image in cells."""
        height, width = (max(1, it // self.scale.denominator) for it in self.size)
        return height, width

    def grid(self, tile: Size, overlap: Size) -> Grid:
        """Tiles of the image.

        Args:
            tile: Maximal height and width of a tile in cells.
            overlap: Minimal height and width that neighbours share, in cells.
        """
        rows, columns = (cut(*it) for it in zip(self.cells, tile, overlap, strict=True))
        return Grid(rows, columns, self.size, self.scale.denominator)

    def whole(self) -> Any:
        """Call with the whole image."""
        return self.call(*self.args, **self.kwargs)

    def tile(self, grid: Grid, tile: Tile) -> Any:
        """Call with one tile."""
        args, kwargs = with_images(self.args, self.kwargs, lambda tensor, _: grid.crop(tensor, tile))
        return self.call(*args, **kwargs)

    def sample(self, sample: Sample) -> Any:
        """Call with a sample of the image."""
        args, kwargs = with_images(self.args, self.kwargs, lambda tensor, _: sample.of(tensor))
        return self.call(*args, **kwargs)

    def sample_size(self, sample: Sample) -> Size:
        """Height and width of a sample in pixels."""
        height, width = (
            length // cells * chosen
            for length, cells, chosen in zip(self.size, self.cells, sample.cells, strict=True)
        )
        return height, width


def tensor_of(output: Any) -> Tensor | None:
    """The tensor that a call returns: by itself, alone in a tuple, or as `sample` of an output class."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    found = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    return found if isinstance(found, Tensor) else None


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """A copy of what a call returns with another tensor in it."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple) and len(output) == 1:
        return (tensor,)
    changed = copy.copy(output)
    changed.sample = tensor
    return changed
