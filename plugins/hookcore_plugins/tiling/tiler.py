"""In which order the passes of a tiled call run, and what each is given."""

from __future__ import annotations

import contextlib
import sys
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from hookcore import PlanError
from hookcore_plugins.tiling.attention_masks import Deferring
from hookcore_plugins.tiling.crop import ImageCall, image_in, tensor_of, with_tensor
from hookcore_plugins.tiling.discovery import CLEAR, check_not_tiling
from hookcore_plugins.tiling.grid import Canvas, Grid, cut
from hookcore_plugins.tiling.layer_by_layer import Features, step
from hookcore_plugins.tiling.norm_statistics import Measured, Measuring, Recorded, Replayed, averaged
from hookcore_plugins.tiling.samples import samples
from hookcore_plugins.tiling.split_point import Cut, choose_cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from hookcore_plugins.tiling.crop import Size
    from hookcore_plugins.tiling.grid import Tile
    from hookcore_plugins.tiling.norm_statistics import Moments
    from hookcore_plugins.tiling.partial_forward import Passes
    from hookcore_plugins.tiling.samples import Sample
    from hookcore_plugins.tiling.stage_trace import Course
    from hookcore_plugins.tiling.technique import Tiling

_PROBE = {"encode": (128, 64), "decode": (16, 8)}  # pixels, latents; no square, to tell height from width
_TILE = 512

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Sizes of tiles to choose from, as shares of the one that was asked for."""

_BLENDED = {"tile": 1.0, "global": 0.5, "exact": 0.5}
"""How much of an overlap is blended. What tiles disagree about is spread over all of it; where they agree but
for what lies behind their borders, they have come closest in its middle."""


@frozen
class _Learned:
    """What a pass through the model with a small part of an image has shown.

    Attributes:
        scale: How many times as large the output is.
        course: What the stages did.
        norms: How many group norms there are.
    """

    scale: Fraction
    course: Course
    norms: int


class Tiler:
    """Computes one method of an autoencoder tile by tile.

    Args:
        options: The technique.
        label: The module's name, for messages.
        method: "encode" or "decode".
        module: The autoencoder.
        passes: What the hooks on the stages share.
    """

    def __init__(self, options: Tiling, label: str, method: str, module: nn.Module, passes: Passes) -> None:
        self._options = options
        self._module = module
        self._label = label
        self._method = method
        self._passes = passes
        self._tile_size = options.tile_size or _trained_size(module)
        self._forget_frames = getattr(module, CLEAR, None)
        self._aside = options.offload_device or torch.device("cpu")
        self._blended = _BLENDED[options.context]
        self._learned: dict[Any, _Learned] = {}

    def reset(self) -> None:
        """Forgets what the model was seen to do."""
        self._learned.clear()

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls with one tile after the other.

        Raises:
            PlanError: The output of a tile is not what a spatially local model puts out, or the model has
                begun to tile by itself.
        """
        image = image_in(args, kwargs)
        if image is None or self._is_small(image):
            return call(*args, **kwargs)
        check_not_tiling(self._module, self._label)
        learned = self._learn(call, args, kwargs, image)
        whole = ImageCall(call, args, kwargs, _size_of(image), learned.scale)
        grid = self._grid(whole)
        if len(grid.tiles) == 1:
            return whole.whole()
        if self._options.context == "tile":
            return self._by_tiles(whole, grid, whole.tile)
        with _uncompiled():
            return self._encode(whole, learned) if self._method == "encode" else self._decode(whole, learned)

    # Passes

    def _decode(self, whole: ImageCall, learned: _Learned) -> Any:
        """Begins with the whole image, and goes on tile by tile where that would take more memory."""
        grid, taken = self._planned(whole, learned, from_the_end=False)
        features = _nothing(whole)
        if taken is not None:
            features = self._together(whole, learned, taken)
        if self._options.context == "exact":
            features = self._stepped(whole, learned, features, learned.course.chain()[:-1])
        return self._ended(whole, learned, grid, features)

    def _encode(self, whole: ImageCall, learned: _Learned) -> Any:
        """Begins tile by tile, and goes on with the whole image where that takes little memory."""
        grid, taken = self._planned(whole, learned, from_the_end=True)
        features = _nothing(whole)
        if self._options.context == "exact":
            stages = learned.course.chain()[:-1] if taken is None else taken.stages
            features = self._stepped(whole, learned, features, stages)
        elif taken is not None:
            features = self._begun(whole, learned, grid, taken)
        if taken is None and self._options.context == "global":
            # Statistics estimated for every stage are worse than a tile's own (HunyuanVideo: 1.6 times).
            return self._by_tiles(whole, grid, whole.tile)
        if taken is None:
            return self._ended(whole, learned, grid, features)
        device = whole.device
        together = [it.to(device) for it in features.tensors]
        stages = features.stages
        del features
        with Deferring(), self._passes.between(stages, together, None, learned.course, whole.size):
            return whole.whole()

    def _together(self, whole: ImageCall, learned: _Learned, taken: Cut) -> Features:
        """What the stages before a cut put out for the whole image.

        Each is a pass of its own: blocks hold on to what they were given as long as they compute.
        """
        given: list[Tensor] = []
        done = 0
        for number, stage in enumerate(taken.stages, 1):
            if not learned.course.can_be_cut(stage):
                continue
            between = self._passes.between(taken.stages[:done], given, stage, learned.course, whole.size)
            with Deferring(), between as kept:
                whole.whole()
            given, done = kept, number
        aside = tuple(it.to(self._aside) for it in given)
        return Features(taken.stages, aside, int(taken.scale), whole.cells)

    def _begun(self, whole: ImageCall, learned: _Learned, grid: Grid, taken: Cut) -> Features:
        """What the stages before a cut put out, tile by tile."""
        last, nothing = taken.stages[-1], _nothing(whole)

        def on_sample(sample: Sample) -> None:
            with self._between(learned, whole.sample_size(sample), nothing, [], last):
                whole.sample(sample)

        moments = self._estimated(whole, grid, learned, on_sample)
        scale = int(taken.scale * whole.scale.denominator)
        canvases = [Canvas(grid, scale, self._blended, self._aside) for _ in range(learned.course.calls)]
        for tile in grid.tiles:
            with Replayed(moments), self._between(learned, whole.tile_size(tile), nothing, [], last) as kept:
                whole.tile(tile)
            for canvas, feature in zip(canvases, kept, strict=True):
                self._add(canvas, tile, feature)
        tensors = tuple(canvas.whole for canvas in canvases if canvas.whole is not None)
        return Features(taken.stages, tensors, scale, whole.cells)

    def _ended(self, whole: ImageCall, learned: _Learned, grid: Grid, features: Features) -> Any:
        """What a pass puts out that begins with these features, tile by tile."""

        def on_sample(sample: Sample) -> None:
            parts = [sample.of(it).to(device) for it in features.tensors]
            with self._between(learned, whole.sample_size(sample), features, parts, None):
                whole.sample(sample)

        def on_tile(tile: Tile) -> Any:
            parts = features.of(tile, device)
            with self._between(learned, whole.tile_size(tile), features, parts, None):
                return whole.tile(tile)

        device = whole.device
        if self._options.context == "exact":
            moments = self._measured(grid, on_tile)
        else:
            moments = self._estimated(whole, grid, learned, on_sample)

        def computed(tile: Tile) -> Any:
            with Replayed(moments):
                return on_tile(tile)

        return self._by_tiles(whole, grid, computed)

    def _stepped(
        self, whole: ImageCall, learned: _Learned, features: Features, stages: Sequence[int]
    ) -> Features:
        """What the last of these stages puts out, if they are computed one after the other."""
        device = whole.device

        def between(before: Features, tile: Tile, last: int | None) -> AbstractContextManager[list[Tensor]]:
            return self._between(learned, whole.tile_size(tile), before, before.of(tile, device), last)

        pending: tuple[int, ...] = ()
        for stage in stages[len(features.stages) :]:
            pending = (*pending, stage)
            if not learned.course.can_be_cut(stage):
                continue
            features = step(
                features,
                pending,
                whole=whole,
                course=learned.course,
                tile=self._nominal(whole),
                device=self._aside,
                between=between,
                forget=self._forget_frames,
            )
            pending = ()
        return features

    def _between(
        self, learned: _Learned, size: Size, before: Features, parts: Sequence[Tensor], last: int | None
    ) -> AbstractContextManager[list[Tensor]]:
        return self._passes.between(before.stages, parts, last, learned.course, size)

    def _by_tiles(self, whole: ImageCall, grid: Grid, computed: Callable[[Tile], Any]) -> Any:
        # Latents are small, and the model goes on with them.
        device = self._options.offload_device if self._method == "decode" else None
        canvas = Canvas(grid, whole.scale.numerator, self._blended, device)
        for tile in grid.tiles:
            output = computed(tile)
            self._add(canvas, tile, self._tensor(output))
        assert canvas.whole is not None  # noqa: S101 -- there are tiles
        return with_tensor(output, canvas.whole)

    def _add(self, canvas: Canvas, tile: Tile, pixels: Tensor) -> None:
        try:
            canvas.add(tile, pixels)
        except ValueError as error:
            raise self._not_local(str(error)) from error

    # Statistics

    def _estimated(
        self, whole: ImageCall, grid: Grid, learned: _Learned, on_sample: Callable[[Sample], object]
    ) -> list[Moments]:
        """Statistics of the whole image for the norms in tiles, from samples of it."""
        if not learned.norms:
            return []
        found = []
        for sample in samples(whole.cells, grid, self._method):
            with Recorded(sample.in_patches) as seen:
                on_sample(sample)
            found.append(seen.moments)
        return [averaged(moments) for moments in zip(*found, strict=True)]

    def _measured(self, grid: Grid, on_tile: Callable[[Tile], object]) -> list[Moments]:
        """Statistics of the norms in tiles, one norm after the other, since each depends on all before it.

        Every pixel is measured in the one tile in whose middle it lies.
        """
        found: list[Moments] = []
        while True:
            parts: list[tuple[Moments, int]] = []  # not the exceptions, which hold a tile's activations
            for tile in grid.tiles:
                try:
                    with Measuring(found, partial(grid.in_core, tile)):
                        on_tile(tile)
                except Measured as part:
                    parts.append((part.moments, part.pixels))
                    if self._forget_frames is not None:
                        self._forget_frames()
                else:
                    return found  # there is no other norm
            found.append(averaged(*zip(*parts, strict=True)))

    # What is known of the model

    def _learn(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], image: Tensor
    ) -> _Learned:
        key = (image.shape[:-2], image.dtype)
        if key not in self._learned:
            small = ImageCall(call, args, kwargs, _size_of(image), Fraction(1))
            # Powers of two, so that nothing is left over where it is made smaller.
            height, width = (
                min(probe, 1 << it.bit_length() - 1)
                for probe, it in zip(_PROBE[self._method], small.size, strict=True)
            )
            corner = Grid.corner(height, width if width != height else max(1, width // 2))
            with _uncompiled(), self._passes.watch() as course, Recorded() as seen, Deferring():
                output = self._tensor(small.tile(corner))
            course.mask = seen.mask
            course.size = small.tile_size(corner)
            self._learned[key] = _Learned(self._scale(course.size, output), course, len(seen.moments))
        return self._learned[key]

    def _scale(self, size: Size, output: Tensor) -> Fraction:
        """How many times as large the output is, along both axes alike."""
        longer = 0 if size[0] >= size[1] else 1
        scale = Fraction(output.shape[-2:][longer], size[longer])
        fits = output.shape[-2:].numel() and all(
            abs(it - length * scale) < 1 for it, length in zip(output.shape[-2:], size, strict=True)
        )
        if not fits or 1 not in (scale.numerator, scale.denominator):
            raise self._not_local(f"{size} pixels came out as {tuple(output.shape[-2:])}")
        return scale

    def _tensor(self, output: Any) -> Tensor:
        tensor = tensor_of(output)
        if tensor is None or tensor.ndim < 4:
            raise self._not_local(
                f"it puts out {type(output).__name__}, expected a tensor with height and width"
            )
        return tensor

    def _not_local(self, found: str) -> PlanError:
        return PlanError(
            f"{self._method}() of {self._label!r} cannot be tiled: {found}. Call applied.remove(), or leave "
            "the component out"
        )

    def _is_small(self, image: Tensor) -> bool:
        """Whether the image is no larger than a tile, where that can be told without knowing the model."""
        return self._method == "encode" and all(
            length <= tile for length, tile in zip(_size_of(image), self._tile_size, strict=True)
        )

    def _nominal(self, whole: ImageCall) -> Size:
        """Cells of a tile of the size that was asked for."""
        pixels = max(whole.scale.numerator, whole.scale.denominator)
        height, width = (max(1, it // pixels) for it in self._tile_size)
        return height, width

    def _grid(self, whole: ImageCall, share: float = 1.0) -> Grid:
        """Tiles of the size that was asked for, or of a share of it."""
        pixels = max(whole.scale.numerator, whole.scale.denominator)
        overlap = self._options.overlap or tuple(it // 4 for it in self._tile_size)
        spans = []
        for cells, nominal, common in zip(whole.cells, self._nominal(whole), overlap, strict=True):
            tile = max(1, int(nominal * share))
            spans.append(cut(cells, tile, min(common // pixels, tile // 2)))
        return Grid(*spans)

    def _planned(self, whole: ImageCall, learned: _Learned, *, from_the_end: bool) -> tuple[Grid, Cut | None]:
        """The tiles, and the cut behind which they begin or end: the one that leaves least to tiles.

        Somewhat smaller tiles may leave room for what more stages for the whole image put out.
        """
        nominal = self._nominal(whole)
        best = None
        for share in _SHARES:
            grid = self._grid(whole, share)
            taken = choose_cut(learned.course, grid, nominal, from_the_end=from_the_end)
            if taken is None:
                return grid, None
            left = len(taken.stages) if from_the_end else -len(taken.stages)
            rank = not taken.fits, left
            if best is None or rank < best[0]:
                best = rank, grid, taken
        assert best is not None  # noqa: S101 -- there are shares
        return best[1:]


def _size_of(image: Tensor) -> Size:
    height, width = image.shape[-2:]
    return height, width


def _nothing(whole: ImageCall) -> Features:
    """What there is before the first stage."""
    return Features((), (), whole.scale.denominator, whole.cells)


def _trained_size(module: nn.Module) -> Size:
    """The size that the model was made for, where it says so in diffusers' way."""
    height = getattr(module, "tile_sample_min_height", None)
    width = getattr(module, "tile_sample_min_width", None)
    both = getattr(module, "tile_sample_min_size", None)
    found = [height, width] if height and width else [both, both]
    rows, columns = (it if isinstance(it, int) else _TILE for it in found)
    return rows, columns


def _uncompiled() -> AbstractContextManager[object]:
    """Has compiled code leave the work to what it was compiled from.

    For statistics from outside torch would compile it anew at every call, up to its limit.
    """
    known = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if known else contextlib.nullcontext()
