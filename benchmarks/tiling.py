"""What tiling costs and how close it comes to the untiled image, beside diffusers' own tiling.

    python benchmarks/tiling.py
    python benchmarks/tiling.py --models sd --contents detailed --json results.json

Models have the blocks of real ones and few channels, with random weights. Differences are of the output from
the untiled one, in units of its standard deviation. "Border" is the mean jump between neighbouring pixels
across the borders of tiles, over the mean jump anywhere in that output, as a multiple of the same in the
untiled one: 1.00 is what one cannot see.
Peaks are counted to the byte on the simulated accelerator, beyond weights and input. Times are of one CPU.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import diffusers
import torch
from attrs import asdict, frozen
from tqdm import tqdm

import hookcore
from hookcore.testing import simulator
from hookcore_plugins import Tiling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
CONTEXTS = ("tile", "global", "exact")
QUARTER, TENTH, PEAK, TIME, BORDER = 0.25, 0.1, 1.05, 1.15, 1.1


@frozen
class Family:
    """A model and the sizes it is tried at, in latents."""

    make: Callable[[], nn.Module]
    latents: int
    channels: int
    frames: int | None
    pixels: int
    frame_pixels: int = 1


def image_model(latent_channels: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=latent_channels,
            norm_num_groups=8,
            use_quant_conv=latent_channels == 4,
            use_post_quant_conv=latent_channels == 4,
        )

    return make


def video_model() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=16, block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=8
    )


FAMILIES = {
    "sd": Family(image_model(4), 64, 4, None, 8),
    "flux": Family(image_model(16), 64, 16, None, 8),
    "video": Family(video_model, 36, 16, 2, 8, 5),
}


@frozen
class Tried:
    """One way, at one size."""

    way: str
    mean: float
    largest: float
    border: float
    peak: int
    seconds: float


def content(kind: str, channels: int, frames: int | None, height: int, seed: int = 0) -> Tensor:
    """Noise, or what images are like: all scales alike, with a brighter side."""
    generator = torch.Generator().manual_seed(seed)
    lead = (1, channels) if frames is None else (1, channels, frames)
    noise = torch.randn(*lead, height, height, generator=generator)
    if kind == "noise":
        return noise
    down, across = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(height)[None]
    radius = (down.square() + across.square()).sqrt().clamp_min(1 / height)
    scales = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    return scales / scales.std() + 0.3 * torch.randn(*lead, height, height, generator=generator)


def run(model: nn.Module, method: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = getattr(model, method)(x)
    return output.sample if method == "decode" else output.latent_dist.parameters


def jumps(output: Tensor, borders: Sequence[int]) -> float:
    """The mean difference of neighbours across the borders over that anywhere, down and across."""
    down = (output[..., 1:, :] - output[..., :-1, :]).abs().mean(dim=-1).flatten(0, -2).mean(0)
    across = (output[..., 1:] - output[..., :-1]).abs().mean(dim=-2).flatten(0, -2).mean(0)
    at = torch.tensor([border - 1 for border in borders if border < output.shape[-1]])
    return (torch.cat([down[at], across[at]]).mean() / torch.cat([down, across]).mean()).item()


def peak_of(model: nn.Module, method: str, x: Tensor) -> int:
    device = torch.get_device_module("sim")
    there = x.to("sim")
    before = device.memory_allocated()
    device.reset_peak_memory_stats()
    run(model, method, there)
    return device.max_memory_allocated() - before


def tiled(model: nn.Module, way: str, family: Family, tile: int, overlap: int) -> AbstractContextManager[Any]:
    """A context manager under which the model is tiled in a way."""
    if way == "diffusers":
        return Peer(model, tile * family.pixels, overlap / tile)
    return hookcore.apply(model, [Tiling(tile * family.pixels, overlap * family.pixels, context=way)])


class Peer:
    """diffusers' own tiling, at the same tile and overlap."""

    def __init__(self, model: Any, pixels: int, share: float) -> None:
        self.model, self.pixels, self.share = model, pixels, share

    def __enter__(self) -> Self:
        model, pixels, stride = self.model, self.pixels, int(self.pixels * (1 - self.share))
        model.enable_tiling()
        if hasattr(model, "tile_sample_min_height"):
            model.tile_sample_min_height = model.tile_sample_min_width = pixels
            model.tile_sample_stride_height = model.tile_sample_stride_width = stride
        else:
            model.tile_sample_min_size, model.tile_latent_min_size = pixels, pixels // 8
            model.tile_overlap_factor = self.share
        return self

    def __exit__(self, *_: object) -> None:
        self.model.disable_tiling()


def borders_of(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin and end, and the middles between, of diffusers' grid and of ours."""
    from hookcore_plugins.tiling.grid import cut

    found = set()
    for span in cut(size, tile, overlap):
        found |= {span.start, span.stop}
    for start in range(0, size, tile - overlap):
        found |= {start, min(start + tile, size)}
    return sorted(found - {0, size})


def try_one(
    name: str, method: str, kind: str, *, tile: int, overlap: int, rounds: int, with_exact: bool
) -> dict[str, Any]:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.make().eval()
    if method == "decode":
        x = content(kind, family.channels, family.frames, family.latents)
        scale = family.pixels
    else:
        frames = None if family.frames is None else family.frame_pixels
        x, scale = content(kind, 3, frames, family.latents * family.pixels), 1
    ways = ["diffusers", *(it for it in CONTEXTS if it != "exact" or with_exact)]
    untiled = run(model, method, x)
    borders = [it * scale for it in borders_of(family.latents, tile, overlap)]
    seconds = {way: [] for way in ways}
    outputs = {}
    for way in ways:
        with tiled(model, way, family, tile, overlap):
            outputs[way] = run(model, method, x)  # what is learned at the first call
            for _ in range(rounds):
                start = time.process_time()
                run(model, method, x)
                seconds[way].append(time.process_time() - start)
    there = model.to("sim")
    corner = x[..., : tile * (family.pixels if method == "encode" else 1), :]
    corner = corner[..., : corner.shape[-2]]
    one_tile = peak_of(there, method, corner) + untiled.nbytes
    whole = peak_of(there, method, x)
    tries = []
    own = jumps(untiled, borders)
    for way in ways:
        with tiled(there, way, family, tile, overlap):
            peak = peak_of(there, method, x)
        away = (outputs[way] - untiled).abs() / untiled.std()
        border = jumps(outputs[way], borders) / own
        tries.append(Tried(way, away.mean().item(), away.max().item(), border, peak, min(seconds[way])))
    return {
        "model": name,
        "method": method,
        "content": kind,
        "size": family.latents * family.pixels,
        "tile": tile * family.pixels,
        "overlap": overlap * family.pixels,
        "tile_and_output": one_tile,
        "untiled_peak": whole,
        "tries": [asdict(it) for it in tries],
    }


def show(found: dict[str, Any]) -> None:
    print(
        f"\n{found['model']} {found['method']}, {found['content']}: {found['size']} pixels, tiles of "
        f"{found['tile']}, overlap {found['overlap']}; untiled peak {found['untiled_peak'] / 1e6:.1f} MB, "
        f"one tile and the output {found['tile_and_output'] / 1e6:.1f} MB"
    )
    print(f"{'way':12}{'mean':>8}{'ratio':>7}{'max':>8}{'border':>8}{'peak MB':>9}{'of bound':>9}{'time':>7}")
    peer = found["tries"][0]
    for it in found["tries"]:
        print(
            f"{it['way']:12}{it['mean']:8.4f}{it['mean'] / peer['mean']:7.3f}{it['largest']:8.3f}"
            f"{it['border']:8.3f}{it['peak'] / 1e6:9.1f}{it['peak'] / found['tile_and_output']:9.2f}"
            f"{it['seconds'] / peer['seconds']:7.2f}"
        )


def aims(results: list[dict[str, Any]]) -> list[tuple[str, float, float, float | None]]:
    """Name, what was found and the limit: medians over all that was tried, and the worst."""
    rows = []
    for method in ("decode", "encode"):
        for way, share in (("global", QUARTER), ("exact", TENTH)):
            ratios, peaks, times, borders = [], [], [], []
            for found in results:
                peer = found["tries"][0]
                for it in found["tries"]:
                    if it["way"] == way and found["method"] == method:
                        ratios.append(it["mean"] / peer["mean"])
                        peaks.append(it["peak"] / found["tile_and_output"])
                        times.append(it["seconds"] / peer["seconds"])
                        borders.append(abs(it["border"] - 1) + 1)
            for what, values, limit in (
                ("mean difference of diffusers'", ratios, share),
                ("peak of a tile and the output", peaks, PEAK),
                ("time of diffusers'", times, TIME if way == "global" else None),
                ("jump at borders of the image's own", borders, BORDER),
            ):
                if values:
                    rows.append((f"{method}, {way}: {what}", statistics.median(values), max(values), limit))
    return rows


def draw(path: Path) -> None:
    """Draws an untiled image, and how far each way is from it, all on one scale."""
    from matplotlib import pyplot as plt

    family = FAMILIES["sd"]
    torch.manual_seed(0)
    model = family.make().eval()
    x = content("detailed", family.channels, None, family.latents)
    untiled = run(model, "decode", x)
    away = {}
    for way in ("diffusers", "global", "exact"):
        with tiled(model, way, family, 24, 6):
            away[way] = (run(model, "decode", x) - untiled).abs().mean(1)[0] / untiled.std()
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained")
    flat = untiled[0].flatten(1)
    low, high = flat.quantile(0.01, 1)[:, None, None], flat.quantile(0.99, 1)[:, None, None]
    axes[0].imshow(((untiled[0] - low) / (high - low)).clamp(0, 1).permute(1, 2, 0))
    axes[0].set_title("untiled")
    titles = {"diffusers": "diffusers' tiling", "global": "Tiling()", "exact": 'Tiling(context="exact")'}
    for axis, (way, difference) in zip(axes[1:], away.items(), strict=True):
        shown = axis.imshow(difference, vmin=0, vmax=1.5, cmap="magma")
        axis.set_title(f"{titles[way]}: mean {difference.mean():.3f}")
    figure.colorbar(shown, ax=axes, label="difference, in deviations", fraction=0.02)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", choices=("decode", "encode"), default=["decode", "encode"])
    parser.add_argument("--contents", nargs="+", choices=("noise", "detailed"), default=["noise", "detailed"])
    parser.add_argument("--tile", type=int, help="latents of a tile; without: 24, of a video 16")
    parser.add_argument("--overlap", type=int, help="latents that tiles have in common; without: a quarter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-exact", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, help="draw differences to this file instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.draw:
        draw(options.draw)
        return
    simulator.install()
    results = []
    chosen = [(a, b, c) for a in options.models for b in options.methods for c in options.contents]
    for name, method, kind in tqdm(chosen, leave=False):
        tile = options.tile or (24 if FAMILIES[name].frames is None else 16)
        overlap = options.overlap or tile // 4
        results.append(
            try_one(
                name,
                method,
                kind,
                tile=tile,
                overlap=overlap,
                rounds=options.rounds,
                with_exact=not options.no_exact,
            )
        )
        show(results[-1])
    print(f"\n{'aim':62}{'median':>8}{'worst':>8}{'limit':>7}")
    for what, middle, worst, limit in aims(results):
        verdict = "" if limit is None else "  met" if middle <= limit else "  MISSED"
        print(f"{what:62}{middle:8.3f}{worst:8.3f}{limit or 0:7.2f}{verdict}")
    stamp = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H%M")
    path = options.json or RESULTS / f"tiling-{stamp}.json"
    about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
    path.write_text(json.dumps({"date": stamp, "about": about, "results": results}, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
