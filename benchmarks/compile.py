"""Times a compiled model beside a bare one, and with offloading and casting, and counts recompiles.

    python benchmarks/compile.py --json benchmarks/results/compile.json

A Flux transformer, in one process and in turns (A B C ... A B C ...), so that a slow moment of the machine
meets all alike; read the ratios. Needs a C++ compiler for torch's default backend; on the CPU it takes two
minutes. On another device give `--device cuda`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from diffusers import FluxTransformer2DModel
from torch._dynamo.utils import counters, get_compilation_metrics

import hookcore
from hookcore.report import table
from hookcore_plugins import AttentionBackend, Compile, GroupOffload, LayerwiseCasting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TOKENS, TEXT = 256, 64


@frozen
class Way:
    """One way to run the model.

    Attributes:
        name: For the table.
        prepare: Puts it on a model that lies on the CPU.
    """

    name: str
    prepare: Callable[[torch.nn.Module], object]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 28, 28),
    ).eval()


def inputs(device: str) -> dict[str, Any]:
    side = int(TOKENS**0.5)
    given = {
        "hidden_states": torch.randn(1, TOKENS, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.rand(1),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(side * 1.0), torch.arange(side * 1.0)),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return {name: tensor.to(device) for name, tensor in given.items()} | {"return_dict": False}


def ways(device: str, backend: str) -> list[Way]:
    def on_device(prepare: Callable[[torch.nn.Module], object]) -> Callable[[torch.nn.Module], object]:
        return lambda it: prepare(it.to(device))

    def applied(*techniques: hookcore.Technique) -> Callable[[torch.nn.Module], object]:
        return lambda it: hookcore.apply(it, techniques)

    def by_diffusers(it: Any) -> None:
        it.compile_repeated_blocks(backend=backend)

    def attending(name: str) -> Callable[[torch.nn.Module], object]:
        return on_device(applied(compiled, AttentionBackend(name)))

    compiled = Compile(backend=backend)
    casting = LayerwiseCasting("bfloat16")
    return [
        Way("bare", on_device(lambda _: None)),
        Way("diffusers, compile_repeated_blocks", on_device(by_diffusers)),
        Way("Compile", on_device(applied(compiled))),
        Way("AttentionBackend('flex') + Compile", attending("flex")),
        Way("AttentionBackend('chunked') + Compile", attending("chunked")),
        Way("LayerwiseCasting", on_device(applied(casting))),
        Way("LayerwiseCasting + Compile", on_device(applied(casting, compiled))),
        Way("GroupOffload", applied(GroupOffload(device))),
        Way("GroupOffload + Compile", applied(GroupOffload(device), compiled)),
        Way("GroupOffload + casting + Compile", applied(GroupOffload(device), casting, compiled)),
    ]


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    synchronize(device)
    begun = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - begun, result


def measure(chosen: Sequence[Way], device: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    given = inputs(device)
    models, rows = [], []
    expected = None
    for way in chosen:
        it = model()
        way.prepare(it)
        before = counters["stats"]["unique_graphs"], len(get_compilation_metrics())
        with torch.no_grad():
            first, (output,) = timed(lambda it=it: it(**given), device)
            timed(lambda it=it: it(**given), device)
        expected = output if expected is None else expected
        rows.append(
            {
                "way": way.name,
                "first_call_seconds": first,
                "graphs": counters["stats"]["unique_graphs"] - before[0],
                "difference": float((output - expected).abs().max() / expected.abs().max()),
                "seconds": [],
                "recompiles_later": 0,
            }
        )
        models.append(it)
    for _ in range(rounds):
        for it, row in zip(models, rows, strict=True):
            graphs = counters["stats"]["unique_graphs"]
            with torch.no_grad():
                seconds, _ = timed(lambda it=it: it(**given), device)
            row["seconds"].append(seconds)
            row["recompiles_later"] += counters["stats"]["unique_graphs"] - graphs
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="a file for all samples")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(ways(options.device, options.backend), options.device, options.rounds)
    bare = statistics.median(rows[0]["seconds"])
    shown = [
        ("way", "first call s", "ms a call", "fastest", "to bare", "graphs", "recompiles later", "difference")
    ]
    for row in rows:
        median = statistics.median(row["seconds"])
        cells = (row["first_call_seconds"], median * 1e3, min(row["seconds"]) * 1e3, median / bare)
        counted = (str(row["graphs"]), str(row["recompiles_later"]), f"{row['difference']:.1e}")
        shown.append((row["way"], *(f"{cell:.2f}" for cell in cells), *counted))
    print(table(shown))
    if options.json:
        facts = {
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": options.device,
            "backend": options.backend,
            "threads": options.threads,
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
