"""What the stages of an encoder or decoder do with an image, found by following passes without data.

A pass on a tall image and one on a wide image show where height and width stand in what each stage puts out,
whatever its other dimensions are. Passes on long images show how far each stage looks.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hookcore import skeleton_of
from hookcore_plugins.tiling.attention_masks import Deferring, Mask
from hookcore_plugins.tiling.crop import tensor_of, with_images
from hookcore_plugins.tiling.dependencies import Tracing, cells_away, seed
from hookcore_plugins.tiling.pass_record import Kept, PassRecord, image_of, with_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hookcore_plugins.tiling.discovery import Parts
    from hookcore_plugins.tiling.grid import Size
    from hookcore_plugins.tiling.pass_record import Shape

    PointCall = Callable[[nn.Module, Size], Any]
    """Calls a copy of the autoencoder so that the image at the point of tiling has a size."""

_TALL = {"encode": (128, 64), "decode": (16, 8)}  # pixels, latents; whole when halved six times
_WIDE = {"encode": (64, 192), "decode": (8, 24)}  # not the same area: what grows with it is known by that
_LENGTHS = (32, 96)
"""Cells of long images: a stage that looks from end to end in the longest one looks at everything."""

_SHORT = {"encode": 64, "decode": 8}
"""Pixels of their other side."""

END = -1
"""Number of all that follows the last stage of the chain."""


class NotTileableError(ValueError):
    """A model's passes cannot be taken apart; the text is a phrase for people."""


@frozen
class StageTrace:
    """What passes have shown.

    Attributes:
        size: Height and width of the tall image.
        wide_size: That of the wide one.
        tall: The pass on the tall image.
        wide: That on the wide image, which is larger.
        scale: How many times as large the output is.
        arguments: The shapes of the tensors that were given, without height and width.
        used: By stage of the chain (or `END`), the stages whose output it computes with.
        reach: By stage of the chain (or `END`), to how many cells away it looks at most, infinite where it
            looks at everything; empty if that was not asked for.
    """

    size: Size
    wide_size: Size
    tall: PassRecord
    wide: PassRecord
    scale: Fraction
    arguments: tuple[Shape, ...]
    used: dict[int, frozenset[int]] = field(factory=dict)
    reach: dict[int, float] = field(factory=dict)

    @property
    def mask(self) -> int:
        """Numbers in the largest attention mask over all pixels that cannot be made a few rows at a time."""
        return self.tall.mask if self.wide.mask > self.tall.mask else 0

    def chain(self) -> list[int]:
        """The smallest stages in order, up to the first that does not turn one image into another."""
        chain = []
        for stage in self.tall.chain():
            if self.axis(stage) is None:
                break
            chain.append(stage)
        return chain

    def can_be_cut(self, stage: int) -> bool:
        """Return whether a pass can go on from what a stage of the chain puts out.

        Height and width are its last dimensions, and later stages use nothing that earlier ones put out.
        """
        chain = self.chain()
        before = set(chain[: chain.index(stage)])
        later = [*chain[chain.index(stage) + 1 :], END]
        return self.axis(stage) == -2 and not any(before & self.used.get(it, frozenset()) for it in later)

    def stage_scale(self, stage: int) -> Fraction:
        """Return how many times as large as the image a stage's output is."""
        return Fraction(self.tall.outputs[stage][0][self.axis(stage) or -2], self.size[0])

    def shape(self, stage: int, call: int, size: Size) -> Shape:
        """The shape of what a stage puts out at a call of the spine, for an image of a size."""
        return self._resized(self.tall.outputs[stage][call], self.axis(stage) or -2, size)

    def result(self, call: int, size: Size) -> Shape:
        """The shape of what the spine puts out at a call, for an image of a size."""
        return self._resized(self.tall.results[call], -2, size)

    def returned(self, image: Tensor, kept: dict[int, Any]) -> Any:
        """Return what the spine returns with an image, if stages keep this of these frames."""

        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: filled(part) for key, part in value.items()}
            return kept.get(value.stage) if isinstance(value, Kept) else None

        return image if self.tall.memory is None else (image, filled(self.tall.memory))

    def axis(self, stage: int) -> int | None:
        """Return where height stands in what a stage puts out, with width after it; None: nowhere."""
        tall, wide = self.tall.outputs[stage][0], self.wide.outputs.get(stage, [()])[0]
        shapes = {self.size: tall, self.wide_size: wide}
        return next((it for it in (-2, -3) if _proportional(shapes, it)), None)

    def _resized(self, shape: Shape, axis: int, size: Size) -> Shape:
        resized = list(shape)
        for dim, own, seen in zip((axis, axis + 1), size, self.size, strict=True):
            resized[dim] = shape[dim] * own // seen
        return tuple(resized)


def _proportional(shapes: dict[Size, Shape], axis: int) -> bool:
    """Return whether two dimensions are height and width: they change with the image's, and no other does.

    Args:
        shapes: Sizes of images, with the shapes of what was made of them.
        axis: The dimension that may be the height, counted from the end; width comes after it.
    """
    lengths = {len(shape) for shape in shapes.values()}
    if len(lengths) > 1 or lengths.pop() < 4:
        return False
    sides = [(shape[axis], shape[axis:][1]) for shape in shapes.values()]
    others = {(*shape[:axis], *shape[axis:][2:]) for shape in shapes.values()}
    ratios = {
        Fraction(*it) for size, own in zip(shapes, sides, strict=True) for it in zip(own, size, strict=True)
    }
    return len(others) == 1 and len(ratios) == 1 and ratios.pop() > 0


def shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Shape, ...]:
    """The shapes of the tensors among arguments, without height and width."""
    return tuple(tuple(it.shape[:-2]) for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor))


def trace_stages(module: nn.Module, parts: Parts, call: PointCall) -> StageTrace:
    """Follow passes on a tall and on a wide image.

    Args:
        module: The autoencoder. It is copied without data; nothing is computed.
        parts: What of it is hooked.
        call: Calls the copy.

    Raises:
        NotTileableError: A pass cannot be followed, or the output is not in proportion to the image.
    """
    size, wide_size = _TALL[parts.method], _WIDE[parts.method]
    tall = _Pass(module, parts, call, size)
    wide = _Pass(module, parts, call, wide_size, chain=tall.record.chain())
    found = {size: tuple(tall.output.shape), wide_size: tuple(wide.output.shape)}
    if not _proportional(found, -2):
        raise NotTileableError(
            f"what its {parts.method}() puts out is not in proportion to the image: it makes "
            + " and ".join(
                f"{shape} of {height} x {width} pixels" for (height, width), shape in found.items()
            )
        )
    scale = Fraction(found[size][-2], size[0])
    if 1 not in (scale.numerator, scale.denominator):
        raise NotTileableError(
            f"its {parts.method}() makes images {scale} times as large, expected a whole number or 1 over it"
        )
    trace = StageTrace(size, wide_size, tall.record, wide.record, scale, tall.arguments)
    return evolve(trace, used=_within(trace.chain(), wide.used))


def _within(chain: list[int], used: dict[int, frozenset[int]]) -> dict[int, frozenset[int]]:
    """Return what stages of a chain compute with, where `used` knows of more stages, which are not in it."""

    def sources(stage: int) -> frozenset[int]:
        found = (frozenset({it}) if it in chain else sources(it) for it in used[stage])
        return frozenset().union(*found)

    return {stage: sources(stage) for stage in (*chain, END)}


def with_reach(
    trace: StageTrace, module: nn.Module, parts: Parts, call: PointCall, stages: Iterable[int]
) -> StageTrace:
    """Find how far stages look, from passes on images that are long along one axis.

    Args:
        trace: What the stages do.
        module: As for `trace_stages`.
        parts: Likewise.
        call: Likewise.
        stages: Stages whose reach is wanted.
    """
    wanted, cell = set(stages), trace.scale.denominator
    for length in _LENGTHS:
        size = length * cell, max(_SHORT[parts.method], 2 * cell)
        both = (
            _Pass(module, parts, call, it, chain=trace.chain(), along=(trace, axis)).reach
            for axis, it in enumerate((size, size[::-1]))
        )
        down, across = both
        trace = evolve(trace, reach={stage: max(found, across[stage]) for stage, found in down.items()})
        if not any(math.isinf(trace.reach[stage]) for stage in wanted):
            break
    return trace


class _Pass:
    """A pass through a copy of a model without data.

    Args:
        module: The model.
        parts: What of it is hooked.
        call: Calls the copy.
        size: Height and width of the image.
        chain: Stages in order, whose dependencies are wanted.
        along: What stages do, and the axis of the image along which to see how far those of the chain look:
            0 for height, 1 for width; None: that is not wanted.

    Attributes:
        record: What was put out.
        output: What the point of tiling puts out.
        arguments: The shapes of the tensors that were given there, without height and width.
        used: By stage of the chain (or `END`), the stages whose output it computes with.
        reach: By stage of the chain (or `END`), to how many cells away it looks.

    Raises:
        NotTileableError: The pass fails.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Parts,
        call: PointCall,
        size: Size,
        *,
        chain: Sequence[int] = (),
        along: tuple[StageTrace, int] | None = None,
    ) -> None:
        self.record = PassRecord()
        self.output: Tensor
        self.arguments: tuple[Shape, ...] = ()
        self.used: dict[int, frozenset[int]] = {}
        self.reach: dict[int, float] = {}
        self._chain = frozenset(chain)
        self._along = along
        self._size = size
        self._tracing = Tracing()
        try:
            model = skeleton_of(module)
            _stand_around(model.get_submodule(parts.spine), "forward", self._spine)
            for number, stage in enumerate(parts.stages):
                _stand_around(model.get_submodule(stage), "forward", partial(self._stage, number))
            fqn, entry = parts.point
            _stand_around(model.get_submodule(fqn), entry, self._point)
            with torch.no_grad(), Deferring(), _Masks(self.record), self._tracing:
                call(model, size)
        except NotTileableError:
            raise
        except Exception as error:  # whatever a model raises
            raise NotTileableError(
                f"its {parts.method}() fails where it is followed without data: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _point(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dim = None if self._along is None else self._along[1] - 2
        self.arguments = shapes_of(args, kwargs)
        args, kwargs = with_images(args, kwargs, lambda image, times: seed(image, dim, float(1 / times)))
        output = call(*args, **kwargs)
        tensor = tensor_of(output)
        if tensor is None or tensor.ndim < 4:
            raise NotTileableError(
                f"it puts out {type(output).__name__}, expected a tensor with height and width"
            )
        self.output = tensor
        self._look(END, tensor)
        return output

    def _spine(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        self.record.leave_spine(output)
        return output

    def _stage(self, number: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.record.enter(args[0] if args else None)
        output = call(*args, **kwargs)
        if number in self._chain:
            image = image_of(output)
            assert image is not None  # noqa: S101 -- or it would not be in the chain
            dim, pixels = self._look(number, image)
            output = with_image(output, seed(image, dim, float(pixels), frozenset({number})))
        self.record.leave(number, output)
        return output

    def _look(self, stage: int, image: Any) -> tuple[int | None, Fraction]:
        """Note what a stage's output depends on.

        Returns:
            The dimension of its rows, and how many pixels of the image each is made of.
        """
        self.used[stage] = self.used.get(stage, frozenset()) | image.sources
        if self._along is None:
            return None, Fraction(1)
        trace, along = self._along
        axis, scale = (-2, trace.scale) if stage == END else (trace.axis(stage), trace.stage_scale(stage))
        assert axis is not None  # noqa: S101 -- or it would not be in the chain
        pixels = 1 / scale
        found = cells_away(image, axis + along, pixels, trace.scale.denominator, self._size[along])
        if self._tracing.positions:
            found = math.inf
            self._tracing.positions.clear()
        self.reach[stage] = max(self.reach.get(stage, 0.0), found)
        return axis + along, pixels


class _Masks(TorchFunctionMode):
    """Notes how large attention masks are, but for those that are made a few rows at a time."""

    def __init__(self, record: PassRecord) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            mask = (kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None and not isinstance(mask, Mask):
                self._record.mask = max(self._record.mask, mask.shape[-2:].numel())
        return func(*args, **(kwargs or {}))


def _stand_around(module: nn.Module, entry: str, around: Callable[..., Any]) -> None:
    module.__dict__[entry] = partial(around, getattr(module, entry))
