"""What `torch.get_device_module("sim")` gives: the functions of `torch.cuda` that a device module has."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from hookcore.testing.simulator import allocation, state
from hookcore.testing.simulator.cuda_runtime import CudaRuntime
from hookcore.testing.simulator.errors import UnsupportedOperationError
from hookcore.testing.simulator.graphs import CUDAGraph, graph, is_current_stream_capturing
from hookcore.testing.simulator.streams import Event, Stream

if TYPE_CHECKING:
    from hookcore.testing.simulator.device_memory import DeviceMemory

    AnyDevice = torch.device | str | int | None

__all__ = [
    "CUDAGraph",
    "Event",
    "Stream",
    "_sleep",
    "cudart",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "graph",
    "is_available",
    "is_current_stream_capturing",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "reset_peak_memory_stats",
    "set_device",
    "set_rng_state",
    "set_stream",
    "stream",
    "synchronize",
]


def is_available() -> bool:
    """Return whether there is a device."""
    return True


def is_initialized() -> bool:
    """Return whether it can be used."""
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    """Return how many devices there are."""
    return len(state.get_machine().devices)


def current_device() -> int:
    """Index of the calling thread's current device."""
    return state.current.device


def set_device(device: AnyDevice) -> None:
    """Make a device the calling thread's current one."""
    state.current.device = state.device_index(device)


class device:  # noqa: N801 -- torch.cuda's name
    """Makes a device the current one within a `with` block."""

    def __init__(self, device: AnyDevice) -> None:
        self._index = state.device_index(device)
        self._before: list[int] = []

    def __enter__(self) -> None:
        self._before.append(state.current.device)
        state.current.device = self._index

    def __exit__(self, *error: object) -> None:
        state.current.device = self._before.pop()


def current_stream(device: AnyDevice = None) -> Stream:
    """The calling thread's current stream of a device."""
    index = state.device_index(device)
    return Stream(index, number=state.current.streams.get(index, 0))


def default_stream(device: AnyDevice = None) -> Stream:
    """The stream that is current where no other was made so."""
    return Stream(state.device_index(device), number=0)


def set_stream(stream: torch.Stream) -> None:
    """Make a stream the current one of its device."""
    state.current.streams[stream.device_index] = stream.stream_id


def stream(stream: Stream | None) -> contextlib.AbstractContextManager[Any]:
    """Make a stream and its device current within a `with` block; None changes nothing."""
    return contextlib.nullcontext() if stream is None else stream


def cudart() -> CudaRuntime:
    """The functions of CUDA's runtime that torch offers."""
    return CudaRuntime()


def synchronize(device: AnyDevice = None) -> None:
    """Let the host wait for all streams of a device."""
    machine = state.get_machine()
    with machine.lock:
        machine.reach("synchronize")
        machine.synchronize(state.device_index(device))
        machine.findings.raise_found()


def _sleep(cycles: int) -> None:
    """Run a kernel on the current stream that takes a number of cycles at 1 GHz, and touch no memory."""
    machine = state.get_machine()
    stream = state.current_stream_state(state.current.device)
    with machine.lock:
        machine.finish(machine.launch(stream, "sleep"), stream, "compute", cycles * 1e-9)


def _memory(device: AnyDevice) -> DeviceMemory:
    machine = state.get_machine()
    with machine.lock:
        machine.settle()
        memory = machine.devices[state.device_index(device)].memory
        memory.release(machine.host_time)
        return memory


def memory_allocated(device: AnyDevice = None) -> int:
    """Bytes in use, with those that `record_stream` still holds; exact, unless torch's cache is simulated."""
    return _memory(device).allocated


def memory_reserved(device: AnyDevice = None) -> int:
    """Bytes in use and, where torch's cache is simulated, those that it keeps."""
    return _memory(device).reserved


def max_memory_allocated(device: AnyDevice = None) -> int:
    """The most bytes that were in use since the peak was reset."""
    return _memory(device).count.peak


def max_memory_reserved(device: AnyDevice = None) -> int:
    """The most bytes that were reserved since the peak was reset."""
    memory = _memory(device)
    return memory.count.peak if memory.cache is None else memory.most_reserved


def reset_peak_memory_stats(device: AnyDevice = None) -> None:
    """Begin new peaks from what is in use now."""
    _memory(device).reset_peaks()


def mem_get_info(device: AnyDevice = None) -> tuple[int, int]:
    """Bytes that nobody has reserved, and total bytes; of a device without a limit, a tebibyte."""
    memory = _memory(device)
    total = 1 << 40 if memory.capacity is None else memory.capacity
    return total - memory.reserved, total


def empty_cache() -> None:
    """Give memory that torch's cache keeps back to the devices, where it is simulated."""
    machine = state.get_machine()
    with machine.lock:
        for device in machine.devices:
            allocation.empty_cache(machine, device.index)


class _NoDtypes(list[torch.dtype]):
    """The types that autocast can compute in. Looking for one raises: torch would go on without autocast."""

    def __contains__(self, dtype: object) -> bool:
        raise UnsupportedOperationError(
            f"the simulated device has no autocast, and was asked for one in {dtype}; cast the model instead"
        )


def get_amp_supported_dtype() -> list[torch.dtype]:
    """None; torch asks for it also where autocast is off, as in activation checkpointing."""
    return _NoDtypes()


def get_device_name(device: AnyDevice = None) -> str:
    """The name in the device's profile."""
    return state.get_machine().devices[state.device_index(device)].profile.name


def get_device_properties(device: AnyDevice = None) -> Any:
    """The device's profile, with `total_memory` in bytes beside it."""
    from types import SimpleNamespace

    profile = state.get_machine().devices[state.device_index(device)].profile
    return SimpleNamespace(name=profile.name, total_memory=mem_get_info(device)[1], profile=profile)


def manual_seed(seed: int) -> None:
    """Do nothing: random numbers come from the CPU's generator."""


def manual_seed_all(seed: int) -> None:
    """Do nothing: random numbers come from the CPU's generator."""


def get_rng_state(device: AnyDevice = None) -> torch.Tensor:  # noqa: ARG001 -- one generator for all
    """The state of the CPU's generator, from which random numbers come."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: AnyDevice = None) -> None:  # noqa: ARG001
    """Set the state of the CPU's generator."""
    torch.set_rng_state(new_state)
