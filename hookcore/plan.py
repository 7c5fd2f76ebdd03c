"""Order and conflicts, found from bindings alone. Pure: nothing here touches a model."""

from __future__ import annotations

import graphlib
import heapq
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from attrs import evolve, field, frozen

from hookcore.answers import ask_jointly, ask_reason, ask_sizes, noting_origin, read_bindings
from hookcore.enclosed import can_be_enclosed
from hookcore.errors import ConflictError, OrderError, PluginError
from hookcore.hook import overrides
from hookcore.storage import planned_storage
from hookcore.technique import Binding, JointTechnique, Skipped

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    import torch
    from torch import nn

    from hookcore.target import Component
    from hookcore.technique import Claim, Technique


class Placed(Protocol):
    """One technique on one component: planned, or already attached."""

    @property
    def technique(self) -> Technique:
        """The technique."""

    @property
    def component(self) -> Component:
        """The component it is on."""

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """Its hooks."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What it leaves alone, and why."""

    @property
    def joint(self) -> object:
        """An object that those have in common that were bound jointly; None where it was bound alone."""


PlacedT = TypeVar("PlacedT", bound=Placed)

_Holding = tuple[Placed, Binding, "Claim | None"]
"""Who holds a thing, through which binding, by which claim; by none what its hook stands at."""


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
        from hookcore.report import plan_table

        return plan_table(self)


def make_steps(places: Sequence[tuple[Technique, Component]]) -> list[PlanStep]:
    """Asks techniques for their bindings; joint ones once for all components that have an equal `joint_key`.

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
    """Asks a technique for its bindings on components that are bound jointly, or on one."""
    technique, component = places[0]
    if not isinstance(technique, JointTechnique):
        return [make_step(technique, component)]
    joint = object()
    return [
        PlanStep(*place, *read_bindings(*place, answer, "bind_jointly"), joint=joint)
        for place, answer in zip(places, ask_jointly(type(technique), places), strict=True)
    ]


def make_step(technique: Technique, component: Component) -> PlanStep:
    """Asks a technique for its bindings on a component, and checks that they fit it.

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


def share_modules(first: Component, second: Component) -> bool:
    """Whether two components have a module or a tensor in common."""
    return first.module is second.module or not first.identities.isdisjoint(second.identities)


def ordered(items: Sequence[PlacedT]) -> list[PlacedT]:
    """Sorts what is given in the user's order to what stands outermost first.

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


def check_hooks_are_new(steps: Sequence[PlanStep], existing: Iterable[Placed]) -> None:
    """Refuses a hook object that stands somewhere already, in whatever model.

    Raises:
        PluginError: Names both places.
    """
    used: dict[int, tuple[Placed, Binding]] = {}
    for placed in (*existing, *steps):
        for binding in placed.bindings:
            other, there = used.setdefault(id(binding.hook), (placed, binding))
            if other is not placed:
                found, expected = (
                    f"{it.component.label(at.fqn)!r} of {type(it.component.module).__name__}"
                    for it, at in ((placed, binding), (other, there))
                )
                raise PluginError(
                    f"{placed.technique.name} binds a hook object to {found} that stands at {expected}. A "
                    "hook serves one module: have bind() make new ones each time"
                )


def check_conflicts(new: Sequence[PlanStep], existing: Sequence[Placed]) -> None:
    """Refuses techniques that need the same thing, hide each other, or declare that they don't go together.

    Args:
        new: What is to be added.
        existing: What already is on the same modules.

    Raises:
        ConflictError: Names both bindings, the thing, and the remedy.
    """
    everything: list[Placed] = [*existing, *new]
    if len(everything) < 2:
        return  # nothing is in conflict with itself
    holders: dict[object, _Holding] = {}
    for placed in everything:
        held = _held(placed, everything)
        if twice := holders.keys() & held.keys():
            for key in held:
                if key in twice and not _may_share(holders[key], held[key]):
                    applied = any(it is holders[key][0] for it in existing)
                    raise _conflict(holders[key], held[key], applied=applied)
        holders |= held
    for placed in everything:
        _check_incompatible(placed, everything)
        for binding in placed.bindings:
            if binding.forbids_below or binding.encloses:
                _check_hidden(placed, binding, everything)


def _may_share(first: _Holding, second: _Holding) -> bool:
    """Whether components that were bound jointly may hold a thing both."""
    jointly = first[0].joint is not None and first[0].joint is second[0].joint
    return jointly and all(claim is None or claim.shared for _, _, claim in (first, second))


def _held(placed: Placed, everything: Iterable[Placed]) -> dict[object, _Holding]:
    """All that a technique owns on a component: what it claims, and the entries that it hooks.

    It owns these against an equal technique only, which would do the same once more.
    """
    held: dict[object, _Holding] = {}
    component = placed.component
    equal = id(next(it.technique for it in everything if it.technique == placed.technique))
    for binding in placed.bindings:
        module = id(component.modules[binding.fqn])
        held.setdefault((equal, module, binding.entry), (placed, binding, None))
        for claim in binding.claims:
            holding = placed, binding, claim
            if claim.tensor is None:
                held.setdefault((claim.resource, module, binding.entry), holding)
            else:
                slot = component.slot_of[claim.tensor]
                for tensor in slot.tensors:
                    held.setdefault((claim.resource, id(tensor)), holding)
                for owner, attribute in slot.owners:  # since another tensor may stand there by now
                    held.setdefault((claim.resource, id(owner), attribute), holding)
    return held


def _conflict(holder: _Holding, claimant: _Holding, *, applied: bool) -> ConflictError:
    first, second = holder[1], claimant[1]
    claim = claimant[2]
    technique, other = (held[0].technique for held in (holder, claimant))
    label = claimant[0].component.label
    if claim is not None and claim.tensor is not None:
        what = f"the {claim.resource} of {label(claim.tensor)!r}"
    else:
        what = f"{second.entry}() of {label(second.fqn)!r}"
        if claim is not None:
            what = f"the {claim.resource} of {what}"
    remedy = "Call applied.remove() on the first" if applied else "Give only one of them"
    if technique.name == other.name and holder[0].component.module is claimant[0].component.module:
        reason = "it has already been applied there" if applied else "it is given twice"
        reason += "" if technique == other else ", with other options"
    elif technique.name == other.name:
        reason = f"it already does so at {holder[0].component.label(first.fqn)!r}"
        remedy = remedy if applied else "Leave out one of the components"
    else:
        reason = f"{technique.name} already holds it"
        if any(claim.resource in {it.resource for it in second.claims} for claim in first.claims):
            reason += f", through its hook at {holder[0].component.label(first.fqn)!r}"
    return ConflictError(
        f"{other.name} cannot claim {what}: {reason}. {remedy}, or leave the module out of one of them",
        first=_named(holder[0], first),
        second=_named(claimant[0], second),
    )


def _named(placed: Placed, binding: Binding) -> Binding:
    """A binding that says whose it is, for an error."""
    return evolve(binding, technique=placed.technique.name, component=placed.component.name)


def _check_incompatible(placed: Placed, everything: Iterable[Placed]) -> None:
    for other in everything:
        if (
            other is not placed
            and other.technique.name in placed.technique.incompatible_with
            and share_modules(placed.component, other.component)
        ):
            raise ConflictError(
                f"{placed.technique.name} does not work together with {other.technique.name} on "
                f"{placed.component.label('')!r}. Apply only one of them, or each to modules of its own",
                first=_first(other),
                second=_first(placed),
            )


def _first(placed: Placed) -> Binding | None:
    return _named(placed, placed.bindings[0]) if placed.bindings else None


def _check_hidden(placed: Placed, binding: Binding, everything: Iterable[Placed]) -> None:
    top: nn.Module = placed.component.modules[binding.fqn]
    below: set[Any] = set(top.modules()) - {top}
    for other in everything:
        if other is placed:
            continue
        for inner in other.bindings:
            at = other.component.modules[inner.fqn]
            if inner.hook.outermost_only:
                continue  # is never needed within another call
            # A method of the module's own, such as `_decode`, is called by the one that runs as one with it.
            its_own = binding.encloses and at is top and inner.entry.startswith("_")
            if at not in below and not its_own:
                continue
            if binding.encloses and not can_be_enclosed(inner.hook):
                outer_label = placed.component.label(binding.fqn)
                inner_label = other.component.label(inner.fqn)
                where = f"{inner.entry}() of {inner_label!r}" if its_own else repr(inner_label)
                raise ConflictError(
                    f"{placed.technique.name} runs all that is in {outer_label!r} as one, so that "
                    f"{other.technique.name} cannot stand at {where} within. Leave that module out "
                    "of one of them",
                    first=_named(placed, binding),
                    second=_named(other, inner),
                )
            for resource in binding.forbids_below:
                if resource == "*" or resource in {claim.resource for claim in inner.claims}:
                    outer_label = placed.component.label(binding.fqn)
                    inner_label = other.component.label(inner.fqn)
                    raise ConflictError(
                        f"{placed.technique.name} at {outer_label!r} hides the modules below it, so that "
                        f"{other.technique.name} at {inner_label!r} would never run. Leave that module out "
                        "of one of them",
                        first=_named(placed, binding),
                        second=_named(other, inner),
                    )
