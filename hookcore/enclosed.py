"""Calls that run the modules below as one with them, so that no hook can stand at those modules' own calls.

A compiled block is such a call: a hook inside would be traced with it, and break its graph or be frozen into
it. What hooks below bring for their own module's call they then bring for the whole call that encloses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hookcore.hook import Hook, overrides

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import nn

    from hookcore.placed import Placed
    from hookcore.target import Component

    Key = tuple[nn.Module, str]  # an entry of a module

_AT_CALLS = ("pre_forward", "post_forward", "around_forward", "substitute", "on_error")


class EnclosedHook(Hook):
    """Does around an enclosing call what another hook would do around its own module's call.

    Args:
        hook: The other hook; it only brings weights.
        module: Its module.
    """

    swaps_weights: ClassVar[bool] = True

    def __init__(self, hook: Hook, module: nn.Module) -> None:
        self.hook = hook
        self._module = module

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Do what the other does before its module's call."""
        return self.hook.pre_forward(self._module, args, kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Do what the other does after its module's call."""
        return self.hook.post_forward(self._module, output)

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """Do what the other does when its module's call fails."""
        self.hook.on_error(self._module, error)


def can_be_enclosed(hook: Hook) -> bool:
    """Return whether a hook may stand at a module whose calls others enclose."""
    if hook.only_brings_weights or hook.outermost_only or _goes_outside(hook):
        return True
    return not any(overrides(type(hook), method) for method in _AT_CALLS)


def enclosing_calls(attached: Iterable[Placed]) -> dict[nn.Module, list[Key]]:
    """Module to the entries, further out, whose calls run it as one with them."""
    found: dict[nn.Module, list[Key]] = {}
    for item in attached:
        for binding in item.bindings if item.technique.encloses else ():
            if binding.encloses:
                top = item.component.modules[binding.fqn]
                for module in top.modules():
                    if module is not top:
                        found.setdefault(module, []).append((top, binding.entry))
    return found


def wholes_of(component: Component, attached: Iterable[Placed]) -> frozenset[str]:
    """The modules in a component whose calls run what is below as one, and let it be brought for them."""
    tops = {
        item.component.modules[binding.fqn]
        for item in attached
        if item.technique.encloses
        for binding in item.bindings
        if binding.encloses and not binding.forbids_below
    }
    if not tops:
        return frozenset()
    return frozenset(fqn for fqn, module in component.modules.items() if module in tops)


def enclosing_entries(attached: Iterable[Placed]) -> frozenset[Key]:
    """The entries themselves whose calls run what is below as one with them."""
    return frozenset(
        (item.component.modules[binding.fqn], binding.entry)
        for item in attached
        if item.technique.encloses
        for binding in item.bindings
        if binding.encloses
    )


def moved_outside(
    hooks_at: Mapping[Key, tuple[Hook, ...]],
    enclosing: Mapping[nn.Module, list[Key]],
    entries: Collection[Key],
) -> dict[Key, tuple[Hook, ...]]:
    """Hooks by the entry at which they stand: their own, or those whose calls enclose it.

    Args:
        hooks_at: Hooks by their own entry.
        enclosing: What `enclosing_calls` found.
        entries: What `enclosing_entries` found.
    """
    moved: dict[Key, tuple[Hook, ...]] = {}
    for key, hooks in hooks_at.items():
        module = key[0]
        standing = hooks
        if module in enclosing:
            standing = tuple(outer for hook in hooks if (outer := _outside(hook, module)) is not None)
        elif key in entries:
            standing = tuple(hook.outside(module) if _goes_outside(hook) else hook for hook in hooks)
        for place in enclosing.get(module, [key]):
            moved[place] = (*moved.get(place, ()), *standing)
    return moved


def _goes_outside(hook: Hook) -> bool:
    return overrides(type(hook), "outside")


def _outside(hook: Hook, module: nn.Module) -> Hook | None:
    """What stands for a hook at the call that encloses its module's; None for one that does nothing there."""
    if hook.outermost_only:
        return None
    if hook.only_brings_weights:
        return EnclosedHook(hook, module)
    return hook.outside(module) if _goes_outside(hook) else None
