"""Tiling: tiles cover and add up to the whole, and what they are computed with is as good as the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attrs import evolve
from autoencoders import FAMILIES, PointwiseAutoencoder
from diffusers import AutoencoderKL
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

import hookcore
from hookcore import ConflictError, PlanError
from hookcore.testing.cases import tensors_in
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import ChannelsLast, Compile, GroupOffload, LayerwiseCasting, Slicing, Tiling
from hookcore_plugins.tiling.blend import Canvas, Mosaic, ramps
from hookcore_plugins.tiling.discovery import find_parts
from hookcore_plugins.tiling.example_calls import example_calls
from hookcore_plugins.tiling.grid import Grid, cut
from hookcore_plugins.tiling.norm_statistics import Recorded, Replayed, averaged
from hookcore_plugins.tiling.samples import samples
from hookcore_plugins.tiling.stage_trace import trace_stages, with_reach

FAST = settings(deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Where tiles lie


@st.composite
def axes(draw):
    """Length of an axis, of a tile, and of an overlap, in cells."""
    tile = draw(st.integers(1, 40))
    return draw(st.integers(1, 300)), tile, draw(st.integers(0, tile - 1))


@FAST
@given(axes())
def test_tiles_cover_the_axis_and_have_enough_in_common(axis):
    cells, tile, overlap = axis
    spans = cut(cells, tile, overlap)
    assert spans[0].start == 0
    assert spans[-1].stop == cells
    assert len({span.length for span in spans}) == 1
    assert spans[0].length <= max(tile, 1)
    assert all(first.stop - second.start >= overlap for first, second in pairwise(spans))
    assert all(first.start < second.start for first, second in pairwise(spans))
    fewest = 1 if cells <= tile else -(-(cells - overlap) // (tile - overlap))
    assert len(spans) == fewest


@FAST
@given(axes(), st.integers(1, 8), st.floats(0, 1))
def test_weights_add_up_to_one_everywhere(axis, scale, share):
    cells, tile, overlap = axis
    spans = cut(cells, tile, overlap)
    total = torch.zeros(cells * scale)
    for span, weights in zip(spans, ramps(spans, scale, share), strict=True):
        assert len(weights) == span.length * scale
        assert (weights >= 0).all()
        assert (weights <= 1).all()
        total[span.start * scale : span.stop * scale] += weights
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@FAST
@given(axes(), axes(), st.integers(1, 3), st.integers(0, 99))
def test_an_image_cut_and_put_together_is_the_image(down, across, scale, seed):
    down, across = ((min(cells, 40), tile, overlap) for cells, tile, overlap in (down, across))
    grid = Grid(cut(*down), cut(*across), (down[0], across[0]))
    image = torch.randn(
        1, 2, down[0] * scale, across[0] * scale, generator=torch.Generator().manual_seed(seed)
    )
    canvas, mosaic = Canvas(grid, scale, 1.0, None), Mosaic(grid, scale, None)
    for tile in grid.tiles:
        canvas.add(tile, grid.crop(image, tile))
        mosaic.add(tile, grid.crop(image, tile))
    torch.testing.assert_close(canvas.whole, image)
    assert torch.equal(mosaic.whole, image)


# Statistics


@FAST
@given(
    rows=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    affine=st.booleans(),
    size=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_norm_with_its_own_statistics_is_the_norm(**drawn):
    rows, groups, dtype, affine, size, seed = drawn.values()
    torch.manual_seed(seed)
    norm = nn.GroupNorm(groups, 8, affine=affine).to(dtype)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = (torch.randn(rows, 8, *size) * 3 + 2).to(dtype)
    with torch.no_grad():
        expected = norm(x)
        with Recorded() as seen:
            recorded = norm(x)
        with Replayed(seen.moments):
            replayed = norm(x)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for got in (recorded, replayed):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@FAST
@given(parts=st.integers(1, 4), seed=st.integers(0, 99))
def test_statistics_of_parts_are_those_of_the_whole(parts, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 4, 6 * parts) * 2 + 1
    with Recorded() as whole:
        F.group_norm(x, 2)
    cut_at = sorted(torch.randperm(6 * parts - 1)[: parts - 1].add(1).tolist())
    parts_of_it, sizes = [], []
    for part in x.tensor_split(cut_at, dim=2):
        with Recorded() as seen:
            F.group_norm(part, 2)
        parts_of_it += seen.moments
        sizes.append(part.shape[2])
    (expected,) = whole.moments
    torch.testing.assert_close(averaged(parts_of_it, sizes), expected)


# Autoencoders


def autoencoder(seed=0, **options):
    """A small AutoencoderKL with the real one's blocks; an image is 4 times as large as its latents."""
    torch.manual_seed(seed)
    made = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**made | options).eval()


def smooth(channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, height // 8 + 2, width // 8 + 2, generator=generator)
    fine = torch.randn(1, channels, height, width, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic") + 0.2 * fine


def decoded(model, latents):
    with torch.no_grad():
        return model.decode(latents).sample


def encoded(model, image):
    with torch.no_grad():
        return model.encode(image).latent_dist.parameters


METHODS = {"decode": (decoded, 4, 1), "encode": (encoded, 3, 4)}


def difference(got, expected):
    return ((got - expected).abs().mean() / expected.std()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", ["tile", "global", "exact"])
def test_an_image_of_one_tile_comes_out_bit_for_bit(method, context):
    run, channels, pixels = METHODS[method]
    model = autoencoder()
    image = smooth(channels, 16 * pixels, 11 * pixels)
    expected = run(model, image)
    with hookcore.apply(model, [Tiling(64, context=context)]):
        assert same_bits(run(model, image), expected)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_closer_to_the_whole_than_the_peers(method):
    run, channels, pixels = METHODS[method]
    model = autoencoder()
    image = smooth(channels, 40 * pixels, 40 * pixels)
    expected = run(model, image)
    model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor = 64, 16, 0.25
    model.enable_tiling()
    peers = difference(run(model, image), expected)
    model.disable_tiling()
    with hookcore.apply(model, [Tiling(64, 16)]):
        ours = difference(run(model, image), expected)
    with hookcore.apply(model, [Tiling(64, 16, context="exact")]):
        exact = difference(run(model, image), expected)
    assert ours < 0.6 * peers
    assert exact < 1e-5


@settings(deadline=None, max_examples=12)
@given(
    height=st.integers(8, 25),
    width=st.integers(8, 25),
    odd=st.integers(0, 3),
    tile=st.sampled_from([(16, 24), (32, 32)]),
    overlap=st.sampled_from([0, 4, 8]),
    context=st.sampled_from(["tile", "global"]),
)
def test_any_size_comes_out_in_the_size_of_the_whole(**drawn):
    height, width, odd, tile, overlap, context = drawn.values()
    model = autoencoder()
    with hookcore.apply(model, [Tiling(tile, overlap, context=context)]):
        assert decoded(model, smooth(4, height, width)).shape == (1, 3, 4 * height, 4 * width)
        shape = encoded(model, smooth(3, 4 * height + odd, 4 * width + odd)).shape
    assert shape == (1, 8, height, width)


def test_output_classes_are_kept_and_removal_leaves_no_trace():
    model, bare = autoencoder(), autoencoder()
    before = ModelSnapshot.take(model, twin=bare)
    latents, image = smooth(4, 24, 24), smooth(3, 96, 96)
    applied = hookcore.apply(model, [Tiling(48, 16)])
    with torch.no_grad():
        assert type(model.decode(latents)) is type(bare.decode(latents))
        assert isinstance(model.decode(latents, return_dict=False), tuple)
        assert type(model.encode(image).latent_dist) is type(bare.encode(image).latent_dist)
        assert type(model(image)) is type(bare(image))
    applied.reset()
    assert decoded(model, latents).shape == (1, 3, 96, 96)
    applied.remove()
    before.assert_restored(model)
    assert same_bits(decoded(model, latents), decoded(bare, latents))


@pytest.mark.parametrize("context", ["tile", "global"])
def test_it_works_beside_other_techniques(context, sim):
    """Rows are split first, then tiles; weights come for each layer, in a small dtype."""
    plain, model = autoencoder().to("sim"), autoencoder()
    latents, image = (
        torch.cat([smooth(channels, size, size, seed) for seed in (0, 1)])
        for channels, size in ((4, 24), (3, 96))
    )
    hookcore.apply(plain, [Tiling(48, 16, context=context), LayerwiseCasting("bfloat16")])
    expected = [decoded(plain, latents.to("sim")), encoded(plain, image.to("sim"))]
    techniques = [
        Tiling(48, 16, context=context),
        Slicing(),
        GroupOffload("sim"),
        LayerwiseCasting("bfloat16"),
    ]
    applied = hookcore.apply(model, techniques)
    for got, other in zip((decoded(model, latents), encoded(model, image)), expected, strict=True):
        torch.testing.assert_close(got.cpu(), other.cpu(), rtol=1e-4, atol=1e-4)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    applied.remove(allow_lossy=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", ["tile", "global", "exact"])
def test_what_comes_out_lies_as_it_does_without_tiles(method, context):
    run, channels, pixels = METHODS[method]
    image = smooth(channels, 24 * pixels, 20 * pixels)
    for techniques in ([], [ChannelsLast()]):
        model = autoencoder()
        hookcore.apply(model, techniques)
        expected = run(model, image)
        with hookcore.apply(model, [Tiling(64, 16, context=context)]):
            assert run(model, image).stride() == expected.stride()


def test_the_image_can_be_put_together_elsewhere(sim):
    model = autoencoder().to("sim")
    latents = smooth(4, 24, 24).to("sim")
    with hookcore.apply(model, [Tiling(48, 16)]):
        there = decoded(model, latents)
    with hookcore.apply(model, [Tiling(48, 16, offload_device="cpu")]):
        here = decoded(model, latents)
    assert there.device.type == "sim"
    assert here.device.type == "cpu"
    torch.testing.assert_close(here, there.cpu())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", ["tile", "global", "exact"])
def test_the_peak_is_that_of_a_tile_and_the_output(method, context, sim):
    """With latents that are 8 times smaller, as they mostly are."""
    run, channels, pixels = METHODS[method]
    pixels = 2 * pixels if method == "encode" else pixels
    model = autoencoder(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).to("sim")
    device = torch.get_device_module("sim")

    def peak(size):
        image = smooth(channels, size * pixels, size * pixels).to("sim")
        before = device.memory_allocated()
        device.reset_peak_memory_stats()
        output = run(model, image)
        return device.max_memory_allocated() - before, output.nbytes

    tile, _ = peak(24)
    whole, output = peak(56)
    with hookcore.apply(model, [Tiling(192, 48, context=context)]):
        tiled, _ = peak(56)
    assert whole > 3 * tile
    assert tiled <= 1.05 * (tile + output)


@pytest.fixture
def _whole_masks(monkeypatch):
    """Masks over all pixels that cannot be made a few rows at a time, as they are filled in place."""
    made = autoencoder_kl_hunyuan_video.prepare_causal_attention_mask
    monkeypatch.setattr(
        autoencoder_kl_hunyuan_video,
        "prepare_causal_attention_mask",
        lambda *args, **options: 0 + made(*args, **options),
    )


@pytest.mark.usefixtures("_whole_masks")
def test_attention_with_a_mask_sees_the_whole_only_where_the_mask_is_small(sim):
    """A mask has the square of the image's pixels: HunyuanVideo's would take hundreds of gigabytes."""
    make, _, _, _ = FAMILIES["hunyuanvideo"]
    torch.manual_seed(0)
    model = make().eval().to("sim")
    device = torch.get_device_module("sim")

    def peak(size):
        latents = torch.randn(1, 4, 2, size, size).to("sim")
        device.reset_peak_memory_stats()
        before = device.memory_allocated()
        output = decoded(model, latents)
        return device.max_memory_allocated() - before, output.nbytes

    tile, _ = peak(12)
    with hookcore.apply(model, [Tiling(96, 24)]):
        tiled, output = peak(36)
    assert tiled <= 1.05 * (tile + output)


@pytest.mark.usefixtures("_whole_masks")
def test_where_nothing_sees_the_whole_image_an_encoder_computes_tile_by_tile():
    """Statistics that are estimated for every stage, on samples, would be worse than a tile's own."""
    make, _, _, _ = FAMILIES["hunyuanvideo"]
    torch.manual_seed(1)
    model, video = make().eval(), torch.randn(1, 3, 5, 288, 288)

    def encoded():
        with torch.no_grad():
            return model.encode(video).latent_dist.mean

    whole = encoded()
    far = {}
    for context in ("tile", "global"):
        with hookcore.apply(model, [Tiling(96, 24, context=context)]):
            far[context] = float((encoded() - whole).abs().mean())
    assert 0 < far["global"] < 1.05 * far["tile"]


@pytest.fixture
def _compiling_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_of(model):
    """How many graphs torch has made of a model's blocks."""
    (found,) = (it.counted for it in hookcore.status(model).run_report().entries if it.technique == "compile")
    return found.graphs


@pytest.mark.usefixtures("_compiling_anew")
@pytest.mark.parametrize("method", METHODS)
def test_blocks_are_compiled_for_one_tile_and_no_other(method):
    """Tiles are of one size; what is learned from is of another, and with statistics taken."""
    run, channels, pixels = METHODS[method]
    image = smooth(channels, 34 * pixels, 23 * pixels)
    tile = image[..., : 12 * pixels, : 12 * pixels].contiguous()  # as large as those below
    single, model = autoencoder(), autoencoder()
    hookcore.apply(single, [Compile(backend="eager")])
    run(single, tile)
    torch._dynamo.reset()
    expected = run(model, image)
    hookcore.apply(model, [Tiling(48, 4, context="tile"), Compile(backend="eager")])
    assert 0 < difference(run(model, image), expected) < 1
    assert graphs_of(model) == graphs_of(single) > 0


@pytest.mark.parametrize("context", ["tile", "global"])
def test_tiles_within_what_is_compiled_as_a_whole_are_refused(context):
    """torch would have to compile the tiling itself."""
    model = autoencoder()
    before = ModelSnapshot.take(model)
    techniques = [Tiling(48, context=context), Compile(regional=False)]
    for order in (techniques, techniques[::-1]):
        with pytest.raises(ConflictError, match=r"compile runs all .* tiling cannot stand at _encode\(\) of"):
            hookcore.apply(model, order)
    before.assert_restored(model)


@pytest.mark.usefixtures("_compiling_anew")
@pytest.mark.parametrize("context", ["global", "exact"])
def test_nothing_is_compiled_for_statistics_from_outside(context):
    model, compiled = autoencoder(), autoencoder()
    latents = smooth(4, 24, 24)
    hookcore.apply(model, [Tiling(48, 16, context=context)])
    hookcore.apply(compiled, [Tiling(48, 16, context=context), Compile(backend="eager")])
    assert torch.equal(decoded(compiled, latents), decoded(model, latents))
    assert graphs_of(compiled) == 0
    decoded(compiled, latents[..., :12, :12].contiguous())
    assert graphs_of(compiled) > 0


def test_gradients_flow_through_tiles():
    model = PointwiseAutoencoder(4)
    x = torch.randn(1, 3, 24, 24, requires_grad=True)
    model.encode(x)[0].square().sum().backward()
    expected, x.grad = x.grad, None
    with hookcore.apply(model, [Tiling(8, 4)]):
        model.encode(x)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_cores_cover_every_pixel_once():
    for axis in ((37, 10, 3), (64, 24, 11), (9, 9, 2), (50, 7, 0)):
        grid = Grid(cut(*axis), cut(*axis), (axis[0], axis[0]))
        count = torch.zeros(1, 1, 2 * axis[0], 2 * axis[0])
        for tile in grid.tiles:
            grid.crop(grid.crop(count, tile), grid.core(tile), of=tile).add_(1)
        assert (count == 1).all()


@FAST
@given(
    height=st.integers(8, 90),
    width=st.integers(8, 90),
    tile=st.integers(8, 24),
    pixels=st.integers(1, 3),
    method=st.sampled_from(["encode", "decode"]),
    seed=st.integers(0, 99),
)
def test_samples_are_no_larger_than_a_tile_and_alike_to_the_whole(**drawn):
    height, width, tile, pixels, method, seed = drawn.values()
    grid = Grid(cut(height, tile, 2), cut(width, tile, 2), (height, width))
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, height * pixels, width * pixels, generator=generator) * 2 + 1
    found = list(samples((height, width), grid, method))
    assert found
    for sample in found:
        part = sample.of(image)
        assert part.shape[-2:] == (sample.cells[0] * pixels, sample.cells[1] * pixels)
        assert sample.cells[0] * sample.cells[1] <= grid.area
        torch.testing.assert_close(part.mean((2, 3)), image.mean((2, 3)), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part.std((2, 3)), image.std((2, 3)), rtol=1e-3, atol=1e-3)


# What a pass is seen to do


class Block(nn.Module):
    """Calls its layers in order, and does something else as well if asked to."""

    def __init__(self, extra):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)])
        self.extra = extra

    def forward(self, x):
        first, second = self.layers
        hidden = first(x)
        if self.extra == "in place":
            hidden.mul_(2)
        hidden = second(hidden + 1 if self.extra == "between" else hidden)
        return hidden + x if self.extra == "around" else hidden


@pytest.mark.parametrize("extra", ["", "in place", "between", "around"])
def test_only_blocks_that_hand_one_image_on_are_taken_apart(extra):
    model = PointwiseAutoencoder(4)
    model.decoder = nn.Sequential(nn.Conv2d(4, 2, 1), Block(extra), nn.Conv2d(2, 3, 1))
    trace, stages = traced(model, "decode", exact=True)
    assert [stages[it] for it in trace.chain()] == [
        "decoder.0",
        *(["decoder.1.layers.0", "decoder.1.layers.1"] if not extra else ["decoder.1"]),
        "decoder.2",
    ]
    assert trace.reach[trace.chain()[1]] == (1 if not extra else 2)


def traced(model, method, *, exact):
    """What a stage trace finds, and the names of the stages."""
    (component,) = hookcore.status(model).components
    (parts,) = (it for it in find_parts(component) if it.method == method)
    call = next(example_calls(model, parts))
    trace = trace_stages(model, parts, call)
    return (with_reach(trace, model, parts, call, trace.chain()) if exact else trace), parts.stages


# Other autoencoders


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "mochi")) for name in FAMILIES]
)
def test_autoencoders_of_diffusers_come_closer_than_by_tiles_alone(name):
    """Each class has a loop over frames, a cache, an output or a norm of its own."""
    make, image, latents, options = FAMILIES[name]
    torch.manual_seed(0)
    model = make().eval()
    for method, shape, named in (("encode", image, {}), ("decode", latents, options)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

        def run(method=method, x=x, named=named):
            with torch.no_grad():
                return next(iter(tensors_in(getattr(model, method)(x, **named))))

        expected = run()
        found = {}
        for context in ("tile", "global", "exact"):
            with hookcore.apply(model, [Tiling(48, 16, context=context)]):
                got = run()
            assert got.shape == expected.shape
            found[context] = difference(got, expected)
        assert 0 < found["tile"] < 1
        assert found["global"] < found["tile"]
        assert found["exact"] < 1e-4


# Refusals


class NoDecoder(nn.Module):
    def encode(self, x):
        return x

    def decode(self, z):
        return z


class WithPositions(PointwiseAutoencoder):
    def __init__(self):
        super().__init__(4)
        self.encoder.pos_embed = nn.Parameter(torch.zeros(1))


class ToOneSize(PointwiseAutoencoder):
    def __init__(self):
        super().__init__(4)
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(5))


def one_dimensional():
    model = PointwiseAutoencoder(4)
    model.encoder = nn.Conv1d(3, 4, 1)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(2, 2), r"it is no autoencoder: it has no encode\(\) and decode\(\)"),
        (NoDecoder(), r"its encode\(\) does not go through a module 'encoder'"),
        (one_dimensional(), "its encoder has no convolution over height and width"),
        (WithPositions(), "its encoder adds embeddings of positions"),
    ],
    ids=lambda it: type(it).__name__,
)
def test_what_cannot_be_tiled_is_refused_with_the_reason(model, reason):
    before = ModelSnapshot.take(model)
    with pytest.raises(PlanError, match=f"cannot be tiled: {reason}"):
        hookcore.apply(model, [Tiling()])
    before.assert_restored(model)
    (component,) = hookcore.status(model).components
    assert Tiling().skip_unless_named(component)


class LatentsOfOneSize(PointwiseAutoencoder):
    def __init__(self):
        super().__init__(4)
        self.decoder.append(nn.AdaptiveAvgPool2d(5))


class OnlyByItsOwnTiles(PointwiseAutoencoder):
    def decode(self, z):
        raise NotImplementedError("Decoding without tiling has not been implemented yet.")


@pytest.mark.parametrize("context", ["tile", "global", "exact"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ToOneSize(), r"what its encode\(\) puts out is not in proportion to the image"),
        (LatentsOfOneSize(), r"what its decode\(\) puts out is not in proportion to the image"),
        (OnlyByItsOwnTiles(4), r"its decode\(\) fails .* NotImplementedError: Decoding without tiling"),
    ],
    ids=lambda it: type(it).__name__,
)
def test_what_is_not_local_is_refused_when_it_is_planned(model, reason, context):
    """Not at `decode`, when the denoising is done."""
    before = ModelSnapshot.take(model)
    with pytest.raises(PlanError, match=reason):
        hookcore.apply(model, [Tiling(32, context=context)])
    before.assert_restored(model)


def test_the_peers_tiling_is_refused():
    model = autoencoder()
    model.enable_tiling()
    refused = pytest.raises(PlanError, match=r"tiles its images itself\. Call `model.disable_tiling\(\)`, or")
    with refused:
        hookcore.apply(model, [Tiling()])
    model.disable_tiling()
    hookcore.apply(model, [Tiling(32)])
    model.enable_tiling()
    with refused:
        model.decode(torch.zeros(1, 4, 20, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_size": 0}, "tile_size is .* expected a number of pixels of 1 or more, or two"),
        ({"tile_size": (8, 8, 8)}, "tile_size is"),
        ({"overlap": -1}, "overlap is .* expected a number of pixels of 0 or more"),
        ({"tile_size": 64, "overlap": 40}, "expected at most half of tile_size"),
        ({"context": "all"}, "context is 'all'; choose 'global' or 'exact' or 'tile'"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**options)


def test_an_autoencoder_is_taken_unasked():
    (component,) = hookcore.status(autoencoder()).components
    assert Tiling().skip_unless_named(component) is None
    assert evolve(Tiling(), tile_size=64) == Tiling(64)
