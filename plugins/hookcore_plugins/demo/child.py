"""One way, in a process of its own: `python -m hookcore_plugins.demo.child REQUEST.json OUTPUT`.

Peak memory is that of a process, so ways that are to be compared cannot share one. What happens is written
to standard output, one JSON object a line: `{"ready": seconds}`, `{"step": seconds}` for each step, and at
last `{"result": {...}}`. The final latents go to the file OUTPUT.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from attrs import asdict, frozen

import hookcore
from hookcore import parse_dtype
from hookcore_plugins.demo.model import DemoCheckpoints, DemoModel
from hookcore_plugins.demo.ways import WAYS, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_CHUNK = 8 * 1024**2


@frozen
class Request:
    """What a process is to measure.

    Attributes:
        way: Its key in `WAYS`.
        setting: What the way is given.
        steps: Denoising steps.
        threads: CPU threads to compute with; None leaves it to torch.
        cold: Whether files are dropped from the system's cache before loading and before each step.
            Otherwise they are read before loading.
    """

    way: str
    setting: Setting
    steps: int
    threads: int | None = None
    cold: bool = False

    def to_json(self) -> str:
        """Write it, for the process to read."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        setting = values.pop("setting")
        return cls(
            setting=Setting(
                model=DemoModel(**setting["model"]),
                checkpoints=DemoCheckpoints(**{k: Path(v) for k, v in setting["checkpoints"].items()}),
                device=torch.device(setting["device"]),
                budget=setting["budget"],
                scratch=Path(setting["scratch"]),
            ),
            **values,
        )


@frozen
class Measurement:
    """What a process found.

    Attributes:
        setup: Seconds from after the imports until the model could be called, loading included.
        steps: Seconds of each step.
        rss_before: Bytes of the process in memory without weights: after imports and a call of a tiny model.
        peak: Most bytes of the process in memory.
        peak_steps: Likewise, during the steps only; None where the system cannot tell.
        device_peak: Most bytes on the accelerator; None without one.
        written: Bytes that the process wrote to disk meanwhile; 0 where the system does not count them.
        left: Bytes of files in the scratch folder at the end.
        digest: SHA-256 of the output.
    """

    setup: float
    steps: tuple[float, ...]
    rss_before: int
    peak: int
    peak_steps: int | None
    device_peak: int | None
    written: int
    left: int
    digest: str

    @property
    def weights_peak(self) -> int:
        """Bytes by which the process grew: weights, and activations of a few MiB."""
        return self.peak - self.rss_before

    @property
    def memory(self) -> int:
        """What the ways are compared by: `device_peak` if there is one, otherwise `weights_peak`."""
        return self.weights_peak if self.device_peak is None else self.device_peak


def measure(request: Request, tell: Callable[[str, Any], None]) -> tuple[Measurement, bytes]:
    """Run one way.

    Args:
        request: What to run.
        tell: Is told what happens and how many seconds it took.

    Returns:
        What it took, and the final latents as raw float32.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    way, setting, device = WAYS[request.way], request.setting, request.setting.device
    scheduler = _import_all(setting)
    scheduler.set_timesteps(request.steps)
    _warm_up(setting)
    checkpoint = setting.checkpoints.full if way.lossless else setting.checkpoints.small
    if request.cold:
        drop_from_cache([checkpoint])
    else:
        read_into_cache(checkpoint)
    gc.collect()
    rss_before, written_before = psutil.Process().memory_info().rss, _written()

    begin = time.perf_counter()
    model = way.start(setting)
    _finish(device)
    setup = time.perf_counter() - begin
    written = _written() - written_before
    tell("ready", setup)

    peak_setup = peak_rss()
    reset = _reset_peak()
    output, seconds, written_by_steps = _denoise(model, scheduler, request, checkpoint, tell)
    peak_steps = peak_rss()
    measurement = Measurement(
        setup=setup,
        steps=seconds,
        rss_before=rss_before,
        peak=max(peak_setup, peak_steps),
        peak_steps=peak_steps if reset else None,
        device_peak=_device_peak(device),
        written=written + written_by_steps,
        left=sum(file.stat().st_size for file in setting.scratch.rglob("*") if file.is_file()),
        digest=hashlib.sha256(output).hexdigest(),
    )
    return measurement, output


def _import_all(setting: Setting) -> Any:
    """Import what any way will use, so that this is not measured; return the scheduler."""
    import accelerate  # noqa: F401
    from diffusers import FlowMatchEulerDiscreteScheduler

    hookcore.status(torch.nn.Identity())  # has hookcore find its plugins
    _ = setting.model.model_class
    return FlowMatchEulerDiscreteScheduler()


def _warm_up(setting: Setting) -> None:
    """Call the smallest model of the family, for all that a call loads and allocates besides weights."""
    demo, device = setting.model.smallest, setting.device
    model = demo.model_class(**demo.config).to(device, parse_dtype(demo.dtype))
    _velocity(model, demo, demo.start(device), demo.conditions(device), 1.0)
    _finish(device)


@torch.inference_mode()
def _velocity(
    model: Any, demo: DemoModel, latents: torch.Tensor, conditions: dict[str, torch.Tensor], time_step: float
) -> torch.Tensor:
    """Call the model once."""
    dtype = parse_dtype(demo.dtype)
    # Flux takes times from 0 to 1, SD3 from 0 to 1000.
    at = time_step / 1000 if demo.family == "flux" else time_step
    output = model(
        hidden_states=latents.to(dtype),
        timestep=torch.tensor([at], dtype=dtype, device=latents.device),
        **conditions,
        return_dict=False,
    )
    velocity: torch.Tensor = output[0].float()
    return velocity


def _denoise(
    model: Any, scheduler: Any, request: Request, checkpoint: Path, tell: Callable[[str, Any], None]
) -> tuple[bytes, tuple[float, ...], int]:
    """The loop of a diffusers pipeline, without text encoders and VAE.

    Returns:
        The final latents, the seconds of each step, and the bytes that the steps wrote.
    """
    demo, device = request.setting.model, request.setting.device
    latents = demo.start(device)
    conditions = demo.conditions(device)
    seconds = []
    written = 0
    for time_step in scheduler.timesteps:
        if request.cold:
            drop_from_cache([checkpoint, request.setting.scratch])  # which has file systems write a page
        written -= _written()
        begin = time.perf_counter()
        velocity = _velocity(model, demo, latents, conditions, time_step.item())
        latents = scheduler.step(velocity, time_step, latents, return_dict=False)[0]
        _finish(device)
        seconds.append(time.perf_counter() - begin)
        written += _written()
        tell("step", seconds[-1])
    return latents.cpu().numpy().tobytes(), tuple(seconds), written


def _finish(device: torch.device) -> None:
    """Wait for the accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device_peak(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return int(torch.get_device_module(device).max_memory_allocated(device))


def read_into_cache(folder: Path) -> None:
    """Read all files of a folder once."""
    buffer = bytearray(_CHUNK)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_from_cache(folders: Iterable[Path]) -> None:
    """Drop the files in folders from the system's cache, so that the next read comes from the disk.

    Pages that a process has mapped and in memory stay: they are in its own memory. Linux only.
    """
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not yet on disk cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_rss() -> int:
    """Most bytes that this process had in memory."""
    if sys.platform == "linux":
        # Not getrusage: that also counts the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak() -> bool:
    """Reset `peak_rss`, where the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _written() -> int:
    """Bytes that this process has had written to disk so far; 0 where the system does not count them."""
    process = psutil.Process()
    return int(process.io_counters().write_bytes) if hasattr(process, "io_counters") else 0


def _main() -> None:
    request = Request.from_json(Path(sys.argv[1]).read_text())
    events = sys.stdout

    def tell(event: str, value: Any) -> None:
        events.write(f"{json.dumps({event: value})}\n")
        events.flush()

    with contextlib.redirect_stdout(sys.stderr):  # libraries may print
        measurement, output = measure(request, tell)
    Path(sys.argv[2]).write_bytes(output)
    tell("result", asdict(measurement))


if __name__ == "__main__":
    _main()
