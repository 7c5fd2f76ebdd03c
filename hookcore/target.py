"""What techniques are put on: named components, their module trees, tensors and ties. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from torch import nn

from hookcore.errors import PlanError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hookcore.hookspecs import ModelConventions


@frozen(eq=False)
class TensorSlot:
    """Parameters and buffers that share memory, or one that shares with none: the unit that moves.

    Attributes:
        fqns: Every FQN it has in the component, in order of registration; the first one is its name.
        tensors: The distinct tensor objects behind these names.
        owners: The modules that hold it, each with the attribute's name, one for each place it is
            registered. A module that stands at several FQNs appears once.
        is_buffer: Whether all of its names are buffers.
    """

    fqns: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    is_buffer: bool

    @property
    def name(self) -> str:
        """The first FQN."""
        return self.fqns[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory behind it, counted once."""
        spans = [byte_span(tensor) for tensor in self.tensors]
        return max(stop for _, stop in spans) - min(start for start, _ in spans)


@frozen(eq=False)
class Target:
    """What the components have in common that were opened together, and those taken afresh from them.

    Attributes:
        names: The components' names.
        shared: Where a technique keeps what its bindings to several components share, such as who of them
            is in memory; under a key of its own, best the technique itself.
    """

    names: tuple[str, ...] = ()
    shared: dict[Any, Any] = field(factory=dict, repr=False)


@frozen(eq=False)
class Component:
    """One named module that techniques are bound to, with what there is to know about it.

    The view is taken once, when it is first asked for; a model that changes gets a new Component.

    Attributes:
        name: Its name in the target (`"transformer"`), or `""` for a target that is a module itself.
        module: The module.
        target: What it was opened from.
    """

    name: str
    module: nn.Module
    _describe: Callable[[nn.Module], ModelConventions] = field(repr=False)
    target: Target = field(factory=Target, repr=False)

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """FQN to module, each module once, parents before children; `""` is the component itself."""
        return dict(self.module.named_modules())

    @cached_property
    def fqns(self) -> Mapping[nn.Module, tuple[str, ...]]:
        """Module to all of its FQNs (a shared module has several), in the order of `modules`."""
        found: dict[nn.Module, list[str]] = {}
        for fqn, module in self.module.named_modules(remove_duplicate=False):
            found.setdefault(module, []).append(fqn)
        return {module: tuple(fqns) for module, fqns in found.items()}

    @cached_property
    def slots(self) -> tuple[TensorSlot, ...]:
        """Every parameter and buffer, ties merged, in order of registration."""
        return tuple(_slots(self.module))

    @cached_property
    def slot_of(self) -> Mapping[str, TensorSlot]:
        """FQN of a parameter or buffer to its slot."""
        return {fqn: slot for slot in self.slots for fqn in slot.fqns}

    @cached_property
    def identities(self) -> frozenset[int]:
        """Identities of all modules and tensors, to see what components have in common."""
        tensors = (id(tensor) for slot in self.slots for tensor in slot.tensors)
        return frozenset(map(id, self.modules.values())).union(tensors)

    def afresh(self) -> Component:
        """The same component, to be looked at again."""
        return Component(self.name, self.module, self._describe, self.target)

    @cached_property
    def conventions(self) -> ModelConventions:
        """What the model's library says about it: entries, blocks, modules not to be split or cast."""
        return self._describe(self.module)

    def label(self, fqn: str) -> str:
        """An FQN with the component's name before it, for messages."""
        return ".".join(part for part in (self.name, fqn) if part) or type(self.module).__name__


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """The tensors registered on the module itself: name, tensor, whether it is a buffer."""
    for registered, is_buffer in ((module._parameters, False), (module._buffers, True)):
        for name, tensor in registered.items():
            if tensor is not None:
                yield name, tensor, is_buffer


def byte_span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and byte after the last that a strided tensor uses of its storage, as addresses.

    Tensors without an address (on the meta device, or subclasses that wrap others) count from 0.
    """
    start = tensor.data_ptr() if has_memory(tensor) else 0
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor is plain and strided and has memory of its own that can be pointed at."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
    )


def _slots(root: nn.Module) -> Iterator[TensorSlot]:
    """Groups all tensors below a module by the memory they use.

    Two tensors are tied when they are one object, or when their spans of bytes overlap, whatever storages
    these belong to. Sharing a storage alone is no tie: loaders cut many weights out of one file's storage.
    """
    fqns: dict[torch.Tensor, list[str]] = {}
    owners: dict[torch.Tensor, list[tuple[nn.Module, str]]] = {}
    parameters: set[torch.Tensor] = set()
    seen: set[nn.Module] = set()
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, tensor, is_buffer in own_tensors(module):
            fqns.setdefault(tensor, []).append(f"{prefix}.{name}" if prefix else name)
            if module not in seen:
                owners.setdefault(tensor, []).append((module, name))
            if not is_buffer:
                parameters.add(tensor)
        seen.add(module)
    for tied in _tied(list(fqns)):
        yield TensorSlot(
            fqns=tuple(fqn for tensor in tied for fqn in fqns[tensor]),
            tensors=tuple(tied),
            owners=tuple(owner for tensor in tied for owner in owners[tensor]),
            is_buffer=not any(tensor in parameters for tensor in tied),
        )


def _tied(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Splits distinct tensors into groups that overlap in memory, in order of first appearance."""
    order = {tensor: index for index, tensor in enumerate(tensors)}
    by_device: dict[object, list[torch.Tensor]] = {}
    for tensor in tensors:
        shares = has_memory(tensor) and tensor.numel() > 0
        by_device.setdefault(tensor.device if shares else order[tensor], []).append(tensor)
    groups: list[list[torch.Tensor]] = []
    for near in by_device.values():
        reached = -1
        for tensor in sorted(near, key=byte_span):
            start, stop = byte_span(tensor)
            if start < reached:
                groups[-1].append(tensor)
            else:
                groups.append([tensor])
            reached = max(reached, stop)
    for group in groups:
        group.sort(key=order.__getitem__)
    return sorted(groups, key=lambda group: order[group[0]])


def open_components(
    target: object,
    names: Iterable[str] | None,
    *,
    open_target: Callable[[Any], Mapping[str, nn.Module] | None],
    describe: Callable[[nn.Module], ModelConventions],
) -> dict[str, Component]:
    """Turns a target into its named components.

    Args:
        target: A module, a mapping of named modules, or an object that a plugin can open.
        names: Take only these components; None takes all.
        open_target: Asks the plugins; returns None where none can open it.
        describe: Asks the plugins for a model's conventions.

    Raises:
        UnsupportedModelError: The target is none of these, or holds something that is no module.
        PlanError: `names` has one that the target lacks, or the target has no component.
    """
    modules: Mapping[str, Any] | None
    if isinstance(target, nn.Module):
        modules = {"": target}
    elif isinstance(target, Mapping):
        modules = target
    else:
        modules = open_target(target)
    if modules is None:
        raise UnsupportedModelError(
            f"cannot put techniques on a {type(target).__qualname__}: expected a torch.nn.Module, a mapping "
            "of named modules, or an object that a plugin opens (`hookcore plugins` lists the plugins)"
        )
    for name, module in modules.items():
        if not isinstance(name, str) or not isinstance(module, nn.Module):
            raise UnsupportedModelError(
                f"component {name!r} is a {type(module).__qualname__}, expected a torch.nn.Module; "
                "leave it out of the mapping"
            )
    chosen = list(modules) if names is None else list(names)
    if unknown := [name for name in chosen if name not in modules]:
        there = "is one module" if list(modules) == [""] else f"has {', '.join(map(repr, modules)) or 'none'}"
        raise PlanError(f"no component named {', '.join(map(repr, unknown))}; this target {there}")
    if not chosen:
        raise PlanError("there is no component to put techniques on")
    together = Target(tuple(chosen))
    return {name: Component(name, modules[name], describe, together) for name in chosen}
