"""The verbs: plan, apply, remove, status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve

from hookcore.applied import Applied, Status, take_off
from hookcore.conflicts import check_conflicts, check_hooks_are_new
from hookcore.enclosed import wholes_of
from hookcore.errors import ConflictError, PlanError
from hookcore.memory.device_memory import check_free_memory
from hookcore.plan import Plan, PlanStep, left_alone, make_steps, ordered, with_storage
from hookcore.plugins import plugins
from hookcore.registry import CHANGING, HookRegistry, attached_anywhere, without_collecting
from hookcore.target import Component, open_components, why
from hookcore.technique import Technique

if TYPE_CHECKING:
    from hookcore.placed import Placed

Techniques = Iterable[Technique | str] | Mapping[str, Iterable[Technique | str]]


@without_collecting
def apply(target: Any, techniques: Techniques, *, components: Iterable[str] | None = None) -> Applied:
    """Put techniques on a model or pipeline: all of them, or, when anything fails, none.

    Args:
        target: A `torch.nn.Module`, a mapping of named modules, or an object that a plugin opens.
        techniques: Technique objects or registered names (`"layerwise_casting"`), for all components; or a
            mapping from component to such a list. The order given decides only what phases and the
            techniques' `before` and `after` leave open: the first stands outermost.
        components: Take only these components of the target. None takes all, except those that a technique
            leaves alone unless they are named, here or in a mapping: casting is for denoisers. What is left
            alone is said in the plan and the handle.

    Returns:
        The handle that resets and removes them.

    Raises:
        PlanError: The techniques do not fit the target or each other (`ConflictError`, `OrderError`), or a
            device has less memory than their weights need at once (`BudgetError`).
        PluginError: A name that no plugin has registered.
        UnsupportedModelError: The target is nothing that can be hooked.
        ConcurrentCallError: The target is being called at this moment.
    """
    with CHANGING:
        made, registry, needs = _plan(target, techniques, components)
        check_free_memory(needs, {step.component for step in made.steps})
        applied = Applied(made, registry.attach(made.steps))
    plugins().observe("applied", plan=made)
    return applied


def plan(target: Any, techniques: Techniques, *, components: Iterable[str] | None = None) -> Plan:
    """Find out what `apply` with the same arguments would do, and touch nothing.

    Returns:
        The ordered, conflict-free plan; print it.

    Raises:
        PlanError: As `apply` would.
        PluginError: As `apply` would.
        UnsupportedModelError: As `apply` would.
    """
    return _plan(target, techniques, components)[0]


def remove(target: Any, *, allow_lossy: bool = False, force: bool = False) -> None:
    """Take off everything that was put on a target or on modules inside it; nothing there is fine.

    Args:
        target: As for `apply`.
        allow_lossy: Go on where the original weights cannot be given back exactly.
        force: Give up on hooks that raise when they are taken off, as `Applied.remove` does.

    Raises:
        LossyRemovalError: Weights were rounded and no originals were kept; nothing was removed.
        PlanError: Something is on a module around the target; nothing was removed.
    """
    opened = list(_open(target, None).values())
    with CHANGING:
        attached = HookRegistry(opened).attachments
        inside = {id(module) for component in opened for module in component.modules.values()}
        here = [item for item in attached if id(item.component.module) in inside]
        hooked = [
            item for item in attached if item not in here and any(id(m) in inside for m, _ in item.hooks_at)
        ]
        if hooked:
            outer = hooked[0]
            raise PlanError(
                f"{outer.technique.name} was put on {type(outer.component.module).__name__}, which holds the "
                "target. Call hookcore.remove() on that model, or remove() on the handle of its apply()"
            )
        take_off(here, allow_lossy=allow_lossy, force=force)


def status(target: Any) -> Status:
    """Tell what is on a target and where its bytes are; print it.

    Args:
        target: As for `apply`.
    """
    opened = _open(target, None)
    return Status(tuple(opened.values()), HookRegistry(opened.values()).attachments)


def _open(target: Any, names: Iterable[str] | None) -> dict[str, Component]:
    host = plugins()
    return open_components(target, names, open_target=host.open_target, describe=host.describe)


def _plan(
    target: Any, techniques: Techniques, components: Iterable[str] | None
) -> tuple[Plan, HookRegistry, Mapping[str, int]]:
    opened = _open(target, components)
    wanted = _by_component(techniques, opened)
    alone: list[PlanStep] = []
    if components is None and len(opened) > 1 and not isinstance(techniques, Mapping):
        alone = _leave_alone(wanted, opened)
    touched = [opened[name] for name, chosen in wanted.items() if chosen]
    for component in touched:
        _refuse_foreign(component)
    registry = HookRegistry(touched)
    steps = _steps(wanted, opened, registry.attachments)
    check_hooks_are_new(steps, attached_anywhere())
    check_conflicts(steps, registry.attachments)
    present: list[Placed] = [*registry.attachments, *steps]
    made = Plan(
        tuple(item for item in ordered(present) if isinstance(item, PlanStep)), left_alone=tuple(alone)
    )
    needs = made.needs  # raises if a budget is too small for it
    return evolve(made, notes=tuple(plugins().review(made))), registry, needs


def _steps(
    wanted: Mapping[str, Sequence[Technique]], opened: Mapping[str, Component], attached: Sequence[Placed]
) -> list[PlanStep]:
    """Bind techniques, in their order; first those that decide what others can see."""
    places = [(name, item) for name, chosen in wanted.items() for item in chosen]
    first = [at for at, (_, item) in enumerate(places) if item.encloses]
    enclosing = make_steps([(places[at][1], opened[places[at][0]]) for at in first])
    seen = {}
    for name, component in opened.items():
        wholes = wholes_of(component, [*attached, *enclosing])
        seen[name] = component.afresh(wholes) if wholes else component
    then = [at for at in range(len(places)) if at not in first]
    others = make_steps([(places[at][1], seen[places[at][0]]) for at in then])
    steps = dict(zip([*first, *then], [*enclosing, *others], strict=True))
    return with_storage([steps[at] for at in range(len(places))])


def _by_component(techniques: Techniques, opened: Mapping[str, Component]) -> dict[str, list[Technique]]:
    if not isinstance(techniques, Mapping):
        everywhere = as_techniques(techniques)
        return {name: list(everywhere) for name in opened}
    if unknown := [name for name in techniques if name not in opened]:
        absent = next(iter(opened.values())).target.absent
        raise PlanError(
            f"techniques are given for {', '.join(map(repr, unknown))}, but the target has "
            f"{', '.join(map(repr, opened))}{why(unknown, absent)}. Name one of these"
        )
    return {name: as_techniques(items) for name, items in techniques.items()}


def _leave_alone(wanted: Mapping[str, list[Technique]], opened: Mapping[str, Component]) -> list[PlanStep]:
    """Take out of what is wanted what the techniques leave alone unless it is named, and return that."""
    found = []
    for name, chosen in wanted.items():
        for technique in list(chosen):
            step = left_alone(technique, opened[name])
            if step is not None:
                chosen.remove(technique)
                found.append(step)
    return found


def as_techniques(items: Iterable[Technique | str]) -> list[Technique]:
    """Turn registered names into techniques with default options.

    Raises:
        TypeError: Not a list of techniques and names.
        PlanError: A name of a technique that needs options.
        PluginError: A name that no plugin has registered.
    """
    if isinstance(items, str | Technique) or not isinstance(items, Iterable):
        raise TypeError(
            "techniques is a list of techniques or names, or a mapping from component to such a list; "
            f"found {items!r}. Write [{items!r}]"
        )
    return [_technique(item) for item in items]


def _technique(item: Technique | str) -> Technique:
    if isinstance(item, Technique):
        return item
    if not isinstance(item, str):
        raise TypeError(f"a technique is a Technique object or a registered name; found {item!r}")
    made = plugins().technique(item)
    try:
        return made()
    except TypeError as error:
        raise PlanError(
            f"{item!r} needs options, so a name is not enough ({error}). Pass {made.__name__}(...)"
        ) from error


def _refuse_foreign(component: Component) -> None:
    found = plugins().find_foreign(component)
    if found:
        first, *more = found
        others = f" (and {len(more)} more)" if more else ""
        raise ConflictError(
            f"{component.label(first.fqn)!r} already has {first.what}{others}, which hookcore cannot see "
            f"through. Nothing was touched. To take it off: {first.remedy}"
        )
