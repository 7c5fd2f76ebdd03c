"""What offloading costs in Python: CPU time of a hooked call, with a device whose own work is free.

On a real device, a host that runs ahead hides this cost, until calls are so short that it cannot. To see the
cost alone, "cpu" is given a device module whose streams and events do nothing, both for hookcore and for
diffusers; each then runs the lines that it runs on any accelerator. Copies are real, if small:
hookcore's `copy_`, one a group, and diffusers' `to`, one a tensor. That favours diffusers, as beginning a
copy costs more on a real device than making a small one on the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from attrs import frozen
from torch import nn

import hookcore
import hookcore_plugins.group_offload
from hookcore_plugins import GroupOffload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offloading.ways import PutOn

BLOCKS = 20
LAYERS = 10
_WIDTH = 8
_WARM_UP = 5


@frozen
class Cost:
    """Microseconds of a hooked call above a plain one: median and minimum of the rounds."""

    median: float
    minimum: float


class _FreeStream:
    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...


class _FreeEvent:
    def __init__(self, *, enable_timing: bool = False) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0  # of each use and each copy: the link keeps up with computing


_STREAM = _FreeStream()
_FREE = SimpleNamespace(
    Stream=lambda *_args, **_kwargs: _STREAM,
    Event=_FreeEvent,
    stream=lambda _stream: contextlib.nullcontext(),
    current_stream=lambda *_args: _STREAM,
    current_device=lambda: None,
    synchronize=lambda *_args: None,
    cudart=lambda: SimpleNamespace(cudaHostRegister=lambda *_args: 0, cudaHostUnregister=lambda *_args: 0),
)


_to = torch.Tensor.to


def _copied_to(tensor: torch.Tensor, *args: Any, copy: bool = True, **kwargs: Any) -> torch.Tensor:
    return _to(tensor, *args, copy=copy, **kwargs)


@contextlib.contextmanager
def free_device() -> Iterator[None]:
    """Gives "cpu" streams and events that do nothing, copies, and memory that counts as page-locked."""
    with (
        patch.object(torch, "get_device_module", lambda _device=None: _FREE),
        patch.object(torch.Tensor, "to", _copied_to),
        patch.object(torch.Tensor, "is_pinned", lambda _tensor: True),
        patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),
        patch.object(hookcore_plugins.group_offload, "has_streams", lambda _device: True),
    ):
        yield


def _model() -> nn.Module:
    """A model of many leaves whose calls cost little, so that what is around them shows."""
    return nn.Sequential(
        *(nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(LAYERS))) for _ in range(BLOCKS))
    )


def _with_diffusers(module: nn.Module, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    # It refuses streams for "cpu", so it is told of another device and then set right. Weights must not seem
    # to lie on the device that they are brought to: hence the number.
    apply_group_offloading(
        module,
        onload_device=torch.device("meta") if device.type == "cpu" else device,
        offload_device=torch.device("cpu:0") if device.type == "cpu" else torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=True,
        non_blocking=True,
    )
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        hook = registry and registry.get_hook("group_offloading")
        if hook:
            hook.group.onload_device = hook.config.onload_device = device


def _with_hookcore(share: float | None) -> PutOn:
    def put_on(module: nn.Module, device: torch.device) -> None:
        nbytes = sum(it.nbytes for it in module.parameters())
        budget = None if share is None else int(share * nbytes)
        hookcore.apply(module, [GroupOffload(device, use_stream=True, memory_budget=budget)])

    return put_on


OURS: dict[str, PutOn] = {
    "hookcore, least memory": _with_hookcore(None),
    "hookcore, budget of 25%": _with_hookcore(0.25),
    "hookcore, budget of 50%": _with_hookcore(0.5),
}
THEIRS = "diffusers, leaves, stream"


def measure(rounds: int = 60) -> dict[str, Cost]:
    """Measures on a device whose own work is free.

    Returns:
        For each contestant, the cost of a call of a leaf with its group's onload and offload.
    """
    with free_device():
        return _measure(torch.device("cpu"), rounds)


def measure_simulated(rounds: int = 15) -> dict[str, Cost]:
    """Measures on the simulated accelerator, where each operation costs tens of microseconds of CPU time."""
    return _measure(torch.device("sim"), rounds)


@torch.no_grad()
def _measure(device: torch.device, rounds: int) -> dict[str, Cost]:
    """Measures all contestants in turns, each round beside a plain call of its own."""
    x = torch.zeros(1, _WIDTH).to(device)
    models = {"plain": _model().to(device)}
    for name, put_on in {**OURS, THEIRS: _with_diffusers}.items():
        models[name] = _model()
        put_on(models[name], device)
    for model in models.values():
        for _ in range(_WARM_UP):
            model(x)
    taken: dict[str, list[float]] = {name: [] for name in models}
    gc.collect()
    gc.disable()  # a collection would fall on whoever is next
    try:
        for _ in range(rounds):
            for name, model in models.items():
                start = time.thread_time()  # so that other programs on the machine don't count
                model(x)
                taken[name].append(time.thread_time() - start)
    finally:
        gc.enable()
    plain = taken.pop("plain")
    scale = 1e6 / (BLOCKS * LAYERS)
    return {
        name: Cost(
            statistics.median(here - bare for here, bare in zip(seconds, plain, strict=True)) * scale,
            (min(seconds) - min(plain)) * scale,
        )
        for name, seconds in taken.items()
    }
