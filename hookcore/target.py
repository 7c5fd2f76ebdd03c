"""What techniques are put on: named components, their module trees, tensors and ties. Changes nothing."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from torch import nn

from hookcore.errors import PlanError, UnsupportedModelError
from hookcore.replaced import Names
from hookcore.run_end import call_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hookcore.conventions import ModelConventions, OpenedTarget


@frozen(eq=False, slots=False)  # with a dict, making thousands of them takes half the time
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
        if len(self.tensors) == 1:  # nearly all are, and its address need not be asked for
            return _extent(self.tensors[0])
        spans = [byte_span(tensor) for tensor in self.tensors]
        return max(stop for _, stop in spans) - min(start for start, _ in spans)


@frozen(eq=False)
class Target:
    """What the components have in common that were opened together, and those taken afresh from them.

    Attributes:
        names: The components' names.
        sequence: Those of them that a run calls in a known order, in this order; empty if unknown.
        denoisers: Names of the components that a run calls once for each step, also of those that were not
            taken; empty if unknown.
        absent: What a user may take for a component, by name, and why it is none.
        at_run_end: Has a function be called at the end of each run, until the function that it returns is
            called. None if the target does not tell when a run ends.
        attributes: What the components were when they were opened, if they are attributes of an object.
    """

    names: tuple[str, ...] = ()
    sequence: tuple[str, ...] = field(default=(), kw_only=True)
    denoisers: tuple[str, ...] = field(default=(), kw_only=True)
    absent: Mapping[str, str] = field(factory=dict, kw_only=True, repr=False)
    at_run_end: Callable[[Callable[[], object]], Callable[[], object]] | None = field(
        default=None, kw_only=True, repr=False
    )
    attributes: Names | None = field(default=None, kw_only=True, repr=False)


@frozen(eq=False)
class Component:
    """One named module that techniques are bound to, with what there is to know about it.

    The view is taken once, when it is first asked for; a model that changes gets a new Component.

    Attributes:
        name: Its name in the target (`"transformer"`), or `""` for a target that is a module itself.
        module: The module.
        target: What it was opened from.
        wholes: FQNs of modules whose calls run what is below as one with them (compiled blocks), so that
            weights there are best brought together.
    """

    name: str
    module: nn.Module
    _describe: Callable[[Component], ModelConventions] = field(repr=False)
    target: Target = field(factory=Target, repr=False)
    wholes: frozenset[str] = frozenset()

    @cached_property
    def places(self) -> tuple[tuple[str, nn.Module], ...]:
        """FQN and module of every place in the tree, parents before children; a shared module has several."""
        return tuple(walk(self.module))

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """FQN to module, each module once, parents before children; `""` is the component itself."""
        first: dict[nn.Module, str] = {}
        for fqn, module in self.places:
            first.setdefault(module, fqn)
        return {fqn: module for module, fqn in first.items()}

    @cached_property
    def fqns(self) -> Mapping[nn.Module, tuple[str, ...]]:
        """Module to all of its FQNs (a shared module has several), in the order of `modules`."""
        found: dict[nn.Module, tuple[str, ...]] = {}
        for fqn, module in self.places:
            found[module] = (*found.get(module, ()), fqn)
        return found

    @cached_property
    def slots(self) -> tuple[TensorSlot, ...]:
        """Every parameter and buffer, ties merged, in order of registration."""
        return tuple(tensor_slots(self.places))

    @cached_property
    def slot_of(self) -> Mapping[str, TensorSlot]:
        """FQN of a parameter or buffer to its slot."""
        return {fqn: slot for slot in self.slots for fqn in slot.fqns}

    @cached_property
    def identities(self) -> frozenset[int]:
        """Identities of all modules and tensors, to see what components have in common."""
        tensors = (id(tensor) for slot in self.slots for tensor in slot.tensors)
        return frozenset(map(id, self.modules.values())).union(tensors)

    def afresh(self, wholes: frozenset[str] | None = None) -> Component:
        """The same component, to be looked at again, with other `wholes` if they are given."""
        known = self.wholes if wholes is None else wholes
        return Component(self.name, self.module, self._describe, self.target, known)

    @cached_property
    def conventions(self) -> ModelConventions:
        """What the model's library says about it: entries, blocks, modules not to be split or cast."""
        return self._describe(self)

    def label(self, fqn: str) -> str:
        """An FQN with the component's name before it, for messages."""
        return ".".join(part for part in (self.name, fqn) if part) or type(self.module).__name__


def walk(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """FQN and module of every place in a tree, parents before children; a shared module has several.

    It lists what `named_modules(remove_duplicate=False)` does, in a fourth of the time.
    """
    found = [("", root)]
    _add_below(root, "", found)
    return found


def _add_below(module: nn.Module, prefix: str, found: list[tuple[str, nn.Module]]) -> None:
    for name, child in module._modules.items():
        if child is not None:
            fqn = prefix + name
            found.append((fqn, child))
            if child._modules:
                _add_below(child, f"{fqn}.", found)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """The tensors registered on the module itself: name, tensor, whether it is a buffer."""
    registered: Any
    for registered, is_buffer in ((module._parameters, False), (module._buffers, True)):
        for name, tensor in dict.items(registered):  # through dict, so that it doesn't count as a read
            if tensor is not None:
                yield name, tensor, is_buffer


def byte_span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and byte after the last that a strided tensor uses of its storage, as addresses.

    Tensors without an address (on the meta device, or subclasses that wrap others) count from 0.
    """
    start = tensor.data_ptr() if has_memory(tensor) else 0
    return start, start + _extent(tensor)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last that a strided tensor uses."""
    if tensor.is_contiguous():  # nearly all are; so are empty ones
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def has_memory(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is plain and strided and has memory of its own that can be pointed at."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_meta


def tensor_slots(places: Iterable[tuple[str, nn.Module]]) -> Iterator[TensorSlot]:
    """Groups all tensors in a tree by the memory they use.

    Two tensors are tied when they are one object, or when their spans of bytes overlap, whatever storages
    these belong to. Sharing a storage alone is no tie: loaders cut many weights out of one file's storage.
    """
    of_tensor: dict[int, TensorSlot] = {}  # by identity: hashing a tensor is slow
    seen: set[nn.Module] = set()
    registered: Any
    for fqn, module in places:
        prefix = f"{fqn}." if fqn else ""
        for registered, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for name, tensor in dict.items(registered):  # likewise
                if tensor is None:
                    continue
                owners = () if module in seen else ((module, name),)
                slot = TensorSlot((prefix + name,), (tensor,), owners, is_buffer)
                key = id(tensor)
                of_tensor[key] = _joined([of_tensor[key], slot]) if key in of_tensor else slot
        seen.add(module)
    slots = list(of_tensor.values())
    tied = _tied(slots)
    for index, slot in enumerate(slots):
        together = tied.get(index)
        if together is None:
            yield slot
        elif together[0] == index:
            yield _joined([slots[it] for it in together])


def _joined(slots: Sequence[TensorSlot]) -> TensorSlot:
    return TensorSlot(
        fqns=tuple(fqn for slot in slots for fqn in slot.fqns),
        tensors=tuple({id(tensor): tensor for slot in slots for tensor in slot.tensors}.values()),
        owners=tuple(owner for slot in slots for owner in slot.owners),
        is_buffer=all(slot.is_buffer for slot in slots),
    )


def _tied(slots: Sequence[TensorSlot]) -> dict[int, list[int]]:
    """Find what overlaps in memory, of slots with one tensor each: number to all numbers it is tied with."""
    by_device: dict[torch.device, list[tuple[int, int, int]]] = {}
    for index, slot in enumerate(slots):
        tensor = slot.tensors[0]
        if has_memory(tensor) and (extent := _extent(tensor)):
            start = tensor.data_ptr()
            by_device.setdefault(tensor.device, []).append((start, start + extent, index))
    tied: dict[int, list[int]] = {}
    for spans in by_device.values():
        spans.sort()
        reached, together = -1, list[int]()
        for start, stop, index in spans:
            if start < reached:
                together.append(index)
                tied[together[0]] = tied[index] = together
                reached = max(reached, stop)
            else:
                together, reached = [index], stop
    for together in tied.values():
        together.sort()
    return tied


def open_components(
    target: object,
    names: Iterable[str] | None,
    *,
    open_target: Callable[[Any], OpenedTarget | None],
    describe: Callable[[Component], ModelConventions],
) -> dict[str, Component]:
    """Turn a target into its named components.

    Args:
        target: A module, a mapping of named modules, or an object that a plugin can open.
        names: Take only these components; None takes all.
        open_target: Asks the plugins; returns None where none can open it.
        describe: Asks the plugins for a model's conventions.

    Raises:
        UnsupportedModelError: The target is none of these, or holds something that is no module.
        PlanError: `names` has one that the target lacks, or the target has no component.
    """
    opened: OpenedTarget | None = None
    modules: Mapping[str, Any]
    if isinstance(target, nn.Module):
        modules = {"": target}
    elif isinstance(target, Mapping):
        modules = target
    else:
        opened = open_target(target)
        if opened is None:
            raise UnsupportedModelError(
                f"cannot put techniques on a {type(target).__qualname__}: expected a torch.nn.Module, a "
                "mapping of named modules, or an object that a plugin opens (`hookcore plugins` lists the "
                "plugins)"
            )
        modules = opened.components
    for name, module in modules.items():
        if not isinstance(name, str) or not isinstance(module, nn.Module):
            raise UnsupportedModelError(
                f"component {name!r} is a {type(module).__qualname__}, expected a torch.nn.Module; "
                "leave it out of the mapping"
            )
    absent = opened.absent if opened else {}
    chosen = list(modules) if names is None else list(names)
    if unknown := [name for name in chosen if name not in modules]:
        there = "is one module" if list(modules) == [""] else f"has {', '.join(map(repr, modules)) or 'none'}"
        raise PlanError(
            f"no component named {', '.join(map(repr, unknown))}; this target {there}{why(unknown, absent)}"
        )
    if not chosen:
        raise PlanError(f"there is no component to put techniques on{why(absent, absent)}")
    if opened is None:
        together = Target(tuple(chosen))
    else:
        ends = opened.run_end
        can_be_watched = type(target).__weakrefoffset__ != 0  # without being kept alive
        together = Target(
            tuple(chosen),
            sequence=tuple(name for name in opened.sequence if name in chosen),
            denoisers=opened.denoisers,
            absent=opened.absent,
            at_run_end=None if ends is None else partial(call_after, weakref.ref(target), ends),
            attributes=Names(target, {name: modules[name] for name in chosen}) if can_be_watched else None,
        )
    return {name: Component(name, modules[name], describe, together) for name in chosen}


def why(names: Iterable[str], absent: Mapping[str, str]) -> str:
    """State of names that are no components why they are none, to end a sentence with."""
    reasons = [f"{name!r} {absent[name]}" for name in names if name in absent]
    return f" ({'; '.join(reasons)})" if reasons else ""
