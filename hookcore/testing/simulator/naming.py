"""Names for what lies in memory: the FQNs of models that the simulator was told of."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from hookcore.target import has_memory
from hookcore.testing.simulator import state
from hookcore.testing.simulator.tensors import extent

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from hookcore.testing.simulator.memory import Block

_models: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def name_tensors(model: nn.Module, name: str = "") -> None:
    """Name a model's parameters and buffers in errors and snapshots.

    A copy of a tensor that lies on the host has the tensor's name too.

    Args:
        model: Whose tensors. It is not kept alive.
        name: What to put before their FQNs, such as "transformer".
    """
    _models[model] = f"{name}." if name else ""


def names_in(block: Block, start: int, stop: int) -> tuple[str, ...]:
    """The names of the tensors in a range of bytes of a block."""
    sources = [
        (address, address + high - low)
        for (low, high), address in block.sources.items()
        if low < stop and start < high
    ]
    found = []
    for name, tensor in _named():
        if _lies_in(tensor, block, start, stop) or (
            tensor.device.type == "cpu"
            and has_memory(tensor)
            and any(low <= tensor.data_ptr() < high for low, high in sources)
        ):
            found.append(name)
    return tuple(dict.fromkeys(found))


def _lies_in(tensor: torch.Tensor, block: Block, start: int, stop: int) -> bool:
    if tensor.device.type not in ("cpu", state.DEVICE_TYPE) or not has_memory(tensor):
        return False
    offset = tensor.untyped_storage().data_ptr() - block.address
    low, high = extent(tensor)
    return low + offset < stop and start < high + offset


def _named() -> Iterator[tuple[str, torch.Tensor]]:
    for model, prefix in list(_models.items()):
        for fqn, module in model.named_modules(remove_duplicate=False):
            path = f"{prefix}{fqn}." if fqn else prefix
            for kind in (module._parameters, module._buffers):
                # Through dict: an offloading technique may watch what is read.
                for name, tensor in dict.items(kind):
                    if tensor is not None:
                        yield path + name, tensor
