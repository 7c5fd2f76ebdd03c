"""Which tensors move together, and whose calls need them. Pure: nothing here touches a model.

A unit is a run of modules of which each call needs the whole unit: one or more neighbouring blocks, or a
leaf. A tensor belongs to the deepest unit above it, and tensors that the same units use form one group.
So a tensor tied across units has one home too, a group with all that is shared in the same way, which
stands where its earliest user is registered. (Put with its earliest user's other weights, all of these would
have to be in memory at the calls of its other users.)

The levels are those of diffusers' group offloading.
"""

from __future__ import annotations

import difflib
import itertools
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen
from torch import nn

from hookcore.errors import PlanError
from hookcore.memory.tensor_memory import check_movable, is_on
from hookcore.target import own_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    import torch

    from hookcore.target import Component, TensorSlot

Unit = tuple[str, ...]
"""FQNs of modules whose tensors move together."""

Holder = tuple[str, str]
"""FQN of a module and the name of the method whose call needs a group."""

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_READ_THEIR_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""torch's modules that use weights of their children without calling these."""
_LARGE = 2**15
"""Bytes from which a buffer can be a weight; what is smaller takes longer to begin copying than to copy."""


@frozen(eq=False, slots=False)  # with a dict, making thousands of them takes half the time
class Group:
    """Tensors that move together.

    Attributes:
        name: For people, after the component's; no two groups of a component have the same.
        slots: The tensors, in order of registration.
        holders: The calls that need them.
    """

    name: str
    slots: tuple[TensorSlot, ...]
    holders: tuple[Holder, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, as the tensors are now."""
        return sum(slot.nbytes for slot in self.slots)

    def divided(self, moves: Callable[[TensorSlot], bool]) -> tuple[Group, Group]:
        """Its weights that move, and its buffers, which no call needs to have brought."""
        weights = tuple(slot for slot in self.slots if moves(slot))
        buffers = tuple(slot for slot in self.slots if not moves(slot))
        return Group(self.name, weights, self.holders), Group(self.name, buffers, ())


def is_weight(slot: TensorSlot) -> bool:
    """Whether a tensor is a weight: a parameter, or a large buffer that is saved, of a quantized layer.

    Layers of GPTQ or AWQ hold their weights as buffers of narrow numbers, with the scales beside them. Other
    buffers are what calls compute with and change, such as caches, statistics and tables of positions.
    """
    return not slot.is_buffer or (
        slot.nbytes >= _LARGE
        and all(name not in module._non_persistent_buffers_set for module, name in slot.owners)
        and any(_is_quantized(module) for module, _ in slot.owners)
    )


def _is_quantized(module: nn.Module) -> bool:
    """Return whether it has a large buffer of integers or eight-bit floats."""
    return any(
        buffer is not None
        and buffer.nbytes >= _LARGE
        and (buffer.dtype.itemsize == 1 or not (buffer.is_floating_point() or buffer.is_complex()))
        for buffer in dict.values(module._buffers)  # not as a read
    )


def find_blocks(component: Component, holders: Collection[str] | None = None) -> tuple[Unit, ...]:
    """Find a model's repeated blocks: those that its library declares, else those that its structure shows.

    In this order: the modules in `group_modules`; modules of the `block_classes`; elements of the outermost
    lists, sequences and dicts of two or more modules; siblings of one class that have tensors.

    Args:
        component: Where to look.
        holders: FQNs of modules that hold the blocks; None for the library's `group_modules`.

    Returns:
        FQNs of the blocks, one tuple for each container that they are in; empty where there are none.

    Raises:
        PlanError: A name is no module's; says which ones are near.
    """
    if holders is None:
        holders = component.conventions.group_modules
    else:
        check_names(component, holders)
    seen: set[nn.Module] = set()
    for rule in (partial(_declared_modules, holders), _declared_classes, _elements, _siblings):
        runs: list[Unit] = []
        for run in rule(component):
            blocks = [_first_fqn(component, fqn) for fqn in run]
            new = [fqn for fqn in dict.fromkeys(blocks) if fqn and component.modules[fqn] not in seen]
            seen.update(component.modules[fqn] for fqn in new)
            if kept := tuple(fqn for fqn in new if _has_tensors(component.modules[fqn])):
                runs.append(kept)
        if runs:
            return tuple(runs)
    return ()


def merge_neighbours(runs: Iterable[Unit], size: int) -> tuple[Unit, ...]:
    """Join up to `size` blocks that follow each other in one container."""
    return tuple(run[start : start + size] for run in runs for start in range(0, len(run), size))


def leaf_units(component: Component) -> tuple[Unit, ...]:
    """Find the smallest units: each module that has tensors of its own and is called.

    Modules that read their children's weights without calling them are one unit with all that is below; so
    are those whose calls run all that is below as one.
    Tensors of a module without a forward, such as a ParameterList, belong to the nearest module above it.
    """
    unit_of: dict[str, str] = {}
    wholes: set[str] = set()  # places of which all that is below is in one unit
    units: dict[str, None] = {}
    for fqn, module in component.places:
        above = fqn.rpartition(".")[0]
        if above in wholes:
            wholes.add(fqn)
            unit_of[fqn] = unit_of[above]
        elif isinstance(module, _READ_THEIR_CHILDREN) or component.fqns[module][0] in component.wholes:
            wholes.add(fqn)
            unit_of[fqn] = component.fqns[module][0]
        elif _can_be_called(module):
            unit_of[fqn] = component.fqns[module][0]
        else:
            unit_of[fqn] = unit_of.get(above, "")
        if next(own_tensors(module), None) is not None:
            units[unit_of[fqn]] = None
    return tuple((fqn,) for fqn in units)


def make_groups(
    component: Component, units: Sequence[Unit], slots: Iterable[TensorSlot]
) -> tuple[Group, ...]:
    """Put tensors into groups, each into exactly one.

    Tensors outside of all units form a group that the component's entries hold.

    Args:
        component: What the tensors belong to.
        units: Modules that move together; of nested ones a tensor belongs to the deepest.
        slots: The tensors to group.
    """
    numbers = {fqn: number for number, unit in enumerate(units) for fqn in unit}
    rest = numbers.get("", len(units))
    all_units = [*units, ("",)]
    user_of: dict[str, int] = {}  # the number of the deepest unit that each place is in
    for fqn, module in component.places:
        above = user_of[fqn.rpartition(".")[0]] if fqn else rest
        user_of[fqn] = numbers.get(component.fqns[module][0], above)
    together: dict[tuple[int, ...], list[TensorSlot]] = {}
    for slot in slots:
        using = [user_of[fqn.rpartition(".")[0]] for fqn in slot.fqns]
        users = tuple(using) if len(using) == 1 else tuple(sorted(set(using)))
        together.setdefault(users, []).append(slot)
    entries = [("", entry) for entry in entries_of(component)]
    groups = []
    for users, members in together.items():
        used_by = [all_units[user] for user in users]
        holders: list[Holder] = []
        for fqn in itertools.chain.from_iterable(used_by):
            holders += [(fqn, "forward")] if fqn else entries
        name = " & ".join(map(_unit_name, used_by))
        if component.name:
            name = f"{component.name}.{name}"
        groups.append(Group(name, tuple(members), tuple(holders)))
    return tuple(groups)


def spanning_groups(groups: Iterable[Group]) -> list[Group]:
    """The groups that a call holds while calls below it hold others."""
    groups = list(groups)
    held = [fqn for group in groups for fqn, _ in group.holders]
    above = {fqn[:at] for fqn in held for at, char in enumerate(fqn) if char == "."}
    if any(held):
        above.add("")
    return [group for group in groups if any(fqn in above for fqn, _ in group.holders)]


def slots_below(component: Component, names: Collection[str]) -> tuple[TensorSlot, ...]:
    """Find the tensors that the named modules, or modules below them, use.

    Args:
        component: Where to look.
        names: FQNs of modules in it.

    Raises:
        PlanError: A name is no module's; says which ones are near.
    """
    check_names(component, names)
    chosen = {module for name in names for module in component.module.get_submodule(name).modules()}
    return tuple(slot for slot in component.slots if any(owner in chosen for owner, _ in slot.owners))


def check_names(component: Component, names: Iterable[str]) -> None:
    """Refuse names that are no module's.

    Raises:
        PlanError: There is one; says which ones are near.
    """
    known = set(itertools.chain.from_iterable(component.fqns.values()))
    for name in names:
        if name not in known:
            near = ", ".join(map(repr, difflib.get_close_matches(name, known, n=3)))
            raise PlanError(
                f"{component.label('')!r} has no module named {name!r}"
                + (f"; near matches are {near}" if near else "; give the FQN of a module, such as 'blocks.0'")
            )


def moving_and_staying(
    component: Component, exclude_modules: Collection[str], onload_device: torch.device
) -> tuple[list[TensorSlot], list[Group]]:
    """Divide a component's tensors into those that come and go and, as a group, those that stay.

    Args:
        component: What the tensors belong to.
        exclude_modules: FQNs of modules of which all stays on the onload device.
        onload_device: Where it is used.

    Raises:
        PlanError: A tensor that has to be moved has no data, or a name is no module's.
        UnsupportedModelError: A tensor that has to be moved is of a kind that cannot be.
    """
    staying = slots_below(component, exclude_modules)
    kept = set(staying)
    moving = [slot for slot in component.slots if slot not in kept]
    away = [slot for slot in staying if not all(is_on(tensor, onload_device) for tensor in slot.tensors)]
    check_movable(component, [*moving, *away], exclude_option="exclude_modules")
    return moving, [Group("excluded", staying, ())] if staying else []


def callable_parts(component: Component) -> Iterator[str]:
    """Find the modules that can be called and have tensors, of their own or below them.

    Yields:
        FQNs, parents before children; the component itself among them.
    """
    names = [fqn for slot in component.slots for fqn in slot.fqns]
    above = {fqn[:at] for fqn in names for at, char in enumerate(fqn) if char == "."}
    for module, fqns in component.fqns.items():
        if _can_be_called(module) and (fqns[0] == "" or not above.isdisjoint(fqns)):
            yield fqns[0]


def entries_of(component: Component) -> tuple[str, ...]:
    """The methods, of those that the model's library declares, that the component has."""
    return tuple(
        name for name in component.conventions.entries if callable(getattr(component.module, name, None))
    )


def _declared_modules(holders: Collection[str], component: Component) -> Iterator[Unit]:
    known = set(itertools.chain.from_iterable(component.fqns.values()))
    for fqn in holders:
        if fqn in known:
            module = component.module.get_submodule(fqn)
            if isinstance(module, _CONTAINERS):
                yield from _run(fqn, module)
            else:
                # As in diffusers, the lists in it are blocks too, and what is left of it moves at its call.
                yield (fqn,)
                yield from _container_runs(fqn, module)


def _declared_classes(component: Component) -> Iterator[Unit]:
    names = set(component.conventions.block_classes)
    inside: set[nn.Module] = set()
    by_parent: dict[str, list[str]] = {}
    for fqn, module in component.modules.items():
        if fqn and type(module).__name__ in names and module not in inside:
            inside.update(module.modules())
            by_parent.setdefault(fqn.rpartition(".")[0], []).append(fqn)
    for run in by_parent.values():
        yield tuple(run)


def _elements(component: Component) -> Iterator[Unit]:
    yield from _container_runs("", component.module)


def _container_runs(fqn: str, module: nn.Module) -> Iterator[Unit]:
    """The elements of the outermost containers, of two elements or more, at or below a module."""
    children = _children(fqn, module)
    if isinstance(module, _CONTAINERS) and len(children) >= 2:
        yield from _run(fqn, module)
    else:
        for child_fqn, child in children:
            yield from _container_runs(child_fqn, child)


def _run(fqn: str, container: nn.Module) -> Iterator[Unit]:
    """The elements of a container; of a list in the list, which is never called, its own elements."""
    run = []
    for child_fqn, child in _children(fqn, container):
        if _can_be_called(child):
            run.append(child_fqn)
        else:
            yield from _run(child_fqn, child)
    yield tuple(run)


def _siblings(component: Component) -> Iterator[Unit]:
    def search(fqn: str, module: nn.Module) -> Iterator[Unit]:
        by_class: dict[type[nn.Module], list[tuple[str, nn.Module]]] = {}
        for child_fqn, child in _children(fqn, module):
            by_class.setdefault(type(child), []).append((child_fqn, child))
        for children in by_class.values():
            if len({child for _, child in children if _has_tensors(child) and _can_be_called(child)}) >= 2:
                yield tuple(child_fqn for child_fqn, _ in children)
            else:
                for child_fqn, child in children:
                    yield from search(child_fqn, child)

    yield from search("", component.module)


def _first_fqn(component: Component, fqn: str) -> str:
    """The FQN by which a component lists a module that may stand at several."""
    return fqn if fqn in component.modules else component.fqns[component.module.get_submodule(fqn)][0]


def _children(fqn: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a module can be divided into."""
    if isinstance(module, _READ_THEIR_CHILDREN):
        return []
    return [
        (f"{fqn}.{name}" if fqn else name, child)
        for name, child in module._modules.items()
        if child is not None
    ]


def _can_be_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _has_tensors(module: nn.Module) -> bool:
    return next(itertools.chain(module.parameters(), module.buffers()), None) is not None


def _unit_name(unit: Unit) -> str:
    return unit[0] or "the rest" if len(unit) == 1 else f"{unit[0]}..{unit[-1]}"
