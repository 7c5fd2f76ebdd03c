"""What "as it was before" means for a model, as code.

A model is pristine when every module in it has the same class and the same attributes, in the same order,
holding the same objects, torch's own dictionaries included; and when every tensor is the same object with
the same type, place, layout, neighbours in memory and bits.

Forwards may change a model too (a BatchNorm counts its batches). Give the snapshot a twin, a model that is
equal and never hooked, and make the same calls of both: what the calls do to the twin they may do to the
model, and in the end the two must agree in every bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from collections.abc import Iterator


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors agree in dtype, shape and every bit, on whatever devices they are.

    Unlike `torch.equal`, a NaN equals itself, and -0.0 and 0.0 are two values.
    """
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(_bits(first), _bits(second))
    )


@frozen(eq=False)
class ModelSnapshot:
    """Everything that has to be as before once a model is restored.

    Holds the model's objects and a copy of all tensors' bytes on the CPU. Storages are only referred to
    weakly, so a test may watch them being freed.

    Attributes:
        model: The model that it was taken of.
        modules: FQN to the record of each module; a module that stands at several places is there once.
        tensors: FQN to the record of each parameter, buffer and tensor in a plain attribute.
        twin: The snapshot of the model that is never hooked, if there is one.
    """

    model: nn.Module
    modules: dict[str, _ModuleRecord]
    tensors: dict[str, _TensorRecord]
    twin: ModelSnapshot | None = None

    @classmethod
    def take(cls, model: nn.Module, *, twin: nn.Module | None = None) -> ModelSnapshot:
        """Record a model as it is now.

        Args:
            model: What to record.
            twin: An equal model that is never hooked and gets the same calls, where calls change the model.
        """
        modules = dict(model.named_modules())
        tensors = _tensors(modules)
        neighbours = _neighbours(tensors)
        return cls(
            model=model,
            modules={fqn: _ModuleRecord.take(module) for fqn, module in modules.items()},
            tensors={fqn: _TensorRecord.take(tensor, neighbours[fqn]) for fqn, tensor in tensors.items()},
            twin=None if twin is None else cls.take(twin),
        )

    def differences(self, model: nn.Module, *, same_storage: bool = False) -> list[str]:
        """State how a model differs from what it was; empty when it is restored.

        Args:
            model: The model that the snapshot was taken of.
            same_storage: Also ask that every tensor lies in the very memory it lay in. Without it, weights
                may have moved, as to a device and back; tensors that shared memory must still do so.

        Returns:
            One sentence a difference, each starting with an FQN.
        """
        if model is not self.model:
            return ["(root): is not the model that the snapshot was taken of"]
        found = self._changes(same_storage=same_storage)
        if self.twin is None:
            return found
        # Sentences hold FQNs and no object, so what the calls changed reads the same in the twin.
        by_calls = set(self.twin._changes(same_storage=same_storage))
        return [change for change in found if change not in by_calls] + list(self._unlike(self.twin))

    def assert_restored(self, model: nn.Module, *, same_storage: bool = False) -> None:
        """Raise unless `differences` finds none.

        Raises:
            AssertionError: With all differences.
        """
        found = self.differences(model, same_storage=same_storage)
        if found:
            lines = "\n  ".join(found)
            raise AssertionError(f"the model is not as it was, in {len(found)} things:\n  {lines}")

    def _tensors_now(self) -> dict[str, Tensor]:
        return _tensors({fqn: record.module for fqn, record in self.modules.items()})

    def _changes(self, *, same_storage: bool) -> list[str]:
        found: list[str] = []
        for fqn, module in self.modules.items():
            found += module.changes(fqn or "(root)")
        now = self._tensors_now()
        neighbours = _neighbours(now)
        for fqn, record in self.tensors.items():
            if fqn in now:  # its module reports where it is not
                found += record.changes(fqn, now[fqn], neighbours[fqn], same_storage=same_storage)
        return found

    def _unlike(self, twin: ModelSnapshot) -> Iterator[str]:
        """Yield where values differ between the two models as they are now."""
        twins = twin._tensors_now()
        for fqn, tensor in self._tensors_now().items():
            # Where one of them is missing or cannot be read, that is reported already.
            if fqn in twins and _readable(tensor):
                if not same_bits(tensor, twins[fqn]):
                    yield f"{fqn}: values differ from the twin's"
                if not _same_gradient(tensor.grad, twins[fqn].grad):
                    yield f"{fqn}: gradient differs from the twin's"


@frozen(eq=False)
class _ModuleRecord:
    """One module.

    Attributes:
        module: The module itself.
        kind: Its class.
        attributes: What its `vars` held.
        contents: What each dictionary, list and set among its attributes held: `_parameters`, torch's
            hooks, a technique's own.
    """

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    contents: dict[str, dict[Any, Any]]

    @classmethod
    def take(cls, module: nn.Module) -> _ModuleRecord:
        attributes = dict(vars(module))
        contents = {name: _contents(value) for name, value in attributes.items()}
        return cls(module, type(module), attributes, contents)

    def changes(self, fqn: str) -> Iterator[str]:
        if type(self.module) is not self.kind:
            yield f"{fqn}: class is {type(self.module).__name__}, was {self.kind.__name__}"
        now = vars(self.module)
        yield from _mapping_changes(fqn, self.attributes, now)
        for name, contents in self.contents.items():
            if name in now:
                yield from _mapping_changes(f"{fqn}.{name}", contents, _contents(now[name]))


@frozen(eq=False)
class _TensorRecord:
    """One tensor at one place.

    Attributes:
        tensor: The tensor itself; holding it does not hold its storage, since `.data =` replaces that.
        facts: What describes it, by name.
        attributes: What its `vars` held.
        gradient: Its `grad`.
        neighbour: Whose memory it lay in; see `_neighbours`.
        storage: The memory itself.
        offset: Its first element in that memory.
        bits: A copy of its bytes on the CPU; None on the meta device.
    """

    tensor: Tensor
    facts: dict[str, Any]
    attributes: dict[str, Any]
    gradient: Tensor | None
    neighbour: tuple[str, int]
    storage: StorageWeakRef
    offset: int
    bits: Tensor | None

    @classmethod
    def take(cls, tensor: Tensor, neighbour: tuple[str, int]) -> _TensorRecord:
        return cls(
            tensor=tensor,
            facts=_facts(tensor),
            attributes=dict(vars(tensor)),
            gradient=tensor.grad,
            neighbour=neighbour,
            storage=_storage(tensor),
            offset=int(tensor.storage_offset()),
            bits=_bits(tensor) if _readable(tensor) else None,
        )

    def changes(
        self, fqn: str, now: Tensor, neighbour: tuple[str, int], *, same_storage: bool
    ) -> Iterator[str]:
        for name, value in _facts(now).items():
            if value != self.facts[name]:
                yield f"{fqn}: {name} is {value}, was {self.facts[name]}"
        yield from _mapping_changes(f"{fqn} (attributes)", self.attributes, vars(now))
        if now.grad is not self.gradient:
            yield f"{fqn}: grad is another object"
        if neighbour != self.neighbour:
            yield f"{fqn}: lies {_place(neighbour)}, lay {_place(self.neighbour)}"
        storage = _storage(now)
        if same_storage and (storage != self.storage or now.storage_offset() != self.offset):
            yield f"{fqn}: lies in other memory"
        if not _readable(now):
            if self.bits is not None:
                yield f"{fqn}: has no values, its memory was freed"
        elif self.bits is None or not torch.equal(_bits(now), self.bits):
            yield f"{fqn}: values differ"


def _tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """FQN to each tensor that a module holds itself: a parameter, buffer or plain attribute."""
    return {
        f"{fqn}.{name}" if fqn else name: value
        for fqn, module in modules.items()
        for holder in (module._parameters, module._buffers, vars(module))
        for name, value in holder.items()
        if isinstance(value, Tensor)
    }


def _neighbours(tensors: dict[str, Tensor]) -> dict[str, tuple[str, int]]:
    """FQN of each tensor to the first tensor in the same storage and the bytes that it lies after that one.

    A tensor that shares memory with none, or is the first, has itself at 0.
    """
    firsts: dict[StorageWeakRef, tuple[str, int]] = {}
    neighbours = {}
    for fqn, tensor in tensors.items():
        start = int(tensor.storage_offset()) * tensor.element_size()
        first, first_start = firsts.setdefault(_storage(tensor), (fqn, start))
        neighbours[fqn] = (first, start - first_start)
    return neighbours


def _place(neighbour: tuple[str, int]) -> str:
    fqn, offset = neighbour
    return f"{offset} bytes after the start of {fqn}"


def _storage(tensor: Tensor) -> StorageWeakRef:
    """The identity of a tensor's storage, which no later storage gets while the reference lives."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _facts(tensor: Tensor) -> dict[str, Any]:
    return {
        "type": type(tensor).__name__,
        "dtype": tensor.dtype,
        "device": tensor.device,
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
        "requires_grad": tensor.requires_grad,
        "being an inference tensor": tensor.is_inference(),
    }


def _contents(value: object) -> dict[Any, Any]:
    """Return what a container holds, as a dictionary; empty for anything else."""
    match value:
        case dict():
            return dict(value)
        case list():
            return dict(enumerate(value))
        case set():
            return dict.fromkeys(sorted(value, key=repr))  # sorted, since a set has no order to compare
        case _:
            return {}


def _mapping_changes(where: str, before: dict[Any, Any], now: dict[Any, Any]) -> Iterator[str]:
    """Yield how keys, their order and the identity of values differ."""
    for key, value in before.items():
        if key not in now:
            yield f"{where}: {key!r} is gone"
        elif now[key] is not value:
            yield f"{where}: {key!r} is another object"
    for key in now:
        if key not in before:
            yield f"{where}: {key!r} was added"
    if before.keys() == now.keys() and list(before) != list(now):
        yield f"{where}: order is {list(now)}, was {list(before)}"


def _same_gradient(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return same_bits(first, second)


def _readable(tensor: Tensor) -> bool:
    """Return whether a tensor has values; torch itself reads beyond a storage that was freed, and crashes."""
    if tensor.is_meta:
        return False
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _bits(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor's bytes on the CPU, `(bytes,)` uint8, in logical order."""
    return tensor.detach().to("cpu", copy=True).reshape(-1).view(torch.uint8)
