"""What is attached to the modules of this process: attaching, detaching and undoing, all or nothing."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from contextlib import suppress
from functools import partial, wraps
from threading import get_ident
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hookcore.attachment import Attachment, Undo
from hookcore.conflicts import check_conflicts, check_hooks_are_new
from hookcore.enclosed import wholes_of
from hookcore.errors import ConcurrentCallError
from hookcore.guard import CallLock, Turn
from hookcore.placed import share_modules
from hookcore.plan import make_joint_steps, ordered, with_storage
from hookcore.stacking import hooked_entries, set_stacks
from hookcore.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from torch import nn

    from hookcore.plan import PlanStep
    from hookcore.target import Component

    Key = tuple[nn.Module, str]  # an entry of a module

P = ParamSpec("P")
T = TypeVar("T")

CHANGING = threading.RLock()
"""Held from looking at what is attached until it is changed, so that no other thread changes it between."""


def without_collecting(change: Callable[P, T]) -> Callable[P, T]:
    """Make a change while Python collects no garbage.

    Among the thousands of objects that hooks are made of it would look again and again, for more than half of
    the time that the change takes.
    """

    @wraps(change)
    def changing(*args: P.args, **kwargs: P.kwargs) -> T:
        collects = gc.isenabled()
        try:
            gc.disable()
            return change(*args, **kwargs)
        finally:
            if collects:
                gc.enable()

    return changing


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
        """Put the hooks of several steps on their modules, or none of them.

        Raises:
            ConcurrentCallError: A call is under way on these modules.
            BaseException: Whatever a hook's `attach` raised, after everything was undone.
        """
        new = tuple(Attachment(step) for step in steps)
        _in_quiet(self._found, partial(self._change_to, [*self._found, *new]))
        return new

    def detach(self, attachments: Collection[Attachment], *, force: bool = False) -> list[str]:
        """Take hooks off, all or none; what has been taken off before is passed over.

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
        """Reset what hooks learned from earlier calls.

        Raises:
            ConcurrentCallError: A call is under way on these modules.
        """
        _in_quiet(self._found, partial(_reset, attachments))

    def replan(self) -> bool:
        """Bind those techniques anew that ask for it, to their components as they are now.

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
        """Find what was bound jointly with these, directly or through others, beyond what this has found."""
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
        """Take hooks off from outside in and put them on from inside out, or undo all of it."""
        before = self._found
        everyone = {*before, *after}
        hooked = hooked_entries(before)
        undo = Undo()
        try:
            _move(before, after, rebind, undo)
            self._stand(after, everyone, hooked)
            for item in before:
                if item not in after:
                    item.finish()  # at last, as this is not undone
        except BaseException as error:
            hooked |= hooked_entries(everyone)
            undo.run(error)
            for item in before:
                if not item.intact:
                    error.add_note(
                        f"hookcore: {item.technique.name} could not be put back and has been removed"
                    )
                    with suppress(Exception):
                        item.take_off(Undo())
            self._stand([item for item in before if item.intact], everyone, hooked)
            raise

    def _stand(
        self, items: Sequence[Attachment], everyone: Iterable[Attachment], hooked: Iterable[Key]
    ) -> None:
        """Route calls through the hooks of these attachments, and of no other.

        Args:
            items: The attachments.
            everyone: These, and those that stand no more.
            hooked: The entries that had hooks.
        """
        _share_locks(items)
        set_stacks(hooked, ordered(items), replan=_replan, techniques_on=_techniques_on)
        _LIVE.update(items)
        for item in everyone:
            item.attached = item in items
        self._found = list(items)


def _move(
    before: Sequence[Attachment], after: Sequence[Attachment], rebind: Sequence[Attachment], undo: Undo
) -> None:
    """Detach, bind anew and attach what has to be; what stands inside of all that stays on."""
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
    """Make a change while no call goes through the hooks of these attachments.

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


def _rebind(items: Sequence[Attachment], after: Sequence[Attachment], undo: Undo) -> None:
    """Bind the techniques of these attachments anew to their components."""
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


def _techniques_on(module: nn.Module) -> list[str]:
    return [item.technique.name for item in attached_anywhere() if item.component.module is module]


def _share_locks(attachments: Iterable[Attachment]) -> None:
    """Give attachments that share modules, directly or through others, one lock."""
    groups: list[list[Attachment]] = []
    for item in attachments:
        near = [group for group in groups if any(share_modules(item.component, it.component) for it in group)]
        groups = [group for group in groups if group not in near]
        groups.append([item, *itertools.chain.from_iterable(near)])
    for group in groups:
        lock = CallLock()
        for item in group:
            item.lock = lock


def _replan(component: Component) -> bool:
    with CHANGING:
        # Within a call of another component, those are bound jointly again after it; until then they may take
        # their memory twice.
        return HookRegistry([component], joint=True).replan() or HookRegistry([component]).replan()
