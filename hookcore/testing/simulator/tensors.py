"""Tensors of the simulated device: torch's own, over host memory, relabelled on their way through DLPack.

A tensor exported by DLPack says on which device it lies. Saying "extension device" there and importing it
again gives a plain `torch.Tensor` on torch's PrivateUse1 device, with a storage of its own. What is exported
is a one-byte tensor over a Python object, so that this object dies exactly when the storage does; the
address, size and type are then written into the exported description.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, cast

import torch

from hookcore.testing.simulator.allocation import allocate, make_room, pin
from hookcore.testing.simulator.memory import Block
from hookcore.testing.simulator.state import current_stream_state, get_machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookcore.testing.simulator.machine import Machine

_empty = torch.empty  # the original, before `install` gives it a Python wrapper
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_DLPACK_CPU, _DLPACK_EXTENSION = 1, 12

# CPU kernels that only compute sizes and strides, so that they work on memory of any device.
_as_strided = torch.ops.aten.as_strided.default._handle.redispatch_boxed
_view_dtype = torch.ops.aten.view.dtype._handle.redispatch_boxed
_set_storage = torch.ops.aten.set_.source_Storage_storage_offset._handle.redispatch_boxed


class _DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    """The beginning of what a DLPack capsule points to (dlpack.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


class _Owner(ctypes.c_ubyte * 1):  # type: ignore[misc]  # ctypes makes the class at run time
    """What a storage keeps alive: its end is the end of the block."""

    machine: Machine
    block: Block

    def __del__(self) -> None:
        self.machine.drop(self.block)


@functools.cache
def _dlpack_code(dtype: torch.dtype) -> int | None:
    """DLPack's code for a type; None if it has none."""
    try:
        capsule = torch._C._to_dlpack(torch.empty(1, dtype=dtype))
    except (BufferError, RuntimeError):
        return None
    code: int = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor")).dtype.code
    return code


def _flat(machine: Machine, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor over all of a block, which lives until the tensor's storage dies."""
    owner = _Owner()
    owner.machine, owner.block = machine, block
    capsule = torch._C._to_dlpack(torch.frombuffer(owner, dtype=torch.uint8))
    described = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    code, itemsize = _dlpack_code(dtype), dtype.itemsize
    plain = code is None or block.nbytes % itemsize != 0
    if not plain:
        described.dtype.code = code
        described.dtype.bits = 8 * itemsize
    count = ctypes.c_int64(block.nbytes if plain else block.nbytes // itemsize)
    described.shape = ctypes.pointer(count)  # read before this function ends
    described.data = block.address
    if block.device is None:
        described.device.type = _DLPACK_CPU
    else:
        described.device.type = _DLPACK_EXTENSION
        described.device.index = block.device
    tensor: torch.Tensor = torch._C._from_dlpack(capsule)
    if not plain or dtype is torch.uint8:
        return tensor
    return _retyped(tensor, dtype)


def _retyped(flat_bytes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A view as another type of as many of the bytes as it can hold."""
    count = flat_bytes.shape[0] // dtype.itemsize * dtype.itemsize
    whole = cast("torch.Tensor", _as_strided(CPU_KEYS, flat_bytes, (count,), (1,), 0))
    return cast("torch.Tensor", _view_dtype(CPU_KEYS, whole, dtype))


def strided(
    tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int | torch.SymInt
) -> torch.Tensor:
    """A view of a tensor's storage, on any device; the layer above makes it one of autograd's."""
    return cast("torch.Tensor", _as_strided(CPU_KEYS, tensor, size, stride, offset))


def new_on_device(host: torch.Tensor, device: int, made_by: str) -> torch.Tensor:
    """Make host memory the memory of a simulated device.

    Args:
        host: A CPU tensor that nobody will use any more but through the result.
        device: Index of the device.
        made_by: The operation that needs it.

    Returns:
        A tensor of the same size, stride and values on the device.

    Raises:
        torch.OutOfMemoryError: The device has no room for it.
    """
    machine = get_machine()
    storage = host.untyped_storage()
    with machine.lock:
        make_room(machine, current_stream_state(device), storage.nbytes())
        return _adopt(machine, host, storage, device, made_by)


def _adopt(
    machine: Machine, host: torch.Tensor, storage: torch.UntypedStorage, device: int, made_by: str
) -> torch.Tensor:
    address, nbytes = storage.data_ptr(), storage.nbytes()
    if not address:  # nothing in it: there is no block to know of
        storage = torch.UntypedStorage(1)  # type: ignore[no-untyped-call]
        address = storage.data_ptr()
    stream = current_stream_state(device)
    block = Block(device, nbytes, address, storage, stream.key, made_by)
    allocate(machine, stream, block)
    return strided(_flat(machine, block, host.dtype), host.size(), host.stride(), host.storage_offset())


def new_pinned(like: torch.Tensor) -> torch.Tensor:
    """Make page-locked host memory for a tensor of this size, stride and type; its values are arbitrary.

    Where the device's profile has none, it is ordinary memory.
    """
    host = torch.empty_like(like, device="cpu", requires_grad=False)
    machine = get_machine()
    storage = host.untyped_storage()
    if not storage.nbytes() or not machine.devices[0].profile.pins:
        return host
    with machine.lock, torch._C._AutoDispatchBelowAutograd():
        block = pin(machine, storage.nbytes(), storage.data_ptr(), storage)
        return strided(_flat(machine, block, host.dtype), host.size(), host.stride(), host.storage_offset())


def block_of(tensor: torch.Tensor) -> Block | None:
    """The block of a device that a tensor lies in; None if it has no bytes."""
    return get_machine().blocks.get(tensor.untyped_storage().data_ptr())


def locked_span(tensor: torch.Tensor) -> tuple[Block, tuple[int, int]] | None:
    """The page-locked memory that a CPU tensor lies in, and which bytes of it; None if it doesn't.

    Raises:
        torch.AcceleratorError: A part of the tensor lies in such memory.
    """
    host_memory = get_machine().host_memory
    base = tensor.untyped_storage().data_ptr()
    block = host_memory.allocated.get(base)
    if block is not None:
        return block, extent(tensor)
    if not host_memory.registered:
        return None
    start, stop = extent(tensor)
    block = host_memory.registered_at(base + start, base + stop) if stop else None
    if block is None:
        return None
    offset = base - block.address
    return block, (start + offset, stop + offset)


def on_cpu(tensor: torch.Tensor, block: Block | None, *, may_resize: bool = True) -> torch.Tensor:
    """A CPU tensor over the same memory as a simulated one.

    Args:
        tensor: The simulated one.
        block: Where it lies; None if it has no bytes.
        may_resize: False where a kernel could resize the memory, which would move it. It then raises.
    """
    if block is None:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    if not may_resize:
        memory = (ctypes.c_ubyte * block.nbytes).from_address(block.host_address)
        flat = _retyped(torch.frombuffer(memory, dtype=torch.uint8), tensor.dtype)
        return strided(flat, tensor.size(), tensor.stride(), tensor.storage_offset())
    alias = _empty(0, dtype=tensor.dtype)
    return alias.set_(block.keeper, tensor.storage_offset(), tensor.size(), tensor.stride())


def rebind(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Give a simulated tensor the storage, size and stride of another one."""
    _set_storage(
        CPU_KEYS, tensor, other.untyped_storage(), other.storage_offset(), other.size(), other.stride()
    )


def view_like(tensor: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """A view of a simulated tensor's storage that lies in it as a CPU tensor lies in the same memory."""
    if tensor.dtype != host.dtype:
        nbytes = tensor.untyped_storage().nbytes()
        flat = strided(tensor, (nbytes // tensor.itemsize,), (1,), 0)
        as_bytes = cast("torch.Tensor", _view_dtype(CPU_KEYS, flat, torch.uint8))
        tensor = _retyped(as_bytes, host.dtype)
    return strided(tensor, host.size(), host.stride(), host.storage_offset())


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The range of bytes of its storage that a tensor spans; a gap in it counts as part of it."""
    count = tensor.numel()
    if not count:
        return 0, 0
    itemsize = tensor.itemsize
    start = int(tensor.storage_offset())
    if not tensor.is_contiguous():
        sizes = zip(tensor.size(), tensor.stride(), strict=True)
        count = 1 + sum([(size - 1) * stride for size, stride in sizes])
    return start * itemsize, (start + count) * itemsize


def poison(host: torch.Tensor) -> None:
    """Fill CPU memory with what no program should see: NaN, -1, or True."""
    if host.is_contiguous():
        ctypes.memset(host.data_ptr(), 0xFF if host.dtype is not torch.bool else 1, host.nbytes)
    elif host.dtype.is_floating_point or host.dtype.is_complex:
        host.fill_(float("nan"))


def over(address: int, nbytes: int, like: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over bytes at an address, which the caller keeps there.

    Args:
        address: Of its first element.
        nbytes: From its first element to its last.
        like: A tensor of its size, stride and type.
    """
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    flat = _retyped(torch.frombuffer(memory, dtype=torch.uint8), like.dtype)
    return strided(flat, like.size(), like.stride(), 0)
