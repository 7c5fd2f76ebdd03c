"""Finds techniques that need the same thing, hide each other, or declare that they do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookcore.enclosed import can_be_enclosed
from hookcore.errors import ConflictError, HookSite, PluginError
from hookcore.placed import Placed, share_modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from hookcore.technique import Binding, Claim

_Holding = tuple[Placed, "Binding", "Claim | None"]
"""Who holds a thing, through which binding, by which claim; by none what its hook stands at."""


def check_hooks_are_new(steps: Sequence[Placed], existing: Iterable[Placed]) -> None:
    """Refuse a hook object that stands somewhere already, in whatever model.

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


def check_conflicts(new: Sequence[Placed], existing: Sequence[Placed]) -> None:
    """Refuse techniques that need the same thing, hide each other, or declare that they don't go together.

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
    """Return whether components that were bound jointly may hold a thing both."""
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
        first=_site(holder[0], first),
        second=_site(claimant[0], second),
    )


def _site(placed: Placed, binding: Binding) -> HookSite:
    return HookSite(placed.technique.name, placed.component.name, binding.fqn, binding.entry)


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


def _first(placed: Placed) -> HookSite | None:
    return _site(placed, placed.bindings[0]) if placed.bindings else None


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
                    first=_site(placed, binding),
                    second=_site(other, inner),
                )
            for resource in binding.forbids_below:
                if resource == "*" or resource in {claim.resource for claim in inner.claims}:
                    outer_label = placed.component.label(binding.fqn)
                    inner_label = other.component.label(inner.fqn)
                    raise ConflictError(
                        f"{placed.technique.name} at {outer_label!r} hides the modules below it, so that "
                        f"{other.technique.name} at {inner_label!r} would never run. Leave that module out "
                        "of one of them",
                        first=_site(placed, binding),
                        second=_site(other, inner),
                    )
