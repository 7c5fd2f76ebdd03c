"""What a user asks for, and the hooks that it becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from attrs import field, frozen

from hookcore import Binding, Claim, Hook, Phase, Resource, Technique, parse_device
from hookcore_plugins.tiling.discovery import find_parts, why_not
from hookcore_plugins.tiling.partial_forward import PartialForward, SpineHook, StageHook
from hookcore_plugins.tiling.tiler import Tiler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from attrs import Attribute
    from torch import nn

    from hookcore import Component

Context = Literal["global", "exact", "tile"]
Size = tuple[int, int]


def _size(value: int | tuple[int, int] | None) -> Size | None:
    if value is None or isinstance(value, tuple):
        return value
    return (value, value)


def _device(value: torch.device | str | int | None) -> torch.device | None:
    return None if value is None else parse_device(value)


@frozen
class Tiling(Technique):
    """Encodes and decodes images tile by tile: activations of one tile are in memory.

    Tiles overlap, are of equal size, and are blended where they meet. An image of one tile is passed on as it
    is. Videos are cut across height and width; each tile has all frames.

    Attributes:
        tile_size: Height and width of a tile in pixels of the image, or one number for both. None: the size
            that the model was trained on, if it says so, or 512.
        overlap: How many pixels neighbours have in common at least, likewise. None: a quarter of a tile.
        context: What a tile is computed with besides itself. "global": what is cheap for the whole image is
            computed for the whole image (the part of the model at low resolution, with its attention), and
            group norms use statistics of the whole image, estimated on samples of it. "exact": every stage is
            computed for all tiles before the next, with what the whole image has there: the untiled image up
            to rounding, in more time and host memory. "tile": nothing, as in diffusers.
        offload_device: Where a decoded image is put together; None: where the model computes. What lies
            between stages is kept there, too; None: on the CPU.
    """

    name: ClassVar[str] = "tiling"
    phase: ClassVar[Phase] = Phase.SPLIT
    after: ClassVar[tuple[str, ...]] = ("slicing",)

    tile_size: Size | None = field(default=None, converter=_size)
    overlap: Size | None = field(default=None, converter=_size)
    context: Context = field(default="global", kw_only=True)
    offload_device: torch.device | None = field(default=None, converter=_device, kw_only=True)

    @tile_size.validator
    def _check_tile_size(self, _attribute: Attribute[Any], value: Size | None) -> None:
        _check_pair("tile_size", value, at_least=1)

    @overlap.validator
    def _check_overlap(self, _attribute: Attribute[Any], value: Size | None) -> None:
        _check_pair("overlap", value, at_least=0)
        if (
            value
            and self.tile_size
            and any(2 * it > size for it, size in zip(value, self.tile_size, strict=True))
        ):
            raise ValueError(
                f"overlap is {value}, expected at most half of tile_size={self.tile_size}: tiles would be "
                "computed more than twice over"
            )

    @context.validator
    def _check_context(self, _attribute: Attribute[str], value: str) -> None:
        if value not in get_args(Context):
            known = " or ".join(map(repr, get_args(Context)))
            raise ValueError(f"context is {value!r}; choose {known}")

    def skip_unless_named(self, component: Component) -> str | None:
        """Return why a component of a pipeline is left alone unless it is named; None for an autoencoder."""
        return why_not(component)

    def bind(self, component: Component) -> Iterator[Binding]:
        """List the hooks at what is called for each tile, at encoder and decoder, and at their stages.

        Raises:
            PlanError: The component cannot be tiled.
        """
        for parts in find_parts(component):
            shared = PartialForward()
            tiler = Tiler(self, component.label(""), parts, component.module, shared)
            fqn, entry = parts.point
            yield Binding(fqn, _TilingHook(tiler), entry, [Claim(Resource.SPATIAL_SPLIT)])
            if self.context != "tile":
                yield Binding(parts.spine, SpineHook(shared))
                for number, stage in enumerate(parts.stages):
                    yield Binding(stage, StageHook(shared, number))


def _check_pair(name: str, value: object, *, at_least: int) -> None:
    if value is None:
        return
    numbers = value if isinstance(value, tuple) else ()
    if len(numbers) != 2 or any(type(it) is not int or it < at_least for it in numbers):
        raise ValueError(
            f"{name} is {value!r}, expected a number of pixels of {at_least} or more, or two: (height, width)"
        )


class _TilingHook(Hook):
    """Calls what it stands around once for each tile."""

    def __init__(self, tiler: Tiler) -> None:
        self._tiler = tiler

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the output for the whole image."""
        return self._tiler.run(call, args, kwargs)
