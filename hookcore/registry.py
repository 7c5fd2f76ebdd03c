"""What is attached to the modules of this process: attaching, detaching and undoing, all or nothing."""

from __future__ import annotations

import itertools
import threading
import weakref
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING

from tqdm import tqdm

from hookcore.answers import ask_loss
from hookcore.conflicts import check_conflicts, check_hooks_are_new
from hookcore.enclosed import EnclosedHook, enclosing_calls, enclosing_entries, moved_outside, wholes_of
from hookcore.errors import ConcurrentCallError, describe_error, note_origin
from hookcore.guard import CallLock, Turn, WeightGuard
from hookcore.hook import overrides
from hookcore.placed import share_modules
from hookcore.plan import make_joint_steps, ordered, with_storage
from hookcore.replaced import ReplacedHook
from hookcore.stack import HookStack
from hookcore.structure import ReplanHook, Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from torch import nn

    from hookcore.hook import Hook
    from hookcore.plan import PlanStep
    from hookcore.target import Component
    from hookcore.technique import Binding, Skipped, Technique

    Key = tuple[nn.Module, str]  # an entry of a module

CHANGING = threading.RLock()
"""Held from looking at what is attached until it is changed, so that no other thread changes it between."""

_NUMBERS = itertools.count()
_SECONDS_BEFORE_PROGRESS = 2.0


class Attachment:
    """One technique on one component, attached or about to be.

    Attributes:
        technique: The technique.
        component: The component; taken anew when its structure changes.
        bindings: Its hooks.
        skipped: What it leaves alone, and why.
        attached: Whether its hooks are on the modules.
        lock: What a call that swaps weights has to hold; shared by all attachments that share modules.
        structure: What the component consisted of when it was last bound, if it is to be bound anew.
        joint: An object that those have in common that were bound jointly; None where it was bound alone.
        given_up: The errors of hooks that are given up while it is taken off by force; None otherwise.
    """

    def __init__(self, step: PlanStep) -> None:
        self.technique: Technique = step.technique
        self.joint = step.joint
        self.given_up: list[str] | None = None
        self.attached = False
        self.lock = CallLock()
        self.structure: Structure | None = None
        self.number = next(_NUMBERS)
        self.take(step.component, step.bindings, step.skipped)

    def take(self, component: Component, bindings: tuple[Binding, ...], skipped: tuple[Skipped, ...]) -> None:
        """Replaces the bindings, while none of them is attached."""
        self.component = component
        self.bindings = bindings
        self.skipped = skipped
        modules = component.modules
        self._bound = [(modules[binding.fqn], binding) for binding in bindings]
        self._kinds = {type(binding.hook) for binding in bindings}
        self._to_prepare = self.overriding("attach", "detach")
        self._prepared: dict[int, bool] = {}  # by the hook's identity
        self.hooks_at: dict[Key, tuple[Hook, ...]] = {}
        for module, binding in self._bound:
            key = module, binding.entry
            self.hooks_at[key] = (*self.hooks_at.get(key, ()), binding.hook)

    def overriding(self, *methods: str) -> list[tuple[nn.Module, Binding]]:
        """Each module with its binding, where the hook brings its own version of one of these methods."""
        kinds = {kind for kind in self._kinds if any(overrides(kind, method) for method in methods)}
        return [bound for bound in self._bound if type(bound[1].hook) in kinds] if kinds else []

    @property
    def prepares(self) -> bool:
        """Whether any of its hooks does something to a module besides standing in its calls."""
        return bool(self._to_prepare)

    @property
    def intact(self) -> bool:
        """Whether every module is prepared that has to be."""
        return all(self._is_prepared(binding.hook) for _, binding in self._to_prepare)

    def put_on(self, undo: _Undo) -> None:
        """Attaches all hooks that are not."""
        waiting = [(at, item.hook) for at, item in self._to_prepare if not self._is_prepared(item.hook)]
        for module, hook in self._progress(waiting, "applying"):
            undo.then(partial(self._detach_one, module, hook))
            self._attach_one(module, hook)

    def take_off(self, undo: _Undo) -> None:
        """Detaches all hooks that are attached, in reverse."""
        there = [(at, item.hook) for at, item in reversed(self._to_prepare) if self._is_prepared(item.hook)]
        for module, hook in self._progress(there, "removing"):
            undo.then(partial(self._attach_one, module, hook))
            if not self._undoes(partial(self._detach_one, module, hook)):
                undo.then(partial(self._prepared.__setitem__, id(hook), True))
                self._prepared[id(hook)] = False

    def finish(self) -> None:
        """Does what hooks have left to do when they are gone for good."""
        for module, binding in self.overriding("after_removal"):
            self._undoes(partial(self.ask, module, binding.hook, "after_removal"))

    def _undoes(self, step: Callable[[], object]) -> bool:
        """Has a hook undo what it did; returns False if it failed and is given up."""
        try:
            step()
        except Exception as error:
            if self.given_up is None:
                raise
            self.given_up.append(describe_error(error))
            return False
        return True

    def origin_of(self, hook: Hook, method: str) -> str | None:
        """Which technique's method that is, and at which module, for people; None if the hook is not its."""
        own = hook.hook if isinstance(hook, EnclosedHook) else hook
        for binding in self.bindings:
            if binding.hook is own:
                label = self.component.label(binding.fqn)
                return f"{type(own).__qualname__}.{method}() of {self.technique.name} at {label!r}"
        return None

    def ask(self, module: nn.Module, hook: Hook, method: str) -> object:
        """Has one of the hooks do something to its module; an error says whose it is."""
        try:
            return getattr(hook, method)(module)
        except Exception as error:
            note_origin(error, self.origin_of(hook, method))
            raise

    def _is_prepared(self, hook: Hook) -> bool:
        return self._prepared.get(id(hook), False)

    # Done and noted in one statement, within which no interrupt can come but in the method itself.

    def _attach_one(self, module: nn.Module, hook: Hook) -> None:
        key = id(hook)
        if not self._prepared.get(key):
            _, self._prepared[key] = self.ask(module, hook, "attach"), True

    def _detach_one(self, module: nn.Module, hook: Hook) -> None:
        key = id(hook)
        if self._prepared.get(key):
            _, self._prepared[key] = self.ask(module, hook, "detach"), False

    def _progress(self, items: list[tuple[nn.Module, Hook]], verb: str) -> Iterable[tuple[nn.Module, Hook]]:
        if not self.prepares:
            return ()
        return tqdm(items, f"{verb} {self.technique.name}", delay=_SECONDS_BEFORE_PROGRESS, leave=False)

    def losses(self) -> list[tuple[str, str]]:
        """What detaching could not give back exactly: module FQN and phrase."""
        return [
            (self.component.label(binding.fqn), loss)
            for _, binding in self.overriding("loss_on_detach")
            if (loss := ask_loss(self.technique, binding, self.component)) is not None
        ]


_LIVE: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attached_anywhere() -> list[Attachment]:
    """All that is attached in this process, in the order in which it was."""
    with CHANGING:
        return sorted((item for item in _LIVE if item.attached), key=lambda item: item.number)


class HookRegistry:
    """All that is attached to some components, or to modules that share something with these.

    It is found, not kept: the stacks on the modules keep the attachments alive, and nothing has to be
    told when a model goes away.

    Args:
        components: The components.
        joint: Whether to find what was bound jointly with any of it, too.
    """

    def __init__(self, components: Iterable[Component], *, joint: bool = False) -> None:
        rest = attached_anywhere()
        reached = list(components)
        found: list[Attachment] = []
        joints: set[object] = set()
        while reached:
            near = reached.pop()
            for item in list(rest):
                if item.joint in joints or share_modules(near, item.component):
                    rest.remove(item)
                    found.append(item)
                    reached.append(item.component)
                    if joint and item.joint is not None:
                        joints.add(item.joint)
        self._found = sorted(found, key=lambda item: item.number)

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """What is attached; where two meet on a module, the outer one comes first."""
        return tuple(ordered(self._found))

    def attach(self, steps: Sequence[PlanStep]) -> tuple[Attachment, ...]:
        """Puts the hooks of several steps on their modules, or none of them.

        Raises:
            ConcurrentCallError: A call is under way on these modules.
            BaseException: Whatever a hook's `attach` raised, after everything was undone.
        """
        new = tuple(Attachment(step) for step in steps)
        _in_quiet(self._found, partial(self._change_to, [*self._found, *new]))
        return new

    def detach(self, attachments: Collection[Attachment], *, force: bool = False) -> list[str]:
        """Takes hooks off, all or none; what has been taken off before is passed over.

        Args:
            attachments: Whose hooks.
            force: Give up on those hooks that fail in it, and take off all others.

        Returns:
            The errors of the hooks that were given up, in words.

        Raises:
            ConcurrentCallError: A call is under way on these modules.
            BaseException: Whatever a hook's `detach` raised, after everything was undone.
        """
        leaving = [item for item in self._found if item in attachments]
        try:
            for item in leaving:
                item.given_up = [] if force else None
            after = [item for item in self._found if item not in leaving]
            _in_quiet(self._found, partial(self._change_to, after))
            return [error for item in leaving for error in item.given_up or ()]
        finally:
            for item in leaving:
                item.given_up = None

    def reset(self, attachments: Collection[Attachment]) -> None:
        """Has hooks forget what they learned from earlier calls.

        Raises:
            ConcurrentCallError: A call is under way on these modules.
        """
        _in_quiet(self._found, partial(_reset, attachments))

    def replan(self) -> bool:
        """Binds those techniques anew that ask for it, to their components as they are now.

        What was bound jointly with them, and is not bound anew now, is when it is called next.

        Returns:
            Whether it was done; False while a call is under way.

        Raises:
            PlanError: The techniques do not fit any more; all are as before.
        """
        if any(item.lock.is_taken for item in self._found):
            return False
        rebind = [item for item in self._found if item.technique.replans]
        _in_quiet(self._found, partial(self._change_to, self._found, rebind=rebind))
        for item in self._bound_with(rebind):
            if item.structure is not None:
                item.structure.mark_changed()
        return True

    def _bound_with(self, items: Sequence[Attachment]) -> list[Attachment]:
        """Finds what was bound jointly with these, directly or through others, beyond what this has found."""
        known = HookRegistry([item.component for item in items], joint=True)._found if items else []
        return [item for item in known if item not in self._found]

    def _change_to(self, after: Sequence[Attachment], *, rebind: Sequence[Attachment] = ()) -> None:
        """The one way in which anything changes; binds anew what other enclosing calls make necessary."""
        replanning = [item for item in after if item.technique.replans]
        others: list[Attachment] = []
        if any(item.component.wholes != wholes_of(item.component, after) for item in replanning):
            rebind = [item for item in replanning if item in self._found]
            others = self._bound_with(rebind)
        rebind = [*rebind, *(item for item in others if item.technique.replans)]
        self._found = sorted([*self._found, *others], key=lambda item: item.number)
        _in_quiet(others, partial(self._commit, [*after, *others], rebind))

    def _commit(self, after: Sequence[Attachment], rebind: Sequence[Attachment]) -> None:
        """Takes hooks off from outside in and puts them on from inside out, or undoes all of it."""
        before = self._found
        everyone = {*before, *after}
        hooked = _hooked_entries(before)
        undo = _Undo()
        try:
            _move(before, after, rebind, undo)
            self._stand(after, everyone, hooked)
            for item in before:
                if item not in after:
                    item.finish()  # at last, as this is not undone
        except BaseException as error:
            hooked |= _hooked_entries(everyone)
            undo.run(error)
            for item in before:
                if not item.intact:
                    error.add_note(
                        f"hookcore: {item.technique.name} could not be put back and has been removed"
                    )
                    with suppress(Exception):
                        item.take_off(_Undo())
            self._stand([item for item in before if item.intact], everyone, hooked)
            raise

    def _stand(
        self, items: Sequence[Attachment], everyone: Iterable[Attachment], hooked: Iterable[Key]
    ) -> None:
        """Has calls go through the hooks of these attachments, and of no other.

        Args:
            items: The attachments.
            everyone: These, and those that stand no more.
            hooked: The entries that had hooks.
        """
        _share_locks(items)
        _set_stacks(hooked, ordered(items))
        _LIVE.update(items)
        for item in everyone:
            item.attached = item in items
        self._found = list(items)


def _move(
    before: Sequence[Attachment], after: Sequence[Attachment], rebind: Sequence[Attachment], undo: _Undo
) -> None:
    """Detaches, binds anew and attaches what has to be; what stands inside of all that stays on."""
    old = [item for item in reversed(ordered(before)) if item.prepares]
    # What is bound anew may have had nothing to prepare, and have it then.
    new = [item for item in reversed(ordered(after)) if item.prepares or item in rebind]
    stays = 0
    while stays < min(len(old), len(new)) and old[stays] is new[stays] and old[stays] not in rebind:
        stays += 1
    for item in reversed(old[stays:]):
        item.take_off(undo)
    _rebind(rebind, after, undo)
    for item in new[stays:]:
        item.put_on(undo)
    for item in after:
        if item.technique.replans and (item in rebind or item not in before):
            item.structure = Structure(item.component.module)


def _in_quiet(attachments: Sequence[Attachment], change: Callable[[], None]) -> None:
    """Makes a change while no call goes through the hooks of these attachments.

    Raises:
        ConcurrentCallError: One does now.
    """
    turn = Turn(get_ident())
    with CHANGING:
        try:
            for item in {item.lock: item for item in attachments}.values():
                if not item.lock.take(turn):  # for a call of another thread, or of this one
                    raise ConcurrentCallError(
                        f"cannot apply, remove or reset techniques on {item.component.label('')!r} during "
                        "one of its calls. Do it after the call has returned"
                    )
            change()
        finally:
            turn.thread = None


def _reset(attachments: Collection[Attachment]) -> None:
    for item in attachments:
        for module, binding in item.overriding("reset"):
            item.ask(module, binding.hook, "reset")


class _Undo:
    """How to undo what is being done. Each step is told before it is done, and undone only if it was."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def then(self, step: Callable[[], None]) -> None:
        """Remembers how to undo what is done next."""
        self._steps.append(step)

    def run(self, error: BaseException) -> None:
        """Undoes all steps in reverse; a failure in that becomes a note on the error that is the reason."""
        for step in reversed(self._steps):
            try:
                step()
            except Exception as another:  # noqa: BLE001 - the first error is the one to report
                error.add_note(f"hookcore: undoing failed in part: {describe_error(another)}")


def _rebind(items: Sequence[Attachment], after: Sequence[Attachment], undo: _Undo) -> None:
    """Has the techniques of these attachments bind to their components as they are now."""
    joined: dict[object, list[Attachment]] = {}
    for item in items:
        joined.setdefault(item if item.joint is None else item.joint, []).append(item)
    step_of: dict[Attachment, PlanStep] = {}
    for together in joined.values():
        components = [item.component.afresh() for item in together]
        seen = [component.afresh(wholes_of(component, after)) for component in components]
        steps = make_joint_steps([(it.technique, on) for it, on in zip(together, seen, strict=True)])
        step_of |= zip(together, steps, strict=True)
    steps = [step_of[item] for item in items]
    check_hooks_are_new(steps, [item for item in attached_anywhere() if item not in items])
    check_conflicts(steps, [item for item in after if item not in items])
    for step in with_storage(steps):
        _ = step.needs  # raises if a budget is too small for it
    for item, step in zip(items, steps, strict=True):
        undo.then(partial(item.take, item.component, item.bindings, item.skipped))
        item.take(step.component, step.bindings, step.skipped)


def _entries(item: Attachment) -> list[Key]:
    """The entries through which users call an attachment's component."""
    root = item.component.module
    return [
        (root, entry) for entry in item.component.conventions.entries if callable(getattr(root, entry, None))
    ]


def _hooked_entries(items: Iterable[Attachment]) -> set[Key]:
    return {key for item in items for key in (*item.hooks_at, *_entries(item))}


def _techniques_on(module: nn.Module) -> list[str]:
    return [item.technique.name for item in attached_anywhere() if item.component.module is module]


def _share_locks(attachments: Iterable[Attachment]) -> None:
    """Gives attachments that share modules, directly or through others, one lock."""
    groups: list[list[Attachment]] = []
    for item in attachments:
        near = [group for group in groups if any(share_modules(item.component, it.component) for it in group)]
        groups = [group for group in groups if group not in near]
        groups.append([item, *itertools.chain.from_iterable(near)])
    for group in groups:
        lock = CallLock()
        for item in group:
            item.lock = lock


def _set_stacks(hooked: Iterable[Key], attachments: Sequence[Attachment]) -> None:
    """Gives all entries the hooks that the attachments, outermost first, have for them.

    Those at modules that an outer call encloses stand at that call.

    Args:
        hooked: The entries that had hooks; what no attachment hooks any more is given back.
        attachments: What is attached now.
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
    for key, outermost, items in _for_whole_components(attachments, enclosing, inner_hooks.keys()):
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
) -> Iterator[tuple[Key, Hook, list[Attachment]]]:
    """Hooks that look what has become of components, at the calls by users, and for what attachments.

    Args:
        attachments: What is attached.
        enclosing: What `enclosing_calls` found.
        parts: Entries at which users may call a part of a component by itself.
    """
    replanning = [item for item in attachments if item.technique.replans]
    called = _called_by_users(replanning, enclosing)
    for item in replanning:
        for key in parts & item.hooks_at.keys() - called.keys():
            called[key] = [item]
    for key, items in called.items():
        structures = tuple(item.structure for item in items if item.structure is not None)
        yield key, ReplanHook(key[1], structures, partial(_replan, items[0].component)), items
    for key, items in _called_by_users(attachments, enclosing).items():
        if names := dict.fromkeys(it for item in items if (it := item.component.target.attributes)):
            yield key, ReplacedHook(names, _techniques_on), items


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


def _replan(component: Component) -> bool:
    with CHANGING:
        # Within a call of another component, those are bound jointly again after it; until then they may take
        # their memory twice.
        return HookRegistry([component], joint=True).replan() or HookRegistry([component]).replan()
