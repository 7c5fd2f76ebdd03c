"""What the simulated accelerator costs: each kind of operator on it, beside the same on the CPU.

Run it with `make bench`, or `python benchmarks/simulator.py`. Both are measured in one process and on one
thread, in turns, so that a slow moment of the machine meets both alike; times are the thread's own, so that
what else runs matters little. What counts is the cost above the CPU's kernel for each operator: medians of
the differences of a round, and minima beside them. Reads no files and needs neither network nor accelerator;
takes about half a minute.

The aim is less than 100 us an operator; the exit status is 1 if a median misses it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hookcore.testing.simulator as sim
from hookcore.report import table

if TYPE_CHECKING:
    from collections.abc import Callable

AIM_US = 100


@frozen
class Contest:
    """The same work on the CPU and on the simulated device.

    Attributes:
        name: What it is.
        on_cpu: Does it on the CPU.
        on_sim: Does it on the simulated device.
        calls: How often it is done in a round.
        operators: How many operators it takes; those that only look at memory in another way included.
    """

    name: str
    on_cpu: Callable[[], object]
    on_sim: Callable[[], object]
    calls: int
    operators: int


class Counting(TorchDispatchMode):
    """Counts operators on the simulated device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = (it for it in tree_leaves((args, kwargs, out)) if isinstance(it, torch.Tensor))
        self.count += any(it.device.type == "sim" for it in tensors)
        return out


def contest(name: str, make: Callable[[str], Callable[[], object]], calls: int) -> Contest:
    """Prepares the work on both devices."""
    on_cpu, on_sim = make("cpu"), make("sim")
    with Counting() as counting:
        on_sim()
    return Contest(name, on_cpu, on_sim, calls, counting.count)


def addition(device: str) -> Callable[[], object]:
    first, second = torch.ones(100, device=device), torch.ones(100, device=device)
    return lambda: first + second


def in_place(device: str) -> Callable[[], object]:
    value = torch.ones(100, device=device)
    return lambda: value.mul_(1)


def view(device: str) -> Callable[[], object]:
    value = torch.ones(10, 10, device=device)
    return value.t


def linear(device: str) -> Callable[[], object]:
    layer, value = nn.Linear(64, 64).to(device), torch.ones(8, 64, device=device)
    return lambda: layer(value)


def convolution(device: str) -> Callable[[], object]:
    layer, value = nn.Conv2d(4, 4, 3, padding=1).to(device), torch.ones(1, 4, 8, 8, device=device)
    return lambda: layer(value)


def normalisation(device: str) -> Callable[[], object]:
    layer, value = nn.LayerNorm(64).to(device), torch.ones(8, 64, device=device)
    return lambda: layer(value)


def attention(device: str) -> Callable[[], object]:
    value = torch.ones(1, 2, 16, 8, device=device)
    return lambda: nn.functional.scaled_dot_product_attention(value, value, value)


def copy(device: str) -> Callable[[], object]:
    source = torch.ones(100).pin_memory()
    target = torch.empty(100, device=device)
    if device == "cpu":
        return lambda: target.copy_(source)

    def copy_and_wait() -> None:
        target.copy_(source, non_blocking=True)
        torch.get_device_module("sim").synchronize()

    return copy_and_wait


def unet(device: str) -> Callable[[], object]:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    model = model.eval().to(device)
    inputs = (torch.ones(1, 4, 8, 8), torch.tensor([1]), torch.ones(1, 4, 32))
    moved = [it.to(device) for it in inputs]
    return lambda: model(*moved)


KINDS: dict[str, tuple[Callable[[str], Callable[[], object]], int]] = {
    "add, 100 numbers": (addition, 200),
    "multiply in place": (in_place, 200),
    "transpose (a view)": (view, 200),
    "linear, 8 x 64 x 64": (linear, 200),
    "conv2d, 4 x 8 x 8": (convolution, 200),
    "layer norm, 8 x 64": (normalisation, 200),
    "attention, 2 x 16 x 8": (attention, 100),
    "copy from pinned, and wait": (copy, 200),
    "UNet2DConditionModel, small": (unet, 1),
}


def timed(run: Callable[[], object], calls: int) -> float:
    """Seconds of a call."""
    start = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - start) / calls


def measure(item: Contest, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a call in each round, on the CPU and on the simulated device."""
    on_cpu, on_sim = [], []
    for _ in range(rounds):
        on_cpu.append(timed(item.on_cpu, item.calls))
        on_sim.append(timed(item.on_sim, item.calls))
    return on_cpu, on_sim


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what the simulated accelerator costs.")
    parser.add_argument("--rounds", type=int, default=50, help="rounds (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sim.install()
    rows = [
        ("work", "operators", "CPU us", "simulated us", "us above an operator's: median", "minimum"),
    ]
    missed = []
    with torch.no_grad():
        contests = [contest(name, make, calls) for name, (make, calls) in KINDS.items()]
        gc.collect()
        gc.disable()
        for item in contests:
            measure(item, 3)
            on_cpu, on_sim = measure(item, options.rounds)
            above = [(b - a) / item.operators * 1e6 for a, b in zip(on_cpu, on_sim, strict=True)]
            median = statistics.median(above)
            if median >= AIM_US:
                missed.append(item.name)
            rows.append(
                (
                    item.name,
                    str(item.operators),
                    f"{statistics.median(on_cpu) * 1e6:.1f}",
                    f"{statistics.median(on_sim) * 1e6:.1f}",
                    f"{median:.1f}",
                    f"{(min(on_sim) - min(on_cpu)) / item.operators * 1e6:.1f}",
                )
            )
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds\n")
    print(table(rows))
    print(f"\n{', '.join(missed)}: {AIM_US} us or more" if missed else f"\nall below {AIM_US} us an operator")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
