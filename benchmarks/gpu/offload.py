"""What streaming weights costs on a real accelerator, beside the peers: a Flux transformer and an SDXL UNet.

    python benchmarks/gpu/offload.py                              # 12 billion weights: takes about an hour
    python benchmarks/gpu/offload.py --models unet --ways resident hookcore-25 diffusers-block-stream
    python benchmarks/gpu/offload.py --size small --device sim    # the same lines, on the simulated device

First the tests that need a device run (`pytest -m gpu`). Then each way runs in a process of its own: it makes
the model with random weights, puts the way on, and calls it again and again without waiting in between.
Times are measured by events on the device. Where diffusers is not installed, a plain transformer with as many
weights stands in. All figures go to `results/gpu-offload-DATE.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, evolve, field, frozen

_BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_BENCHMARKS))  # for what the benchmarks share

from offloading import ways  # noqa: E402
from offloading.models import FAMILIES, SIZES, Model, build  # noqa: E402

import hookcore.testing.simulator as sim  # noqa: E402
from hookcore import BudgetError, format_bytes  # noqa: E402
from hookcore_plugins.demo.draw import columns  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from offloading.ways import PutOn

BUDGETS = (6, 13, 25, 50, 75)
_WARM_UP = 3
_MIB = 1024**2
_SIZES_OF_CALIBRATION = {"small": (_MIB, 256), "full": (256 * _MIB, 8192)}
"""Bytes that are copied, and the edge of square matrices that are multiplied."""
_MILLI = 1e-3
_ERROR_LINES = 3


@frozen
class Rates:
    """What the device and its link reach by themselves.

    Attributes:
        pinned: Bytes a second of copies from page-locked host memory.
        pageable: Bytes a second of copies from other host memory.
        matmul: Operations a second of multiplying matrices, in the model's dtype.
    """

    pinned: float
    pageable: float
    matmul: float


@frozen
class Outcome:
    """What a way did with a model.

    Attributes:
        way: Its name.
        model: What was run.
        nbytes: Bytes of weights.
        budget: Bytes for weights, where the way has a budget.
        failed: The end of the error, where it could not run.
        set_up: Seconds to put it on.
        passes: Seconds of each pass, as they follow each other on the device.
        host: Seconds of each pass until the host had begun all of it.
        allocated: Most bytes of the device that tensors took, during the passes that count.
        reserved: Most bytes of the device that torch's allocator held; None where it doesn't say.
        pinned: Page-locked bytes that the weights lie in.
        pinned_allocator: Most page-locked bytes that torch's allocator held; None where it doesn't say.
        host_peak: Most memory of the process.
        checksum: Of the output, to be compared with the resident model's.
    """

    way: str
    model: str
    nbytes: int
    budget: int | None = None
    failed: str = ""
    set_up: float = 0.0
    passes: list[float] = field(factory=list)
    host: list[float] = field(factory=list)
    allocated: int = 0
    reserved: int | None = None
    pinned: int = 0
    pinned_allocator: int | None = None
    host_peak: int = 0
    checksum: float = 0.0


def main() -> None:
    arguments = _arguments()
    if arguments.child is not None:
        _be_child(arguments)
        return
    device = _open(arguments.device, arguments.memory)
    about = _about(device, arguments.size)
    print(f"{about['device']}, {about['date']}")
    print(", ".join(f"{name} {found}" for name, found in about["versions"].items()))
    tests = None if arguments.no_tests else _run_tests()
    rates = calibrate(device, arguments.size)
    print(
        f"copies: {format_bytes(int(rates.pinned))}/s pinned, {format_bytes(int(rates.pageable))}/s not; "
        f"matrices: {rates.matmul / 1e12:.3g} T operations/s"
    )
    found: dict[str, list[Outcome]] = {}
    for family in arguments.models:
        found[family] = [_run_child(arguments, family, way) for way in arguments.ways]
        _show(found[family], rates)
    results = about | {
        "tests": tests,
        "rates": asdict(rates),
        "outcomes": {family: [asdict(it) for it in outcomes] for family, outcomes in found.items()},
    }
    path = arguments.json
    if path is None:
        stamp = time.strftime("%Y-%m-%dT%H%M", time.gmtime())
        path = _BENCHMARKS / "results" / f"gpu-offload-{stamp}.json"
    path.write_text(f"{json.dumps(results, indent=1)}\n")
    print(f"\nsaved {path}")


def all_ways() -> dict[str, PutOn | None]:
    """All ways by name; None for those with a budget, which depends on the model."""
    ours: dict[str, PutOn | None] = {f"hookcore-{percent}": None for percent in BUDGETS}
    return {ways.RESIDENT: ways.stay, "hookcore": ways.with_hookcore(None), **ours, **ways.peers()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--size", choices=SIZES, default="full", help="default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=("flux", "unet"))
    parser.add_argument("--ways", nargs="+", choices=all_ways(), default=list(all_ways()), metavar="WAY")
    parser.add_argument("--memory", help="of the simulated device (default: unlimited)")
    parser.add_argument("--passes", type=int, default=8, help="that count (default: %(default)s)")
    parser.add_argument("--no-tests", action="store_true", help="leave out `pytest -m gpu`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--child", nargs=3, metavar=("FAMILY", "WAY", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _open(name: str, memory: str | None) -> torch.device:
    """The device; "sim" is installed first, with so much memory."""
    if name.startswith("sim"):
        torch.set_num_threads(1)  # it computes on the CPU, and small models
        sim.install(devices=1, memory=memory)
    return torch.device(name)


def _about(device: torch.device, size: str) -> dict[str, Any]:
    versions = {}
    for package in ("hookcore", "torch", "diffusers", "accelerate"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    module = torch.get_device_module(device)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": f"{module.get_device_name(device)}, {format_bytes(module.mem_get_info(device)[1])}",
        "size": size,
        "versions": versions,
    }


def _run_tests() -> str:
    """Runs the tests that need a device; the last line of what they say."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=_BENCHMARKS.parent, capture_output=True, text=True, check=False)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    print(f"pytest -m gpu: {last}")
    return last


def calibrate(device: torch.device, size: str) -> Rates:
    """Measures copies from pinned and pageable memory, and multiplications of matrices."""
    nbytes, edge = _SIZES_OF_CALIBRATION[size]
    dtype = torch.bfloat16 if size == "full" else torch.float32
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    pageable = torch.zeros(nbytes, dtype=torch.uint8)
    pinned = torch.zeros(nbytes, dtype=torch.uint8).pin_memory()
    matrix = torch.randn(edge, edge).to(device, dtype)

    def seconds(work: Callable[[], object]) -> float:
        return min(_time_each(device, work, 5)[0])

    return Rates(
        pinned=nbytes / seconds(lambda: target.copy_(pinned, non_blocking=True)),
        pageable=nbytes / seconds(lambda: target.copy_(pageable)),
        matmul=2 * edge**3 / seconds(lambda: matrix @ matrix),
    )


def _time_each(
    device: torch.device, work: Callable[[], object], count: int
) -> tuple[list[float], list[float]]:
    """Seconds of each time, on the device and until the host had begun it; nothing is waited for between."""
    module = torch.get_device_module(device)
    marks = [module.Event(enable_timing=True) for _ in range(count + 1)]
    host = []
    module.synchronize(device)
    marks[0].record(module.current_stream(device))
    for mark in marks[1:]:
        begun = time.perf_counter()
        work()
        host.append(time.perf_counter() - begun)
        mark.record(module.current_stream(device))
    module.synchronize(device)
    return [a.elapsed_time(b) * _MILLI for a, b in itertools.pairwise(marks)], host


# One way, in a process of its own


def _run_child(arguments: argparse.Namespace, family: str, way: str) -> Outcome:
    path = _BENCHMARKS / "results" / f".{family}-{way}.json"
    command = [sys.executable, __file__, "--device", arguments.device, "--size", arguments.size]
    command += ["--memory", arguments.memory] if arguments.memory else []
    command += ["--passes", str(arguments.passes), "--child", family, way, str(path)]
    print(f"{family}, {way} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if path.exists():
            return Outcome(**json.loads(path.read_text()))
        last = " ".join(done.stderr.strip().splitlines()[-_ERROR_LINES:])
        return Outcome(way, family, 0, failed=f"exit status {done.returncode}: {last}")
    finally:
        path.unlink(missing_ok=True)


def _be_child(arguments: argparse.Namespace) -> None:
    family, way, path = arguments.child
    device = _open(arguments.device, arguments.memory)
    model = build(family, arguments.size)
    budget = None
    put_on = all_ways()[way]
    if put_on is None:
        budget = model.nbytes * int(way.rpartition("-")[2]) // 100
        put_on = ways.with_hookcore(budget)
    outcome = Outcome(way, model.title, model.nbytes, budget)
    try:
        outcome = run_way(outcome, model, device, put_on, arguments.passes)
    except (torch.OutOfMemoryError, BudgetError) as error:
        last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        outcome = evolve(outcome, failed=last)
    Path(path).write_text(json.dumps(asdict(outcome)))


@torch.no_grad()
def run_way(outcome: Outcome, model: Model, device: torch.device, put_on: PutOn, passes: int) -> Outcome:
    """Runs a way from the start; fills in what it did."""
    module = torch.get_device_module(device)
    begun = time.perf_counter()
    put_on(model.module, device)
    set_up = time.perf_counter() - begun
    inputs = model.make_inputs(device)
    for _ in range(_WARM_UP):
        output = model.module(**inputs)[0]
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    del output
    seconds, host = _time_each(device, lambda: model.module(**inputs), passes)
    reserved = getattr(module, "max_memory_reserved", None)
    allocated = module.max_memory_allocated(device)
    checksum = model.module(**inputs)[0].double().abs().sum().item()
    stats = getattr(module, "host_memory_stats", dict)()
    storages = {it.untyped_storage().data_ptr(): it for it in model.module.parameters() if it.is_pinned()}
    return evolve(
        outcome,
        set_up=set_up,
        passes=seconds,
        host=host,
        allocated=allocated,
        reserved=None if reserved is None else reserved(device),
        pinned=sum(it.untyped_storage().nbytes() for it in storages.values()),
        pinned_allocator=stats.get("allocated_bytes.peak"),
        host_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        checksum=checksum,
    )


# Showing


def _show(outcomes: list[Outcome], rates: Rates) -> None:
    first = outcomes[0]
    print(f"\n{first.model}, {format_bytes(first.nbytes)} of weights\n")
    resident = next((it for it in outcomes if it.way == ways.RESIDENT and it.passes), None)
    titles = (
        "",
        "ms a pass",
        "fastest",
        "bound",
        "host ms",
        "allocated",
        "reserved",
        "pinned",
        "of allocator",
    )
    rows = [(*titles, "process", "set-up s", "output")]
    for it in outcomes:
        if it.failed:
            rows.append((it.way, "failed", *[""] * (len(rows[0]) - 2)))
            continue
        rows.append(
            (
                it.way,
                f"{statistics.median(it.passes) * 1e3:.4g}",
                f"{min(it.passes) * 1e3:.4g}",
                _bound(it, resident, rates),
                f"{statistics.median(it.host) * 1e3:.4g}",
                format_bytes(it.allocated),
                "" if it.reserved is None else format_bytes(it.reserved),
                format_bytes(it.pinned),
                "" if it.pinned_allocator is None else format_bytes(it.pinned_allocator),
                format_bytes(it.host_peak),
                f"{it.set_up:.1f}",
                "" if resident is None else "equal" if it.checksum == resident.checksum else "differs",
            )
        )
    print("\n".join(columns(rows)))
    for it in outcomes:
        if it.failed:
            print(f"{it.way}: {it.failed}")


def _bound(outcome: Outcome, resident: Outcome | None, rates: Rates) -> str:
    """Milliseconds that a pass within the budget cannot take less than, where both are known."""
    if outcome.budget is None or resident is None:
        return ""
    copying = (outcome.nbytes - outcome.budget) / rates.pinned
    return f"{max(copying, statistics.median(resident.passes)) * 1e3:.4g}"


if __name__ == "__main__":
    main()
