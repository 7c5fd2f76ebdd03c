"""The kernel that runs every operator: the CPU's, on the same memory, with bookkeeping around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hookcore.testing.simulator import state
from hookcore.testing.simulator.errors import UnsupportedOperationError
from hookcore.testing.simulator.operators import OperatorFacts, facts_of
from hookcore.testing.simulator.ordering import Access
from hookcore.testing.simulator.tensors import (
    block_of,
    extent,
    new_on_device,
    on_cpu,
    poison,
    rebind,
    strided,
    view_like,
)

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from hookcore.testing.simulator.devices import StreamState
    from hookcore.testing.simulator.machine import Machine
    from hookcore.testing.simulator.memory import Block
    from hookcore.testing.simulator.ordering import Operation
    from hookcore.testing.simulator.profiles import DeviceProfile

_Tensor = torch.Tensor


def mixed_devices(first: object, second: object) -> RuntimeError:
    """The error that torch raises for tensors on two devices."""
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{first} and {second}!"
    )


class _Call:
    """One call of an operator: its arguments as CPU tensors, and its results as simulated ones.

    No method makes a closure or keeps the call: a reference cycle would delay frees and falsify peaks.
    """

    __slots__ = (
        "_args",
        "_by_address",
        "_facts",
        "_kwargs",
        "created",
        "device",
        "has_number",
        "on_host",
        "uses",
    )

    def __init__(self, facts: OperatorFacts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._facts = facts
        self._args = args
        self._kwargs = kwargs
        self._by_address: dict[int, torch.Tensor] = {}
        self.device: int | None = None  # where it runs
        self.on_host: list[torch.Tensor] = []  # CPU tensors that are used, with what scalars may not be
        self.uses: list[tuple[torch.Tensor, torch.Tensor, bool, Block | None]] = []
        self.created: list[torch.Tensor] = []  # new memory
        self.has_number = False  # for a tensor

    def to_cpu(self, value: Any, written: bool) -> Any:
        """The argument with CPU tensors over the memory of its simulated tensors."""
        if isinstance(value, _Tensor):
            if value.device.type != state.DEVICE_TYPE:
                if value.dim() or written:
                    self.on_host.append(value)
                return value
            index = value.device.index
            if self.device is None:
                self.device = index
            elif self.device != index:
                raise mixed_devices(f"sim:{self.device}", value.device)
            if value.numel():
                block = state.get_machine().blocks[value.untyped_storage().data_ptr()]
                self._by_address[block.host_address] = value
            else:
                block = None
            host = on_cpu(value, block, may_resize=not (written and self._facts.is_out))
            self.uses.append((value, host, written, block))
            return host
        if isinstance(value, (list, tuple)):
            return [self.to_cpu(item, written) for item in value]
        if value is not None:
            self.has_number = True
        return value

    def to_device(self, value: Any, position: int, device: int | None) -> Any:
        """The result with simulated tensors for the CPU's: an argument, a view of one, or a new one."""
        if isinstance(value, _Tensor):
            results = self._facts.results
            returned = results[position] if position < len(results) else None
            if returned is not None:
                index, name = returned
                return self._args[index] if index < len(self._args) else self._kwargs[name]
            if value.layout is not torch.strided or value.is_quantized:
                raise UnsupportedOperationError(
                    f"{self._facts.name} gives a tensor of layout {value.layout} and type {value.dtype}; the "
                    "simulated device has plain, strided tensors only"
                )
            source = self._by_address.get(value.untyped_storage().data_ptr())
            if source is not None:
                return view_like(source, value)
            if device is None:
                return value
            made = new_on_device(value, device, self._facts.name)
            self.created.append(made)
            return made
        if isinstance(value, (list, tuple)):
            return type(value)([self.to_device(item, position, device) for item in value])
        return value

    def bytes_moved(self) -> int:
        """Bytes that the operator reads or writes."""
        return sum([use[1].nbytes for use in self.uses]) + sum([it.nbytes for it in self.created])


def run_operator(operator: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run an operator with at least one simulated tensor, or one that is to be made on the device.

    Raises:
        RuntimeError: Tensors lie on different devices; or what the CPU's kernel raises.
        RaceError: It touches memory that another stream may be using.
        torch.OutOfMemoryError: There is no room for its result.
        UnsupportedOperationError: Its result is no plain tensor.
    """
    facts = facts_of(operator)
    call = _Call(facts, args, kwargs)
    written, tensors = facts.written, facts.tensors
    host_args = [
        call.to_cpu(value, name in written) if name in tensors else value
        for name, value in zip(facts.names, args, strict=False)  # those at the end may be left out
    ]
    host_kwargs = {
        name: call.to_cpu(value, name in written) if name in tensors else value
        for name, value in kwargs.items()
    }
    result_device = _take_device(call, host_kwargs)
    device = call.device
    if device is None:
        raise UnsupportedOperationError(f"{facts.name} was called without a simulated tensor or device")
    if call.on_host and not facts.is_indexing:
        raise mixed_devices(f"sim:{device}", call.on_host[0].device)
    if facts.is_view or facts.is_uninitialised:
        out = operator(*host_args, **host_kwargs)
        if not facts.is_view and out.nbytes:
            poison(out)
        return call.to_device(out, 0, result_device)

    machine = state.get_machine()
    stream = state.current_stream_state(device)
    host_waits = _host_waits(facts, host_args)
    with machine.lock:
        if host_waits:
            machine.captures.host_waits_for(stream)
        operation = _launch(machine, call, stream)
    # torch turned a number into a tensor, and that into a number again, which another overload takes.
    run: Any = operator.overloadpacket if call.has_number and not facts.takes_numbers else operator
    try:
        out = run(*host_args, **host_kwargs)
    except NotImplementedError as error:  # an operator that torch calls on other devices only
        raise UnsupportedOperationError(
            f"the simulated device runs operators by the CPU's kernels, and for {facts.name} there is none"
        ) from error
    results = _results(call, out, result_device)
    if facts.is_out:
        _follow_resizing(call, device)
    with machine.lock:
        _note_creation(machine, call, operation)
        seconds = _duration(machine.devices[device].profile, call, facts, host_args, out)
        machine.finish(operation, stream, "compute", seconds)
        if host_waits:
            machine.host_waits(stream.clock, stream.free_at)
            machine.findings.raise_found()
    return results


def _launch(machine: Machine, call: _Call, stream: StreamState) -> Operation:
    operation = machine.launch(stream, call._facts.name)
    for _, host, is_written, block in call.uses:
        if block is not None:
            machine.touch(operation, stream, block, extent(host), writes=is_written)
    return operation


def _results(call: _Call, out: Any, device: int | None) -> Any:
    if type(out) is tuple:
        return tuple([call.to_device(it, i, device) for i, it in enumerate(out)])
    return call.to_device(out, 0, device)


def _take_device(call: _Call, host_kwargs: dict[str, Any]) -> int | None:
    """Put the CPU in the place of a simulated device that is asked for; say where results belong."""
    wanted = host_kwargs.get("device")
    if wanted is None:
        return call.device
    host_kwargs["device"] = torch.device("cpu")
    host_kwargs.pop("pin_memory", None)
    if wanted.type != state.DEVICE_TYPE:
        return None
    index = state.device_index(wanted)
    if call.device is None:
        call.device = index
    return index


def _follow_resizing(call: _Call, device: int) -> None:
    """Give an `out=` tensor the size that the CPU's kernel gave its stand-in."""
    for i, (tensor, host, is_written, block) in enumerate(call.uses):
        if is_written and (host.shape != tensor.shape or host.stride() != tensor.stride()):
            if block is None:
                rebind(tensor, new_on_device(host, device, call._facts.name))
                call.uses[i] = (tensor, host, False, None)
                call.created.append(tensor)
            else:
                rebind(tensor, strided(tensor, host.size(), host.stride(), host.storage_offset()))


def _note_creation(machine: Machine, call: _Call, operation: Operation) -> None:
    for made in call.created:
        block = block_of(made)
        if block is not None:
            access = Access(0, block.nbytes, True, operation)  # it is new: there is nobody to race with
            block.history.record(access, machine.host_clock)


def _duration(
    profile: DeviceProfile, call: _Call, facts: OperatorFacts, host_args: list[Any], out: Any
) -> float:
    """Seconds that a kernel takes: as long as its memory traffic or its arithmetic, whichever is more."""
    seconds = call.bytes_moved() / profile.memory_bandwidth
    if facts.flops is not None:
        first = out[0] if type(out) is tuple else out
        rate = profile.flops_16 if first.dtype.itemsize <= 2 else profile.flops_32
        seconds = max(seconds, facts.flops(host_args, first) / rate)
    return profile.kernel_latency + seconds


def _host_waits(facts: OperatorFacts, host_args: list[Any]) -> bool:
    """Whether the host waits for values; also for those of an index that is a mask, to count its results."""
    if not facts.is_indexing:
        return facts.has_result_on_host
    indices = host_args[1] if len(host_args) > 1 else ()
    return isinstance(indices, (list, tuple)) and any(
        isinstance(it, _Tensor) and it.dtype in (torch.bool, torch.uint8) for it in indices
    )
