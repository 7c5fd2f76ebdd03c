"""The host's own reading and writing of pinned memory, while copies from and to it run.

CPU operators don't come by the simulator. Within a `HostWatch` torch shows it each of them on this thread;
what numpy or other threads do is not seen, and only found later by what it has done to the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hookcore.testing.simulator import state
from hookcore.testing.simulator.operators import facts_of
from hookcore.testing.simulator.tensors import locked_span

if TYPE_CHECKING:
    from torch._ops import OpOverload

_LOOKS_AT_NO_VALUES = {"aten::is_pinned", "aten::record_stream", "aten::set_", "aten::resize_"}


class HostWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises when the host reads what a copy has not brought yet, or writes what a copy still reads."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Check an operator's CPU tensors before it runs."""
        kwargs = kwargs or {}
        if state.get_machine().in_flight:
            _check(func, args, kwargs)
        return func(*args, **kwargs)


def _check(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    facts = facts_of(func)
    if facts.is_view or func._schema.name in _LOOKS_AT_NO_VALUES:
        return
    named = [*zip(facts.names, args, strict=False), *kwargs.items()]
    tensors = [(name, it) for name, value in named for it in _tensors(value)]
    device = kwargs.get("device")
    if any(it.device.type == state.DEVICE_TYPE for _, it in tensors) or (
        device is not None and torch.device(device).type == state.DEVICE_TYPE
    ):
        return  # a copy, which is checked as such
    machine = state.get_machine()
    for name, tensor in tensors:
        if tensor.device.type == "cpu" and (found := locked_span(tensor)) is not None:
            block, span = found
            with machine.lock:
                machine.host_touches(block, *span, name in facts.written, facts.name)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [it for it in value if isinstance(it, torch.Tensor)]
    return []
