"""What chunked attention costs beside torch's plain way and torch's own choice, and what redirecting costs.

Run it with `make bench`, or `python benchmarks/attention.py`. Times are taken in one process, in turns
(A B C ... A B C ...), peaks in a process of its own for each way and length. Read the ratios. Needs no
accelerator, and up to 4 GiB of memory for the plain way at the largest length.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hookcore
from hookcore.report import table
from hookcore.testing.models import bert, flux
from hookcore_plugins import AttentionBackend
from hookcore_plugins.attention_backend import chunked_attention, tiles

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = ("math", "sdpa", "chunked")
MIB = 1024**2


def make_inputs(length: int, heads: int, *, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, 64)
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for _ in range(3)]


def attend(way: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    output: torch.Tensor = hookcore.attention_functions()[way].function(*tensors)
    if output.requires_grad:
        output.sum().backward()
    return output


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(seconds(call))
    return samples


# Peaks


def peak_beyond_inputs(way: str, length: int, heads: int, grad: bool, threads: int) -> int:
    """Bytes that this process held at most beside its inputs; run in a fresh one."""
    torch.set_num_threads(threads)
    tensors = make_inputs(length, heads, grad=grad)
    attend(way, make_inputs(128, heads, grad=grad))  # what is loaded and allocated once
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    attend(way, tensors)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measured_peak(*arguments: Any) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_beyond_inputs, arguments)


# What is measured


def lengths(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for grad in (False, True):
        for length in options.lengths:
            if grad and length > options.lengths[1 % len(options.lengths)]:
                continue  # the plain way would need three times the memory
            tensors = make_inputs(length, options.heads, grad=grad)
            calls = {way: (lambda way=way, tensors=tensors: attend(way, tensors)) for way in WAYS}
            samples = in_turns(calls, options.rounds)
            peaks = {way: measured_peak(way, length, options.heads, grad, options.threads) for way in WAYS}
            with torch.no_grad():
                exact = attend("math", tensors)
                off = (attend("chunked", tensors) - exact).abs().max().item()
            found += [
                {"length": length, "grad": grad, "way": way, "seconds": samples[way], "peak": peaks[way]}
                for way in WAYS
            ]
            found[-1]["largest_difference"] = off
    return found


def tile_sizes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tries tiles by their bytes and the most keys in one."""
    length = options.lengths[1 % len(options.lengths)]
    tensors = make_inputs(length, options.heads)
    tried = [
        (kib * 1024, keys) for kib in (256, 512, 1024, 2048, 4096, 8192) for keys in (256, 512, 1024, 4096)
    ]

    def call(nbytes: int, keys: int) -> Callable[[], object]:
        def run() -> object:
            tiles.MOST_KEYS = keys
            return chunked_attention(*tensors, tile_bytes=nbytes)

        return run

    before = tiles.MOST_KEYS
    with torch.no_grad():
        samples = in_turns({f"{nbytes} {keys}": call(nbytes, keys) for nbytes, keys in tried}, options.rounds)
    tiles.MOST_KEYS = before
    return [
        {"length": length, "tile_bytes": int(nbytes), "most_keys": int(keys), "seconds": times}
        for name, times in samples.items()
        for nbytes, keys in [name.split()]
    ]


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What redirecting costs by itself: small models, with torch's own choice as the backend."""
    found = []
    for name, case, attentions in (("bert", bert(), 2), ("flux", flux(), 5)):
        plain, hooked = case.build(), case.build()
        hookcore.apply(hooked, [AttentionBackend("sdpa")])
        with torch.no_grad():
            samples = in_turns(
                {
                    "plain": lambda case=case, plain=plain: case.call(plain),
                    "hooked": lambda case=case, hooked=hooked: case.call(hooked),
                },
                100 * options.rounds,
            )
        found.append({"model": name, "attentions": attentions, **samples})
    return found


# What is printed


def show_lengths(found: list[dict[str, Any]]) -> None:
    rows = [("tokens", "pass", "way", "ms", "x math", "x sdpa", "peak MiB", "of math", "of sdpa")]
    for start in range(0, len(found), len(WAYS)):
        of = {it["way"]: it for it in found[start : start + len(WAYS)]}
        for way, it in of.items():
            medians = {name: statistics.median(other["seconds"]) for name, other in of.items()}
            rows.append(
                (
                    str(it["length"]),
                    "both" if it["grad"] else "forward",
                    way,
                    f"{medians[way] * 1e3:.1f}",
                    f"{medians[way] / medians['math']:.2f}",
                    f"{medians[way] / medians['sdpa']:.2f}",
                    f"{it['peak'] / MIB:.1f}",
                    f"{it['peak'] / max(of['math']['peak'], 1):.3f}",
                    f"{it['peak'] / max(of['sdpa']['peak'], 1):.2f}",
                )
            )
    print(table(rows), "\n")


def show_tiles(found: list[dict[str, Any]]) -> None:
    keys = sorted({it["most_keys"] for it in found})
    rows = [(f"ms at {found[0]['length']} tokens", *(f"{it} keys" for it in keys))]
    for nbytes in sorted({it["tile_bytes"] for it in found}):
        of = {it["most_keys"]: it for it in found if it["tile_bytes"] == nbytes}
        rows.append(
            (f"{nbytes // 1024} KiB", *(f"{statistics.median(of[it]['seconds']) * 1e3:.1f}" for it in keys))
        )
    print(table(rows), "\n")


def show_cost(found: list[dict[str, Any]]) -> None:
    rows = [("model", "attentions", "us a call", "us hooked", "us more an attention")]
    for it in found:
        plain, hooked = (statistics.median(it[name]) * 1e6 for name in ("plain", "hooked"))
        rows.append(
            (
                it["model"],
                str(it["attentions"]),
                f"{plain:.0f}",
                f"{hooked:.0f}",
                f"{(hooked - plain) / it['attentions']:.0f}",
            )
        )
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write all samples")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {"lengths": lengths(options), "tiles": tile_sizes(options), "cost": cost(options)}
    show_lengths(found["lengths"])
    show_tiles(found["tiles"])
    show_cost(found["cost"])
    if options.json:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "machine": platform.processor() or platform.machine(),
            "threads": options.threads,
            "torch": torch.__version__,
            "heads": options.heads,
        }
        options.json.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
