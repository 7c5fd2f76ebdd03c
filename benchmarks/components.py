"""Times model and sequential offloading of three components beside accelerate's, in virtual time.

    python benchmarks/components.py

Runs on the simulated accelerator, deterministic, in half a minute. Where copies take most of the time, a
factor of 4 is that of the simulator's bandwidths of locked and of other host memory.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import accelerate
import torch
from torch import nn

import hookcore
import hookcore.testing.simulator as sim
from hookcore_plugins import ModelOffload, SequentialOffload

if TYPE_CHECKING:
    from collections.abc import Callable

    Components = dict[str, nn.Module]

WIDTH = 512
LAYERS = {"text_encoder": 8, "denoiser": 32, "vae": 4}
STEPS = 4
RUNS = 4
sim.install(devices=1)
DEVICE = torch.device("sim:0")


def components() -> Components:
    torch.manual_seed(0)
    return {
        name: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count)))
        for name, count in LAYERS.items()
    }


def run(models: Components) -> torch.Tensor:
    """One run of the pipeline, as diffusers' pipelines call their components."""
    x = torch.ones(256, WIDTH, device=DEVICE)
    with torch.no_grad():
        x = models["text_encoder"](x)
        for _ in range(STEPS):
            x = models["denoiser"](x)
        return models["vae"](x)


def resident(models: Components) -> None:
    for model in models.values():
        model.to(DEVICE)


def with_hook(models: Components) -> None:
    hook = None
    for model in models.values():
        _, hook = accelerate.cpu_offload_with_hook(model, DEVICE, prev_module_hook=hook)


def by_layers(models: Components) -> None:
    for model in models.values():
        accelerate.cpu_offload(model, DEVICE)


def hooked(technique: hookcore.Technique) -> Callable[[Components], None]:
    def prepare(models: Components) -> None:
        hookcore.apply(models, [technique])

    return prepare


def measure(prepare: Callable[[Components], None]) -> tuple[float, float, torch.Tensor]:
    """Virtual milliseconds of the last run, the peak in MiB, and the output."""
    module = torch.get_device_module(DEVICE)
    gc.collect()  # what was measured before
    models = components()
    prepare(models)
    module.reset_peak_memory_stats()
    for _ in range(RUNS):
        module.synchronize()
        begun = sim.now()
        output = run(models).cpu()
        taken = sim.now() - begun
    sim.check()
    return taken * 1e3, module.max_memory_allocated() / 2**20, output


def main() -> None:
    torch.set_num_threads(1)
    order = tuple(LAYERS)
    largest = WIDTH * (WIDTH + 1) * 4 * max(LAYERS.values())
    ways = {
        "resident": resident,
        "accelerate, cpu_offload_with_hook": with_hook,
        "ModelOffload": hooked(ModelOffload(DEVICE)),
        "ModelOffload, one at a time": hooked(ModelOffload(DEVICE, order, memory_budget=largest)),
        "accelerate, cpu_offload": by_layers,
        "SequentialOffload": hooked(SequentialOffload(DEVICE)),
    }
    found = {name: measure(prepare) for name, prepare in ways.items()}
    expected = found["resident"][2]
    print(f"{'':36}{'ms a run':>9}{'peak MiB':>10}")
    for name, (milliseconds, peak, output) in found.items():
        assert torch.equal(output, expected), f"{name} gives another output"  # noqa: S101
        print(f"{name:36}{milliseconds:9.2f}{peak:10.1f}")
    for theirs, ours in (
        ("accelerate, cpu_offload_with_hook", "ModelOffload"),
        ("accelerate, cpu_offload_with_hook", "ModelOffload, one at a time"),
        ("accelerate, cpu_offload", "SequentialOffload"),
    ):
        print(f"{ours} is {found[theirs][0] / found[ours][0]:.2f} x as fast as {theirs}")


if __name__ == "__main__":
    main()
