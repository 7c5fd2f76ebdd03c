"""What `apply` would do, and in which order, from bindings alone. Pure: nothing here touches a model."""

from __future__ import annotations

import graphlib
import heapq
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

from attrs import evolve, field, frozen

from hookcore.answers import ask_jointly, ask_reason, ask_sizes, noting_origin, read_bindings
from hookcore.errors import OrderError
from hookcore.hook import overrides
from hookcore.placed import Placed, share_modules
from hookcore.report import plan_table
from hookcore.storage import planned_storage
from hookcore.technique import JointTechnique, Skipped

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import torch

    from hookcore.target import Component
    from hookcore.technique import Binding, Technique

PlacedT = TypeVar("PlacedT", bound=Placed)


@frozen(eq=False)
class PlanStep:
    """What one technique would do on one component.

    Attributes:
        technique: The technique.
        component: The component.
        bindings: The hooks it needs.
        skipped: What it leaves alone, and why.
        storage: The dtypes that weights will be stored in by what is planned with it, by identity of tensors.
        joint: An object that the steps have in common that were bound jointly; None where it was bound alone.
    """

    technique: Technique
    component: Component
    bindings: tuple[Binding, ...]
    skipped: tuple[Skipped, ...] = ()
    storage: Mapping[int, torch.dtype] = field(factory=dict, kw_only=True, repr=False)
    joint: object = field(default=None, kw_only=True, repr=False)

    @property
    def needs(self) -> Mapping[str, int]:
        """Bytes of each device that weights will take at once, where the technique can say so."""
        total: Counter[str] = Counter()
        with planned_storage(self.storage):
            for binding in self.bindings:
                if overrides(type(binding.hook), "needs"):
                    total.update(ask_sizes(self.technique, binding, self.component, "needs"))
        return dict(total)


@frozen(eq=False)
class Plan:
    """What `apply` would do: ordered, free of conflicts, not yet done. Print it.

    Attributes:
        steps: One for each technique and component; where they meet on a module, the first stands
            outermost.
        notes: What plugins remarked on it.
        left_alone: What would not be done, since nobody named the component: steps without bindings.
    """

    steps: tuple[PlanStep, ...]
    notes: tuple[str, ...] = field(default=())
    left_alone: tuple[PlanStep, ...] = field(default=(), kw_only=True)

    @property
    def needs(self) -> Mapping[str, int]:
        """Bytes of each device that weights will take at once, of all components together.

        They count as they will be stored. What a layer is cast to for its call comes besides.
        """
        total: Counter[str] = Counter()
        for step in self.steps:
            total.update(step.needs)
        return dict(total)

    def __str__(self) -> str:
        return plan_table(self.steps, self.needs, self.left_alone, self.notes)


def make_steps(places: Sequence[tuple[Technique, Component]]) -> list[PlanStep]:
    """Ask techniques for their bindings; joint ones once for all components that have an equal `joint_key`.

    Args:
        places: Each component with the technique that is put on it.

    Returns:
        A step for each place, in the same order.

    Raises:
        PlanError: From a technique: its options do not fit.
        PluginError: A technique gave bindings that name something the component lacks.
    """
    joined: dict[Hashable, list[int]] = {}
    for at, (technique, component) in enumerate(places):
        key: Hashable = at
        if isinstance(technique, JointTechnique):
            earlier = sum(it == technique and on is component for it, on in places[:at])
            key = type(technique), technique.joint_key, earlier
        joined.setdefault(key, []).append(at)
    steps: dict[int, PlanStep] = {}
    for together in joined.values():
        steps |= zip(together, make_joint_steps([places[at] for at in together]), strict=True)
    return [steps[at] for at in range(len(places))]


def make_joint_steps(places: Sequence[tuple[Technique, Component]]) -> list[PlanStep]:
    """Ask a technique for its bindings on components that are bound jointly, or on one."""
    technique, component = places[0]
    if not isinstance(technique, JointTechnique):
        return [make_step(technique, component)]
    joint = object()
    return [
        PlanStep(*place, *read_bindings(*place, answer, "bind_jointly"), joint=joint)
        for place, answer in zip(places, ask_jointly(type(technique), places), strict=True)
    ]


def make_step(technique: Technique, component: Component) -> PlanStep:
    """Ask a technique for its bindings on a component, and check that they fit it.

    Raises:
        PlanError: From the technique: its options do not fit.
        PluginError: The technique gave bindings that name something the component lacks.
    """
    with noting_origin(technique, "bind", component.label("")):
        answer = technique.bind(component)
    return PlanStep(technique, component, *read_bindings(technique, component, answer))


def with_storage(steps: Sequence[PlanStep]) -> list[PlanStep]:
    """Steps that are planned together, each knowing what the others will store weights in."""
    storage = {
        id(tensor): claim.dtype
        for step in steps
        for binding in step.bindings
        for claim in binding.claims
        if claim.dtype is not None and claim.tensor is not None
        for tensor in step.component.slot_of[claim.tensor].tensors
    }
    return [evolve(step, storage=storage) for step in steps]


def left_alone(technique: Technique, component: Component) -> PlanStep | None:
    """The step that says why a technique leaves a component alone that nobody named; None if it does not.

    Raises:
        PluginError: The technique gave no text for a reason.
    """
    reason = ask_reason(technique, component)
    return None if reason is None else PlanStep(technique, component, (), (Skipped("", reason),))


def ordered(items: Sequence[PlacedT]) -> list[PlacedT]:
    """Sort what is given in the user's order to what stands outermost first.

    By phase, then by the techniques' `before` and `after`, then by the order given. Only items that share
    a module constrain each other.

    Raises:
        OrderError: Phases, `before` and `after` contradict each other; the cycle is named.
    """
    outer: dict[int, set[int]] = {index: set() for index in range(len(items))}
    for index, item in enumerate(items):
        for other_index in range(index):
            if not share_modules(item.component, items[other_index].component):
                continue
            for inside, outside in ((index, other_index), (other_index, index)):
                if _stands_outside(items[outside].technique, items[inside].technique):
                    outer[inside].add(outside)
    sorter = graphlib.TopologicalSorter(outer)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = [items[index].technique.name for index in error.args[1]]
        raise OrderError(
            f"the order of techniques contradicts itself: {' outside '.join(cycle)}. "
            "Their phases, `before` and `after` cannot all hold; leave one of them out"
        ) from None
    result: list[PlacedT] = []
    ready: list[tuple[int, int]] = []
    while sorter.is_active():
        for index in sorter.get_ready():
            heapq.heappush(ready, (items[index].technique.phase, index))
        _, index = heapq.heappop(ready)
        sorter.done(index)
        result.append(items[index])
    return result


def _stands_outside(technique: Technique, other: Technique) -> bool:
    if technique.name == other.name:
        return False
    named = other.name in technique.before or technique.name in other.after
    return technique.phase < other.phase or named
