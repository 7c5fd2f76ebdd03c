"""Tells torch of the device: the one place that registers kernels and replaces functions of torch.

torch has one slot for a device that it doesn't know, "PrivateUse1", and what is put there stays for as long
as the process runs.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from hookcore.testing.simulator import copies, device_module, state
from hookcore.testing.simulator.attention import attention
from hookcore.testing.simulator.generic import install_generic_names
from hookcore.testing.simulator.kernels import run_operator
from hookcore.testing.simulator.loading import install_safetensors
from hookcore.testing.simulator.replacements import replace_functions
from hookcore.testing.simulator.tensors import (
    CPU_KEYS,
    block_of,
    new_on_device,
    on_cpu,
    rebind,
    strided,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch._ops import OpOverload

_aten = torch.ops.aten
_KEY = "PrivateUse1"
_libraries: list[Any] = []  # registrations end when these are collected
_public_module = types.ModuleType("torch.sim", device_module.__doc__)


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks a device about."""

    def is_available(self) -> bool:
        return True

    def has_primary_context(self, device: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def register() -> None:
    """Register the device, its kernels and its names. To be called once."""
    module = _public_module
    module.__dict__["_is_in_bad_fork"] = device_module._is_in_bad_fork
    _setup_privateuseone_for_python_backend(state.DEVICE_TYPE, module, _Hooks())
    sys.modules["torch.sim"] = module
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        warnings.filterwarnings("ignore", "Overriding a previously registered kernel")
        _register_kernels()
    install_generic_names()
    install_safetensors()
    replace_functions()


def offer_names(lacks: frozenset[str]) -> None:
    """Give the device module all names but some.

    Args:
        lacks: Those that it doesn't have.
    """
    for name in device_module.__all__:
        if name not in lacks:
            setattr(_public_module, name, getattr(device_module, name))
        elif hasattr(_public_module, name):
            delattr(_public_module, name)


def _register_kernels() -> None:
    make_library: Any = torch.library.Library
    fallback = make_library("_", "IMPL")
    fallback.fallback(run_operator, _KEY)
    library = make_library("aten", "IMPL")
    for name, kernel in _SPECIAL.items():
        library.impl(name, kernel, _KEY)
    for name in _METADATA_ONLY:
        library.impl(name, functools.partial(_on_metadata, _operator(name)), _KEY)
    for name in _operators_to_claim():
        library.impl(name, functools.partial(run_operator, _operator(name)), _KEY)
    # Also above autograd, or torch would choose for a device that it doesn't know.
    library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    library.impl("is_pinned", copies.is_pinned, "CPU")
    library.impl("_pin_memory", copies.pin_memory, "CPU")
    _libraries.extend((fallback, library))


def _operator(name: str) -> OpOverload:
    packet, _, overload = name.partition(".")
    found: OpOverload = getattr(getattr(_aten, packet), overload or "default")
    return found


def _operators_to_claim() -> Iterator[str]:
    """Operators that torch would put together from others, where the CPU has a kernel for the whole.

    Put together they would give other bits, and cost other times. The fallback serves those that torch
    cannot put together.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = (
        "CompositeImplicitAutograd",
        "CompositeExplicitAutograd",
        "CompositeExplicitAutogradNonFunctional",
    )
    yield from ("convolution", "convolution_backward", "embedding", "clone")
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        if namespace != "aten" or not has_kernel(qualified, "CPU"):
            continue
        if name in _SPECIAL or name in _METADATA_ONLY or name in _LEFT_TO_TORCH:
            continue
        if any(has_kernel(qualified, key) for key in composite):
            yield name


# Views whose kernel computes sizes and strides only, and so works on any memory.
_METADATA_ONLY = ("as_strided", "view", "view.dtype", "_reshape_alias", "unfold")
_LEFT_TO_TORCH = ("is_pinned", "_pin_memory", "pin_memory", "copy_", "scaled_dot_product_attention")


def _on_metadata(operator: OpOverload, *args: Any) -> Any:
    return operator.redispatch(CPU_KEYS, *args)


def _set_storage_part(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    _aten.set_.source_Storage_storage_offset.redispatch(CPU_KEYS, tensor, *args)
    return tensor


def _set_storage(tensor: torch.Tensor, source: torch.UntypedStorage) -> torch.Tensor:
    return _set_storage_part(tensor, source, 0, [source.nbytes() // tensor.itemsize], [1])


def _set_tensor(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    rebind(tensor, source)
    return tensor


def _resize(
    tensor: torch.Tensor, size: list[int], *, memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    like = torch.empty(size, dtype=tensor.dtype, memory_format=memory_format or torch.contiguous_format)
    block = block_of(tensor)
    start = tensor.storage_offset() * tensor.itemsize
    if block is not None and start + like.nbytes <= block.nbytes:
        rebind(tensor, strided(tensor, like.size(), like.stride(), tensor.storage_offset()))
        return tensor
    kept = min(tensor.numel(), like.numel())
    if kept:
        like.view(-1)[:kept].copy_(on_cpu(tensor, block).reshape(-1)[:kept])
    rebind(tensor, new_on_device(like, tensor.device.index, "aten::resize_"))
    return tensor


_SPECIAL: dict[str, Callable[..., Any]] = {
    "_copy_from": copies.copy_from,
    "_to_copy": copies.to_copy,
    "record_stream": copies.record_stream,
    "resize_": _resize,
    "set_.source_Storage": _set_storage,
    "set_.source_Storage_storage_offset": _set_storage_part,
    "set_.source_Tensor": _set_tensor,
    "scaled_dot_product_attention": attention,
    # `parameter.data = other` is allowed across devices, as between the CPU and CUDA.
    "_has_compatible_shallow_copy_type": lambda _tensor, _other: True,
}
