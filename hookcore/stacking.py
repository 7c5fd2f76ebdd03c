"""Gives entries of modules the stacks of hooks that attachments have for them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hookcore.enclosed import enclosing_calls, enclosing_entries, moved_outside
from hookcore.guard import WeightGuard
from hookcore.replaced import ReplacedHook
from hookcore.stack import HookStack
from hookcore.structure import ReplanHook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from torch import nn

    from hookcore.attachment import Attachment
    from hookcore.hook import Hook
    from hookcore.target import Component

    Key = tuple[nn.Module, str]  # an entry of a module


def set_stacks(
    hooked: Iterable[Key],
    attachments: Sequence[Attachment],
    *,
    replan: Callable[[Component], bool],
    techniques_on: Callable[[nn.Module], list[str]],
) -> None:
    """Give all entries the hooks that the attachments, outermost first, have for them.

    Those at modules that an outer call encloses stand at that call.

    Args:
        hooked: The entries that had hooks; what no attachment hooks any more is given back.
        attachments: What is attached now.
        replan: Binds techniques anew where a component has changed; returns whether any was.
        techniques_on: Names of the techniques that are attached to a module.
    """
    hooks_at: dict[Key, tuple[Hook, ...]] = {}
    needed_at: dict[Key, tuple[Attachment, ...]] = {}
    enclosing = enclosing_calls(attachments)
    entries = enclosing_entries(attachments)
    for item in attachments:
        added = moved_outside(item.hooks_at, enclosing, entries) if entries else item.hooks_at
        needed = dict.fromkeys(added, (item,))
        shared = hooks_at.keys() & added.keys()
        # What is outside of it comes first at a shared entry.
        hooks_at |= added | {key: hooks_at[key] + added[key] for key in shared}
        needed_at |= needed | {key: needed_at[key] + needed[key] for key in shared}
    guards = {item.lock: WeightGuard(item.lock) for item in attachments}
    inner_hooks: dict[Key, tuple[Hook, ...]] = {}
    for key, hooks in hooks_at.items():
        guard = guards[needed_at[key][0].lock]
        if any(hook.outermost_only for hook in hooks):
            inner_hooks[key] = _guarded([hook for hook in hooks if not hook.outermost_only], guard)
        hooks_at[key] = _guarded(hooks, guard)
    locks = {key: needed_at[key][0].lock for key in inner_hooks}
    for key, outermost, items in _for_whole_components(
        attachments, enclosing, inner_hooks.keys(), replan, techniques_on
    ):
        hooks_at[key] = (outermost, *hooks_at.get(key, ()))
        needed_at[key] = (*needed_at.get(key, ()), *items)
    for key, hooks in hooks_at.items():
        HookStack.set(
            *key,
            hooks,
            owners=needed_at[key],
            lock=locks.get(key),
            inner_hooks=inner_hooks.get(key, ()),
        )
    for key in hooked:
        if key not in hooks_at:
            HookStack.set(*key, ())


def _guarded(hooks: Sequence[Hook], guard: WeightGuard) -> tuple[Hook, ...]:
    """The hooks, with a guard outside of them if they swap weights."""
    return (guard, *hooks) if any(hook.swaps_weights for hook in hooks) else tuple(hooks)


def _for_whole_components(
    attachments: Sequence[Attachment],
    enclosing: Mapping[nn.Module, list[Key]],
    parts: AbstractSet[Key],
    replan: Callable[[Component], bool],
    techniques_on: Callable[[nn.Module], list[str]],
) -> Iterator[tuple[Key, Hook, list[Attachment]]]:
    """Hooks that look what has become of components, at the calls by users, and for what attachments.

    Args:
        attachments: What is attached.
        enclosing: What `enclosing_calls` found.
        parts: Entries at which users may call a part of a component by itself.
        replan: As `set_stacks` takes it.
        techniques_on: Likewise.
    """
    replanning = [item for item in attachments if item.technique.replans]
    called = _called_by_users(replanning, enclosing)
    for item in replanning:
        for key in parts & item.hooks_at.keys() - called.keys():
            called[key] = [item]
    for key, items in called.items():
        structures = tuple(item.structure for item in items if item.structure is not None)
        yield key, ReplanHook(key[1], structures, partial(replan, items[0].component)), items
    for key, items in _called_by_users(attachments, enclosing).items():
        if names := dict.fromkeys(it for item in items if (it := item.component.target.attributes)):
            yield key, ReplacedHook(names, techniques_on), items


def _called_by_users(
    attachments: Iterable[Attachment], enclosing: Mapping[nn.Module, list[Key]]
) -> dict[Key, list[Attachment]]:
    """The attachments by the entries of their components, or the calls that enclose these."""
    found: dict[Key, list[Attachment]] = {}
    for item in attachments:
        for key in _entries(item):
            for place in enclosing.get(key[0], [key]):
                found.setdefault(place, []).append(item)
    return found


def _entries(item: Attachment) -> list[Key]:
    """The entries through which users call an attachment's component."""
    root = item.component.module
    return [
        (root, entry) for entry in item.component.conventions.entries if callable(getattr(root, entry, None))
    ]


def hooked_entries(items: Iterable[Attachment]) -> set[Key]:
    """The entries that attachments hook, and those through which users call their components."""
    return {key for item in items for key in (*item.hooks_at, *_entries(item))}
