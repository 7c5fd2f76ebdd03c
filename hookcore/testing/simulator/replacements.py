"""Functions of torch that no kernel serves, replaced: those that make storages, or pinned memory.

They stay replaced for as long as the process runs, and do as before where no simulated device is meant.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from hookcore.testing.simulator import state
from hookcore.testing.simulator.tensors import new_on_device, new_pinned

_CAN_PIN = (
    "arange",
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "tensor",
    "zeros",
    "zeros_like",
)


def replace_functions() -> None:
    """Replace the functions of torch that make storages or pinned memory without a dispatcher."""
    from torch.utils._device import _device_constructors

    _device_constructors()  # it remembers the originals, by which `with torch.device(...)` knows them
    _replace_storage_constructor()
    for name in _CAN_PIN:
        _let_pin(name)
    _run_backward_on_this_thread()


def _replace_storage_constructor() -> None:
    make = torch.UntypedStorage.__new__
    native: Any = torch.UntypedStorage

    def make_storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != state.DEVICE_TYPE:
            return make(cls, *args, **(kwargs if device is None else kwargs | {"device": device}))
        host = torch.empty(0, dtype=torch.uint8).set_(native(*args, **kwargs))
        return new_on_device(host, state.device_index(device), "UntypedStorage").untyped_storage()

    torch.UntypedStorage.__new__ = staticmethod(make_storage)  # type: ignore[method-assign]


def _let_pin(name: str) -> None:
    """Give a constructor its `pin_memory=True`, which torch asks a C++ allocator for."""
    make = getattr(torch, name)

    @functools.wraps(make)
    def constructor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = make(*args, **kwargs)
        if not pin_memory:
            return made
        if made.device.type != "cpu":
            raise RuntimeError(f"Only dense CPU tensors can be pinned, not one on {made.device}")
        with torch.no_grad():
            pinned = new_pinned(made)
            if not name.startswith("empty"):
                pinned.copy_(made)
        return pinned.requires_grad_(made.requires_grad)

    setattr(torch, name, constructor)
    if name != "tensor":  # which is no operator
        from torch.jit import _builtins

        _builtins._register_builtin(constructor, f"aten::{name}")


def _run_backward_on_this_thread() -> None:
    """Run backward on the calling thread.

    Otherwise torch hands it to a thread of the device. It makes these at the process' first backward, which
    may be before the devices are added, and makes none for a Python device but the first.
    """
    run_backward = torch.autograd.graph._engine_run_backward

    @functools.wraps(run_backward)
    def on_this_thread(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return run_backward(*args, **kwargs)

    for module in (torch.autograd, torch.autograd.graph):
        setattr(module, "_engine_run_backward", on_this_thread)  # noqa: B010 -- not in what the module exports
