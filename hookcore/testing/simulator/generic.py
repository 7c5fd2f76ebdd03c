"""torch's device-neutral spelling: `torch.Stream("sim")`, `torch.Event("sim")`, `torch.accelerator`.

torch asks a guard written in C++ for streams and events; one written in Python can say no more than its
type. So the names are replaced: they make the simulator's own objects for a simulated device, and torch's
for any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hookcore.testing.simulator import device_module, state
from hookcore.testing.simulator.streams import Event, NativeEvent, NativeStream, Stream

if TYPE_CHECKING:
    from collections.abc import Callable


def install_generic_names() -> None:
    """Replace the names. Once is enough for the process."""
    setattr(torch, "Stream", _generic(NativeStream, Stream))  # noqa: B010 -- mypy knows it as a class
    setattr(torch, "Event", _generic(NativeEvent, Event))  # noqa: B010
    for name, function in _ACCELERATOR.items():
        setattr(torch.accelerator, name, function)
        if hasattr(torch.accelerator, "memory") and hasattr(torch.accelerator.memory, name):
            setattr(torch.accelerator.memory, name, function)


def _generic(native: type, simulated: Callable[..., Any]) -> type:
    """A class that stands for `native`, and makes simulated objects where a simulated device is meant."""

    class _LikeNative(type(native)):  # type: ignore[misc]  # a metaclass known at run time only
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, native) if cls is generic else super().__instancecheck__(instance)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, native) if cls is generic else super().__subclasscheck__(subclass)

    def make(cls: type, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        if cls is not generic:
            return native.__new__(cls, device, *args, **kwargs)
        if _means_simulated(device, kwargs):
            return simulated(device, *args, **kwargs)
        return native(device, *args, **kwargs)

    generic = _LikeNative(native.__name__, (native,), {"__new__": make, "__module__": native.__module__})
    return generic


def _means_simulated(device: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a simulated device is named, or none: then the simulated one, being installed, is meant."""
    if kwargs.get("stream_id") is not None:  # torch itself makes a stream that it knows by its number
        return False
    if device is None or isinstance(device, int):
        return True
    return torch.device(device).type == state.DEVICE_TYPE


class _DeviceIndex(device_module.device):
    """Makes a device the current one within a `with` block; None changes nothing."""

    def __init__(self, device: int | None, /) -> None:
        super().__init__(device)


_ACCELERATOR: dict[str, Callable[..., Any]] = {
    "current_device_index": device_module.current_device,
    "set_device_index": device_module.set_device,
    "current_stream": device_module.current_stream,
    "set_stream": device_module.set_stream,
    "synchronize": device_module.synchronize,
    "device_index": _DeviceIndex,
    "empty_cache": device_module.empty_cache,
    "memory_allocated": device_module.memory_allocated,
    "max_memory_allocated": device_module.max_memory_allocated,
    "memory_reserved": device_module.memory_reserved,
    "max_memory_reserved": device_module.max_memory_reserved,
    "reset_peak_memory_stats": device_module.reset_peak_memory_stats,
    "get_memory_info": device_module.mem_get_info,
}
