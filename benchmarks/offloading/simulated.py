"""Runs ways on the simulated accelerator and takes down what they did: time, memory, copies, waits."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import patch

import torch
from attrs import evolve, frozen
from torch.profiler import ProfilerActivity, profile

import hookcore.testing.simulator as sim
from hookcore.testing.simulator.state import get_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from hookcore.testing.simulator import DeviceProfile, Trace
    from offloading.models import Model
    from offloading.ways import PutOn

COMPUTE_SECONDS = 0.160
"""What a pass of the resident model takes."""
WARM_UP = 3
PASSES = 8
_DEVICE = "sim"
_CALIBRATIONS = 6
# The host and the kernels cost next to nothing: what is compared is how computing and copying overlap.
_PROFILE = sim.DeviceProfile(
    name="simulated accelerator",
    launch_latency=1e-7,
    kernel_latency=1e-6,
    copy_latency=10e-6,
    memory_bandwidth=1e15,
)


@frozen
class Setting:
    """A model and a device on which a pass of it computes for `COMPUTE_SECONDS`.

    Attributes:
        model: The model.
        nbytes: Bytes of its weights.
        profile: The device.
        reference: What the resident model gives.
        seconds: What a pass of the resident model really takes.
        activations: Bytes that a pass takes beside the weights, inputs included.
    """

    model: Model
    nbytes: int
    profile: DeviceProfile
    reference: torch.Tensor
    seconds: float
    activations: int

    def linked(self, ratio: float) -> DeviceProfile:
        """The device with a link that copies all weights in so many times the time of computing."""
        bandwidth = self.nbytes / (self.seconds * ratio)
        return evolve(
            self.profile, host_to_device=bandwidth, device_to_host=bandwidth, pageable=bandwidth / 2
        )


@frozen
class Run:
    """What a way did.

    Attributes:
        seconds: Virtual, a pass, once it runs as it goes on.
        peak: Most bytes of the device in any pass.
        peaks: The same for each pass by itself.
        pinned: Most page-locked host bytes.
        waits: How often the host waited or asked, a pass.
        waited: Virtual seconds that the host waited, a pass.
        copies: Copies to the device a pass.
        streamed: Groups that lie in host memory between calls: distinct stretches of memory.
        moved_back: Copies to the host a pass.
        stalled: Virtual seconds a pass that computing waited for copies.
        equal: Whether the output has the bits of the resident model's.
    """

    seconds: float
    peak: int
    peaks: tuple[int, ...]
    pinned: int
    waits: float
    waited: float
    copies: float
    streamed: int
    moved_back: float
    stalled: float
    equal: bool


class HostWatch:
    """Counts how often, and for how long, the simulated host waits within a `with` block.

    All that the host can wait for (events, streams, devices, copies that block) goes through one method of
    the machine; asking (`query`) goes through another. The host's time grows with each launch and with each
    wait, so what launches don't explain was waited. That also finds copies from pageable memory.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self._launches = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        machine = get_machine()

        def counted(name: str, *, waits: bool) -> None:
            method = getattr(machine, name)

            def call(*args: Any) -> Any:
                self.count += waits
                self._launches += not waits or name == "host_asks"
                return method(*args)

            self._stack.enter_context(patch.object(machine, name, call))

        counted("begin", waits=False)
        counted("host_asks", waits=True)
        counted("host_waits", waits=True)
        self._begun = sim.now()
        return self

    def __exit__(self, *_: object) -> None:
        launches = self._launches * get_machine().devices[0].profile.launch_latency
        self.seconds = max(0.0, sim.now() - self._begun - launches)
        self._stack.close()


def calibrate(model: Model) -> Setting:
    """Finds the rate of computing at which a pass takes `COMPUTE_SECONDS`."""
    _start_empty()
    module = copy.deepcopy(model.module).to(_DEVICE)
    profile = evolve(_PROFILE, flops_32=1e9)
    for _ in range(_CALIBRATIONS):
        with sim.limited(profile=profile):
            sim.reset()
            run = _Passes(model, module)
            run.warm_up(1)
            profile = evolve(profile, flops_32=profile.flops_32 * run.timed(1).seconds / COMPUTE_SECONDS)
    with sim.limited(profile=profile):
        sim.reset()
        run = _Passes(model, module)
        run.warm_up(2)
        found = run.timed(PASSES)
    return Setting(
        model=model,
        nbytes=model.nbytes,
        profile=profile,
        reference=run.output,
        seconds=found.seconds,
        activations=max(run.peaks) - model.nbytes,
    )


def _start_empty() -> None:
    """Sees to it that nothing of an earlier run counts: hooks refer to models in cycles."""
    sim.reset()  # copies that still run hold their source
    gc.collect()
    left = torch.get_device_module(_DEVICE).memory_allocated()
    if left or sim.pinned_bytes():
        raise RuntimeError(
            f"{left} B of the device and {sim.pinned_bytes()} B of pinned memory are left over"
        )


def run_way(setting: Setting, ratio: float, put_on: PutOn) -> Run:
    """Runs a way from the start, on a copy of the model.

    Args:
        setting: The model and the device.
        ratio: Of the time to copy all weights to the time to compute.
        put_on: The way.

    Raises:
        RaceError: It has a race.
    """
    _start_empty()
    module = copy.deepcopy(setting.model.module)
    with sim.limited(profile=setting.linked(ratio)):
        sim.reset()
        put_on(module, torch.device(_DEVICE))
        run = _Passes(setting.model, module)
        run.warm_up(WARM_UP)
        found = run.timed(PASSES)
        pinned = sim.max_pinned_bytes()
        sim.check()
    copied = _copied(found.trace)
    return Run(
        seconds=found.seconds,
        peak=max(run.peaks),
        peaks=tuple(run.peaks),
        pinned=pinned,
        waits=found.host.count / PASSES,
        waited=found.host.seconds / PASSES,
        copies=copied["copy in"] / PASSES,
        streamed=len(
            {it.untyped_storage().data_ptr() for it in module.parameters() if it.device.type == "cpu"}
        ),
        moved_back=copied["copy out"] / PASSES,
        stalled=found.trace.stalled() / PASSES,
        equal=torch.equal(run.output, setting.reference),
    )


def host_peak(setting: Setting, put_on: PutOn) -> int:
    """Most bytes, in all, of host memory for weights while a way is put on, those of the model included."""
    _start_empty()
    with _no_messages(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module = copy.deepcopy(setting.model.module)  # in here, or its end would not be seen
        put_on(module, torch.device(_DEVICE))
    results: Any = profiler.profiler
    changes = [it for it in results.kineto_results.events() if it.name() == "[memory]"]
    sizes = [it.nbytes() for it in sorted(changes, key=lambda it: it.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


@contextlib.contextmanager
def _no_messages() -> Iterator[None]:
    """Hides what torch's profiler writes on stderr at its begin and its end."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _copied(trace: Trace) -> dict[str, int]:
    return {engine: sum(span.engine == engine for span in trace.spans) for engine in ("copy in", "copy out")}


@frozen
class _Timed:
    seconds: float
    trace: Trace
    host: HostWatch


class _Passes:
    """Calls a model again and again; the host never waits between two passes that it can run ahead of."""

    def __init__(self, model: Model, module: nn.Module) -> None:
        self.peaks: list[int] = []
        self._module = module
        self._inputs = model.make_inputs(torch.device(_DEVICE))
        self._device = torch.get_device_module(_DEVICE)
        self._last: torch.Tensor | None = None

    def warm_up(self, count: int) -> None:
        """Runs passes that don't count."""
        for _ in range(count):
            self._once()
        self._device.synchronize()

    def timed(self, count: int) -> _Timed:
        """Runs passes that count; then waits."""
        start = sim.now()
        with sim.traced() as trace, HostWatch() as host:
            for _ in range(count):
                self._once()
        self._device.synchronize()
        return _Timed((sim.now() - start) / count, trace, host)

    @property
    def output(self) -> torch.Tensor:
        """What the last pass gave, on the CPU."""
        if self._last is None:
            raise RuntimeError("there was no pass")
        return self._last.cpu()

    @torch.no_grad()
    def _once(self) -> None:
        self._last = None
        self._device.reset_peak_memory_stats()
        self._last = self._module(**self._inputs)[0]
        self.peaks.append(self._device.max_memory_allocated())
