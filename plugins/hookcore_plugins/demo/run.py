"""Runs the ways one after another, compares their outputs, and shows what they took."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, frozen
from tqdm import tqdm

from hookcore import format_bytes, parse_bytes
from hookcore.memory import make_claimed
from hookcore_plugins.demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hookcore_plugins.demo.child import Measurement, Request
    from hookcore_plugins.demo.model import DemoCheckpoints, DemoModel

_NEEDED = ("accelerate", "diffusers", "matplotlib", "psutil")
_ERROR_LINES = 15
_ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far, relative to the largest value, outputs of the same weights at other addresses may lie apart."""


@frozen
class Difference:
    """How an output differs from the resident model's.

    Attributes:
        equal: Whether every bit is the same.
        largest: Largest difference of an element, relative to the largest element; inf if one is no number.
        mean: Mean difference of the elements, relative to their mean.
    """

    equal: bool
    largest: float
    mean: float

    @classmethod
    def of(cls, output: torch.Tensor, reference: torch.Tensor) -> Difference:
        """Compare two outputs of float32."""
        if not torch.isfinite(output).all():
            return cls(equal=False, largest=float("inf"), mean=float("inf"))
        distance, size = (output - reference).abs(), reference.abs()
        return cls(
            equal=torch.equal(output.view(torch.int32), reference.view(torch.int32)),
            largest=(distance.max() / size.max()).item(),
            mean=(distance.mean() / size.mean()).item(),
        )

    def __str__(self) -> str:
        return "equal" if self.equal else f"{self.largest:.1e}"


def require_packages() -> None:
    """Check that what the demo uses is installed.

    Raises:
        DemoError: Something is not.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise DemoError(f"the demo needs {', '.join(missing)}. Install: pip install 'hookcore[demo]'")


def choose_device() -> tuple[torch.device, str]:
    """The accelerator, if there is one with torch's small dtypes, and the name of the dtype to compute in.

    A CPU computes in float32. Without bf16 units bfloat16 is several times slower. With them it is faster,
    but the next smaller dtype is then an 8-bit float, and CPUs convert those so slowly (70 million a second;
    of bfloat16 3,400 million) that casting takes far longer than computing.
    """
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        if device is not None and device.type != "mps":  # has no 8-bit floats
            return device, "bfloat16"
    return torch.device("cpu"), "float32"


def run_demo(*, size: str, budget: str, family: str, steps: int, out: Path, cache: Path) -> int:
    """Run all of the demo.

    Args:
        size: Bytes of weights, as text.
        budget: Bytes of memory for weights, as text.
        family: "flux" or "sd3".
        steps: Denoising steps.
        out: Folder for the picture and the figures.
        cache: Folder for the model.

    Returns:
        0, or 1 if outputs differ that must not.

    Raises:
        DemoError: It cannot be run like that.
        BudgetError: The budget is less than one layer needs.
    """
    require_packages()
    from hookcore_plugins.demo import draw
    from hookcore_plugins.demo.child import Request
    from hookcore_plugins.demo.model import DemoModel, build, disk_needed, disk_taken, require_free
    from hookcore_plugins.demo.ways import DEMO_WAYS, WAYS, Setting

    nbytes, budget_bytes = _sizes(size, budget)
    if steps < 1:
        raise DemoError(f"--steps is {steps}; a run takes at least one")
    device, dtype = choose_device()
    model = DemoModel(family, nbytes, dtype)
    print(  # noqa: T201
        f"{model.model_class.__name__}, {format_bytes(nbytes)} in {dtype} on {device}; "
        f"{format_bytes(budget_bytes)} of memory for weights"
    )
    with tqdm(total=float(disk_needed(model)), desc="build the model", unit="B", unit_scale=True) as bar:
        checkpoints = build(model, cache, bar.update)
        bar.update(disk_needed(model) - bar.n)
    print(f"it takes {format_bytes(disk_taken(checkpoints))} in {cache / model.key}")  # noqa: T201
    check_budget(model, checkpoints, device, budget_bytes)
    require_free(cache, nbytes, "accelerate's copy of the weights")

    measured: dict[str, Measurement] = {}
    outputs: dict[str, torch.Tensor] = {}
    with tqdm(total=len(DEMO_WAYS) * (steps + 1), unit="step") as bar, scratch_folder(cache) as scratch:
        for name in DEMO_WAYS:
            bar.set_description(f"{WAYS[name].title:<26}")
            setting = Setting(model, checkpoints, device, budget_bytes, scratch / name)
            request = Request(name, setting, steps)
            measured[name], outputs[name] = run_way(request, lambda _event, _seconds: bar.update())
    differences = {name: Difference.of(output, outputs["resident"]) for name, output in outputs.items()}

    print(f"\n{draw.table(measured, differences)}\n\n{draw.bars(measured, budget_bytes)}\n")  # noqa: T201
    out.mkdir(parents=True, exist_ok=True)
    about = {**about_machine(device), "model": asdict(model), "budget": budget_bytes, "steps": steps}
    results = {
        **about,
        "ways": {
            name: asdict(measured[name]) | {"difference": asdict(differences[name])} for name in measured
        },
    }
    (out / "results.json").write_text(f"{json.dumps(results, indent=2)}\n")
    draw.picture(measured, about, out / "demo.png")
    print(f"saved {out / 'demo.png'} and {out / 'results.json'}")  # noqa: T201
    if faults := wrong(differences, dtype):
        sys.stderr.write("".join(f"hookcore: error: {fault}\n" for fault in faults))
        return 1
    return 0


def _sizes(size: str, budget: str) -> tuple[int, int]:
    try:
        nbytes, budget_bytes = parse_bytes(size), parse_bytes(budget)
    except ValueError as error:
        raise DemoError(str(error)) from error
    if budget_bytes >= nbytes:
        raise DemoError(
            f"--budget {format_bytes(budget_bytes)} holds the whole model of {format_bytes(nbytes)}. "
            "Choose a smaller budget or a larger --size"
        )
    return nbytes, budget_bytes


def check_budget(model: DemoModel, checkpoints: DemoCheckpoints, device: torch.device, budget: int) -> None:
    """Find out before anything is run whether the budget is enough.

    Raises:
        BudgetError: It is not; names the least that is.
    """
    from hookcore_plugins.demo.ways import WAYS, Setting

    # Of the two ways of hookcore, the one that casts holds more at once: a layer in both dtypes.
    WAYS["hookcore-cast"].start(Setting(model, checkpoints, device, budget, checkpoints.full))


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A folder on the model's disk that is deleted at the end, or by the next demo if this one is killed."""
    made: list[Path] = []

    def make() -> int:
        made.append(Path(tempfile.mkdtemp(dir=cache, prefix="scratch-")))
        return os.open(made[0], os.O_RDONLY)

    claim = make_claimed(cache, "scratch-*", make)
    try:
        yield made[0]
    finally:
        shutil.rmtree(made[0])
        os.close(claim)


def run_way(request: Request, tell: Callable[[str, float], object]) -> tuple[Measurement, torch.Tensor]:
    """Run one way in a fresh process.

    Args:
        request: What to run. Its scratch folder is made here, and deleted at the end.
        tell: Is told what happens ("ready", "step") and how many seconds it took.

    Returns:
        What it took, and the final latents, flat.

    Raises:
        DemoError: The process failed; shows the end of what it wrote.
    """
    from hookcore_plugins.demo.child import Measurement

    scratch = request.setting.scratch
    scratch.mkdir()
    described, output, errors = (scratch.with_suffix(it) for it in (".json", ".output", ".errors"))
    described.write_text(request.to_json())
    command = [sys.executable, "-m", "hookcore_plugins.demo.child", str(described), str(output)]
    result = None
    try:
        with (
            errors.open("w") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,  # noqa: S603
        ):
            for line in process.stdout or ():
                ((event, value),) = json.loads(line).items()
                if event == "result":
                    result = Measurement(**value | {"steps": tuple(value["steps"])})
                else:
                    tell(event, value)
    finally:
        shutil.rmtree(scratch)
    if result is None:
        last = "\n".join(errors.read_text().splitlines()[-_ERROR_LINES:])
        raise DemoError(f"way {request.way!r} ended with status {process.returncode}:\n{last}")
    return result, torch.frombuffer(bytearray(output.read_bytes()), dtype=torch.float32)


def wrong(differences: Mapping[str, Difference], dtype: str) -> list[str]:
    """Return what is wrong with the outputs; empty if nothing is.

    Args:
        differences: To the resident model's output, by way.
        dtype: What was computed in.
    """
    from hookcore_plugins.demo.ways import WAYS

    faults = []
    for name, difference in differences.items():
        way = WAYS[name]
        if math.isinf(difference.largest):
            faults.append(f"the output of '{way.title}' has values that are no finite numbers")
        elif way.exact and not difference.equal:
            faults.append(
                f"the output of '{way.title}' must have the bits of the resident model's, but differs by "
                f"{difference} of the largest value"
            )
        elif way.lossless and difference.largest > _ROUNDING[dtype]:
            faults.append(
                f"the output of '{way.title}' differs from the resident model's by {difference} of the "
                f"largest value, more than another order of summation explains ({_ROUNDING[dtype]:.0e})"
            )
    return faults


def about_machine(device: torch.device) -> dict[str, Any]:
    """Return what figures depend on: date, device, versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "machine": f"{platform.system()} {platform.machine()}, {_processor(device)}",
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name) for name in ("hookcore", "torch", "diffusers", "accelerate", "safetensors")
        },
    }


def _processor(device: torch.device) -> str:
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    info = Path("/proc/cpuinfo")
    found = info.read_text().partition("model name")[2] if info.exists() else ""
    return found.partition("\n")[0].strip("\t :") or platform.processor()
