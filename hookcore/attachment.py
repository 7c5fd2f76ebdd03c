"""One technique on one component: attaching and detaching its hooks, with a way back."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

from tqdm import tqdm

from hookcore.answers import ask_loss
from hookcore.enclosed import EnclosedHook
from hookcore.errors import describe_error, note_origin
from hookcore.guard import CallLock
from hookcore.hook import overrides
from hookcore.memory.true_values import TrueValue
from hookcore.technique import Resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from hookcore.hook import Hook
    from hookcore.plan import PlanStep
    from hookcore.structure import Structure
    from hookcore.target import Component
    from hookcore.technique import Binding, Skipped, Technique

    Key = tuple[nn.Module, str]  # an entry of a module

_NUMBERS = itertools.count()
_SECONDS_BEFORE_PROGRESS = 2.0


class Undo:
    """How to undo what is being done. Each step is told before it is done, and undone only if it was."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def then(self, step: Callable[[], None]) -> None:
        """Remember how to undo what is done next."""
        self._steps.append(step)

    def run(self, error: BaseException) -> None:
        """Undo all steps in reverse; a failure in that becomes a note on the error that is the reason."""
        for step in reversed(self._steps):
            try:
                step()
            except Exception as another:  # noqa: BLE001 - the first error is the one to report
                error.add_note(f"hookcore: undoing failed in part: {describe_error(another)}")


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
        """Replace the bindings, while none of them is attached."""
        self.component = component
        self.bindings = bindings
        self.skipped = skipped
        modules = component.modules
        self._bound = [(modules[binding.fqn], binding) for binding in bindings]
        self._kinds = {type(binding.hook) for binding in bindings}
        self._to_prepare = self.overriding("attach", "detach", "true_value")
        self._prepared: dict[int, bool] = {}  # by the hook's identity
        self._values = {
            id(binding.hook): [
                TrueValue(
                    binding.hook, module, component.slot_of[claim.tensor], component.conventions.entries
                )
                for claim in binding.claims
                if claim.resource == Resource.STORAGE_DTYPE and claim.tensor is not None
            ]
            for module, binding in self.overriding("true_value")
        }
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

    def put_on(self, undo: Undo) -> None:
        """Attach all hooks that are not."""
        waiting = [(at, item.hook) for at, item in self._to_prepare if not self._is_prepared(item.hook)]
        for module, hook in self._progress(waiting, "applying"):
            undo.then(partial(self._detach_one, module, hook))
            self._attach_one(module, hook)

    def take_off(self, undo: Undo) -> None:
        """Detach all hooks that are attached, in reverse."""
        there = [(at, item.hook) for at, item in reversed(self._to_prepare) if self._is_prepared(item.hook)]
        for module, hook in self._progress(there, "removing"):
            undo.then(partial(self._attach_one, module, hook))
            if not self._undoes(partial(self._detach_one, module, hook)):
                undo.then(partial(self._prepared.__setitem__, id(hook), True))
                self._prepared[id(hook)] = False
                self._end_values(hook)

    def finish(self) -> None:
        """Do what hooks have left to do when they are gone for good."""
        for module, binding in self.overriding("after_removal"):
            self._undoes(partial(self.ask, module, binding.hook, "after_removal"))

    def _undoes(self, step: Callable[[], object]) -> bool:
        """Detach a hook; return False if it failed and is given up."""
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
        """Call a method of a hook with its module; an error names technique, method and module."""
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
            for value in self._values.get(key, ()):
                value.begin()
            _, self._prepared[key] = self.ask(module, hook, "attach"), True

    def _detach_one(self, module: nn.Module, hook: Hook) -> None:
        key = id(hook)
        if self._prepared.get(key):
            _, self._prepared[key] = self.ask(module, hook, "detach"), False
        self._end_values(hook)

    def _end_values(self, hook: Hook) -> None:
        for value in self._values.get(id(hook), ()):
            value.end()

    def _progress(self, items: list[tuple[nn.Module, Hook]], verb: str) -> Iterable[tuple[nn.Module, Hook]]:
        if not self.prepares:
            return ()
        return tqdm(items, f"{verb} {self.technique.name}", delay=_SECONDS_BEFORE_PROGRESS, leave=False)

    def losses(self) -> list[tuple[str, str]]:
        """Return what detaching could not give back exactly: module FQN and phrase."""
        return [
            (self.component.label(binding.fqn), loss)
            for _, binding in self.overriding("loss_on_detach")
            if (loss := ask_loss(self.technique, binding, self.component)) is not None
        ]
