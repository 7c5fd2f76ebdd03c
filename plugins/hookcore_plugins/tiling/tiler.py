"""One method of an autoencoder, computed tile by tile: the order of its passes, and what each is given."""

from __future__ import annotations

import contextlib
import math
import sys
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from hookcore import PlanError
from hookcore_plugins.tiling.attention_masks import Deferring
from hookcore_plugins.tiling.blend import Canvas
from hookcore_plugins.tiling.crop import ImageCall, image_in, size_of, tensor_of, with_images, with_tensor
from hookcore_plugins.tiling.discovery import CLEAR, check_not_tiling
from hookcore_plugins.tiling.example_calls import example_calls
from hookcore_plugins.tiling.layer_by_layer import Features, compute_by_tiles
from hookcore_plugins.tiling.norm_statistics import Recorded, Replayed, averaged
from hookcore_plugins.tiling.samples import samples
from hookcore_plugins.tiling.split_point import SplitPoint, choose_split_point, stages_in_tiles
from hookcore_plugins.tiling.stage_trace import (
    END,
    NotTileableError,
    StageTrace,
    shapes_of,
    trace_stages,
    with_reach,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from hookcore_plugins.tiling.discovery import Parts
    from hookcore_plugins.tiling.grid import Grid, Size, Tile
    from hookcore_plugins.tiling.norm_statistics import Moments
    from hookcore_plugins.tiling.partial_forward import PartialForward
    from hookcore_plugins.tiling.pass_record import Shape
    from hookcore_plugins.tiling.samples import Sample
    from hookcore_plugins.tiling.stage_trace import PointCall
    from hookcore_plugins.tiling.technique import Tiling

_TILE = 512

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Sizes of tiles to choose from, as shares of the one that was asked for."""

_BLENDED = {"tile": 1.0, "global": 0.5, "exact": 0.5}
"""How much of an overlap is blended. What tiles disagree about is spread over all of it; where they agree but
for what lies behind their borders, they have come closest in its middle."""


class Tiler:
    """Computes one method of an autoencoder tile by tile.

    Args:
        options: The technique.
        label: The module's name, for messages.
        parts: What of the autoencoder is hooked.
        module: The autoencoder.
        partial_forward: What the hooks on the stages share.

    Raises:
        PlanError: The method cannot be tiled.
    """

    def __init__(
        self,
        options: Tiling,
        label: str,
        parts: Parts,
        module: nn.Module,
        partial_forward: PartialForward,
    ) -> None:
        self._options = options
        self._module = module
        self._label = label
        self._parts = parts
        self._partial = partial_forward
        self._is_encoder = parts.method == "encode"
        self._tile_size = options.tile_size or _trained_size(module)
        self._forget_frames = getattr(module, CLEAR, None)
        self._aside = options.offload_device or torch.device("cpu")
        self._blended = _BLENDED[options.context]
        trace = self._example()
        self._traces: dict[tuple[Shape, ...], StageTrace] = {trace.arguments: trace}

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call with one tile after the other.

        Raises:
            PlanError: With these arguments the method cannot be tiled, or the model has begun to tile by
                itself.
        """
        image = image_in(args, kwargs)
        if image is None or self._is_small(image):
            return call(*args, **kwargs)
        check_not_tiling(self._module, self._label)
        trace = self._trace(args, kwargs)
        whole = ImageCall(call, args, kwargs, size_of(image), trace.scale)
        grid = self._grid(whole)
        if len(grid.tiles) == 1:
            return whole.whole()
        if self._options.context == "tile":
            return self._blend(whole, grid, lambda tile: whole.tile(grid, tile))
        with _uncompiled():
            return self._encode(whole, trace) if self._is_encoder else self._decode(whole, trace)

    # Passes

    def _decode(self, whole: ImageCall, trace: StageTrace) -> Any:
        """Begin with the whole image, and goes on tile by tile where that would take more memory."""
        grid, point = self._split(whole, trace)
        features = Features() if point is None else self._begin_whole(whole, trace, point)
        if self._options.context == "exact":
            features = self._layer_by_layer(whole, trace, features, trace.chain()[:-1])
            return self._end_exactly(whole, trace, features)
        return self._end_by_tiles(whole, trace, grid, features)

    def _encode(self, whole: ImageCall, trace: StageTrace) -> Any:
        """Begin tile by tile, and goes on with the whole image where that takes little memory."""
        grid, point = self._split(whole, trace)
        if self._options.context == "exact":
            stages = trace.chain()[:-1] if point is None else point.stages
            features = self._layer_by_layer(whole, trace, Features(), stages)
            if point is None:
                return self._end_exactly(whole, trace, features)
        elif point is None:
            # Statistics estimated for every stage are worse than a tile's own (HunyuanVideo: 1.6 times).
            return self._blend(whole, grid, lambda tile: whole.tile(grid, tile))
        else:
            features = self._begin_by_tiles(whole, trace, grid, point)
        together = [it.to(whole.device) for it in features.tensors]
        stages = features.stages
        del features
        with Deferring(), self._partial.between(stages, together, None, trace, whole.size):
            return whole.whole()

    def _begin_whole(self, whole: ImageCall, trace: StageTrace, point: SplitPoint) -> Features:
        """Return what the stages before a point put out for the whole image.

        Each is a pass of its own: blocks hold on to what they were given as long as they compute.
        """
        given: list[Tensor] = []
        done = 0
        for number, stage in enumerate(point.stages, 1):
            if not trace.can_be_cut(stage):
                continue
            between = self._partial.between(point.stages[:done], given, stage, trace, whole.size)
            with Deferring(), between as outputs:
                whole.whole()
            given, done = outputs, number
        return Features(point.stages, tuple(it.to(self._aside) for it in given))

    def _begin_by_tiles(self, whole: ImageCall, trace: StageTrace, grid: Grid, point: SplitPoint) -> Features:
        """Return what the stages before a point put out, tile by tile."""
        last = point.stages[-1]

        def on_sample(sample: Sample) -> None:
            with self._between(trace, whole.sample_size(sample), Features(), [], last):
                whole.sample(sample)

        moments = self._estimate(whole, grid, on_sample)
        scale = int(point.scale * whole.scale.denominator)
        canvases: list[Canvas] = []
        for tile in grid.tiles:
            between = self._between(trace, grid.size_of(tile), Features(), [], last)
            with Replayed(moments), between as outputs:
                whole.tile(grid, tile)
            canvases = canvases or [Canvas(grid, scale, self._blended, self._aside) for _ in outputs]
            for canvas, output in zip(canvases, outputs, strict=True):
                self._add(canvas, tile, output)
        return Features(point.stages, tuple(it.whole for it in canvases if it.whole is not None))

    def _end_by_tiles(self, whole: ImageCall, trace: StageTrace, grid: Grid, features: Features) -> Any:
        """Return what a pass puts out that begins with these features, tile by tile."""

        def on_sample(sample: Sample) -> None:
            parts = [sample.of(it).to(whole.device) for it in features.tensors]
            with self._between(trace, whole.sample_size(sample), features, parts, None):
                whole.sample(sample)

        moments = self._estimate(whole, grid, on_sample)

        def on_tile(tile: Tile) -> Any:
            with Replayed(moments):
                return self._end_of(whole, trace, features, grid, tile)

        return self._blend(whole, grid, on_tile)

    def _layer_by_layer(
        self, whole: ImageCall, trace: StageTrace, features: Features, stages: Sequence[int]
    ) -> Features:
        """Return what the last of these stages puts out, if they are computed one after the other."""
        pending: tuple[int, ...] = ()
        for stage in stages[len(features.stages) :]:
            pending = (*pending, stage)
            if not trace.can_be_cut(stage):
                continue

            def on_tile(
                grid: Grid, tile: Tile, before: Features = features, last: int = stage
            ) -> Sequence[Tensor]:
                parts = before.crop(grid, tile, whole.device)
                with self._between(trace, grid.size_of(tile), before, parts, last) as outputs:
                    whole.tile(grid, tile)
                return outputs

            tensors = compute_by_tiles(
                whole,
                on_tile,
                reach=sum(trace.reach[it] for it in pending),
                tile=self._nominal(whole),
                scale=int(trace.stage_scale(stage) * whole.scale.denominator),
                device=self._aside,
                forget=self._forget_frames,
            )
            features, pending = Features((*features.stages, *pending), tensors), ()
        return features

    def _end_exactly(self, whole: ImageCall, trace: StageTrace, features: Features) -> Any:
        """Return what a pass puts out that begins with these features, as if it was computed at once."""
        output = None

        def on_tile(grid: Grid, tile: Tile) -> Sequence[Tensor]:
            nonlocal output
            output = self._end_of(whole, trace, features, grid, tile)
            return [self._tensor(output)]

        (tensor,) = compute_by_tiles(
            whole,
            on_tile,
            reach=sum(trace.reach[it] for it in (*trace.chain()[len(features.stages) :], END)),
            tile=self._nominal(whole),
            scale=whole.scale.numerator,
            device=self._output_device(),
            forget=self._forget_frames,
        )
        return with_tensor(output, tensor)

    def _end_of(self, whole: ImageCall, trace: StageTrace, features: Features, grid: Grid, tile: Tile) -> Any:
        """Return what a pass with a tile puts out that begins with its part of these features."""
        parts = features.crop(grid, tile, whole.device)
        with self._between(trace, grid.size_of(tile), features, parts, None):
            return whole.tile(grid, tile)

    def _between(
        self,
        trace: StageTrace,
        size: Size,
        before: Features,
        parts: Sequence[Tensor],
        last: int | None,
    ) -> AbstractContextManager[list[Tensor]]:
        return self._partial.between(before.stages, parts, last, trace, size)

    def _blend(self, whole: ImageCall, grid: Grid, on_tile: Callable[[Tile], Any]) -> Any:
        canvas = Canvas(grid, whole.scale.numerator, self._blended, self._output_device())
        for tile in grid.tiles:
            output = on_tile(tile)
            self._add(canvas, tile, self._tensor(output))
        assert canvas.whole is not None  # noqa: S101 -- there are tiles
        return with_tensor(output, canvas.whole)

    def _output_device(self) -> torch.device | None:
        # Latents are small, and the model goes on with them.
        return None if self._is_encoder else self._options.offload_device

    def _add(self, canvas: Canvas, tile: Tile, pixels: Tensor) -> None:
        try:
            canvas.add(tile, pixels)
        except ValueError as error:
            raise self._refusal(str(error)) from error

    def _estimate(self, whole: ImageCall, grid: Grid, on_sample: Callable[[Sample], object]) -> list[Moments]:
        """Statistics of the whole image for the norms in tiles, from samples of it."""
        found: list[list[Moments]] = []
        for sample in samples(whole.cells, grid, self._parts.method):
            with Recorded(sample.in_patches) as seen:
                on_sample(sample)
            found.append(seen.moments)
            if not seen.moments:
                break  # no group norms
        return [averaged(moments) for moments in zip(*found, strict=True)]

    # What is known of the model

    def _example(self) -> StageTrace:
        """Follow the method with an image of which nothing is known but what the model's layers take."""
        first: NotTileableError | None = None
        try:
            for call in example_calls(self._module, self._parts):
                try:
                    trace = trace_stages(self._module, self._parts, call)
                except NotTileableError as error:
                    first = first or error
                else:
                    return self._with_reach(trace, call)
        except NotTileableError as error:
            first = error
        raise self._refusal(str(first)) from first

    def _trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StageTrace:
        """Return what passes do with arguments like these."""
        key = shapes_of(args, kwargs)
        if key not in self._traces:

            def call(model: nn.Module, size: Size) -> Any:
                fqn, entry = self._parts.point
                given = with_images(
                    args,
                    kwargs,
                    lambda it, times: it.new_empty(
                        (*it.shape[:-2], *(int(side * times) for side in size)), device="meta"
                    ),
                )
                own_args, own_kwargs = tree_map_only(torch.Tensor, _without_data, given)
                return getattr(model.get_submodule(fqn), entry)(*own_args, **own_kwargs)

            try:
                trace = trace_stages(self._module, self._parts, call)
                self._traces[key] = self._with_reach(trace, call)
            except NotTileableError as error:
                raise self._refusal(str(error)) from error
        return self._traces[key]

    def _with_reach(self, trace: StageTrace, call: PointCall) -> StageTrace:
        """Add how far stages look, where tiles have to have all of that.

        Raises:
            NotTileableError: A stage of which tiles are computed looks at the whole image.
        """
        if self._options.context != "exact":
            return trace
        if trace.mask:
            raise NotTileableError(
                f"attention in its {self._parts.method}() takes a mask over all pixels, filled in place, "
                "so that the whole image does not fit into the memory of a tile. Choose context='global'"
            )
        wanted = stages_in_tiles(trace, from_the_end=self._is_encoder)
        trace = with_reach(trace, self._module, self._parts, call, wanted)
        in_tiles = stages_in_tiles(trace, from_the_end=self._is_encoder)
        for stage in wanted:
            if math.isinf(trace.reach[stage]) and (stage in in_tiles or self._is_large(trace, stage)):
                name = "the end" if stage == END else repr(self._parts.stages[stage])
                raise NotTileableError(
                    f"{name} of its {self._parts.method}() looks at the whole image, or not alike "
                    "everywhere, so that no tile of it can be exact. Choose context='global'"
                )
        return trace

    @staticmethod
    def _is_large(trace: StageTrace, stage: int) -> bool:
        """Whether what a stage puts out for the whole image is in more than a quarter of its resolution."""
        return 4 * trace.stage_scale(stage) > max(trace.scale, Fraction(1))

    def _tensor(self, output: Any) -> Tensor:
        tensor = tensor_of(output)
        assert tensor is not None  # noqa: S101 -- as for the image that was followed
        return tensor

    def _refusal(self, found: str) -> PlanError:
        return PlanError(f"{self._label!r} cannot be tiled: {found}. Leave it out")

    def _is_small(self, image: Tensor) -> bool:
        """Whether the image is no larger than a tile, where that can be told without knowing the model."""
        return self._is_encoder and all(
            length <= tile for length, tile in zip(size_of(image), self._tile_size, strict=True)
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
        tile = [max(1, int(it * share)) for it in self._nominal(whole)]
        common = [min(it // pixels, side // 2) for it, side in zip(overlap, tile, strict=True)]
        return whole.grid((tile[0], tile[1]), (common[0], common[1]))

    def _split(self, whole: ImageCall, trace: StageTrace) -> tuple[Grid, SplitPoint | None]:
        """The tiles, and the point behind which they begin or end: the one that leaves least to tiles.

        Somewhat smaller tiles may leave room for what more stages for the whole image put out.
        """
        nominal = self._nominal(whole)
        best = None
        for share in _SHARES:
            grid = self._grid(whole, share)
            point = choose_split_point(trace, grid, nominal, from_the_end=self._is_encoder)
            if point is None:
                return grid, None
            left = len(point.stages) if self._is_encoder else -len(point.stages)
            rank = not point.fits, left
            if best is None or rank < best[0]:
                best = rank, grid, point
        assert best is not None  # noqa: S101 -- there are shares
        return best[1:]


def _without_data(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _trained_size(module: nn.Module) -> Size:
    """The size that the model was made for, where it says so in diffusers' way."""
    height = getattr(module, "tile_sample_min_height", None)
    width = getattr(module, "tile_sample_min_width", None)
    both = getattr(module, "tile_sample_min_size", None)
    found = [height, width] if height and width else [both, both]
    rows, columns = (it if isinstance(it, int) else _TILE for it in found)
    return rows, columns


def _uncompiled() -> AbstractContextManager[object]:
    """Run what code was compiled from, instead of the compiled code.

    For statistics from outside torch would compile it anew at every call, up to its limit.
    """
    known = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if known else contextlib.nullcontext()
