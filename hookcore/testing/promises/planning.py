"""What a technique promises before anything is applied, and where it is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import assume, reject
from hypothesis import strategies as st

import hookcore
from hookcore.errors import ConflictError
from hookcore.technique import Binding, Skipped, Technique
from hookcore.testing.promises.base import REFUSALS, Promises, on_random_models
from hookcore.testing.promises.others import make_rival
from hookcore.testing.snapshot import ModelSnapshot
from hookcore.testing.twins import promise

if TYPE_CHECKING:
    from torch import nn

    from hookcore.target import Component


class PlanningPromises(Promises):
    """Options, plans and conflicts."""

    def test_options_are_a_value(self) -> None:
        """Equal options make equal techniques that can be hashed, shown, and not be changed."""
        technique = self.make()
        kind = type(technique)
        promise(isinstance(technique, Technique), f"make() gives a Technique, not a {kind.__qualname__}")
        promise(technique == self.make(), "make() gives equal techniques each time")
        promise(_hash(technique) == _hash(self.make()), "equal techniques have one hash")

    @on_random_models
    def test_planning_touches_nothing(self, data: st.DataObject) -> None:
        """`plan` leaves every object and every bit of the model alone."""
        model = self.build(self.draw(data)).to(self.home)
        before = ModelSnapshot.take(model)
        try:
            hookcore.plan(model, [self.make()])
        except REFUSALS as refusal:
            self.pass_over(model, before, refusal)
        before.assert_restored(model, same_storage=True)
        promise(not hookcore.status(model).attachments, "plan() attaches nothing")

    @on_random_models
    def test_binding_is_repeatable(self, data: st.DataObject) -> None:
        """`bind` gives the same bindings each time, with new hooks."""
        model = self.build(self.draw(data)).to(self.home)
        technique = self.make()
        (component,) = hookcore.status(model).components
        first, second = (_bound(technique, component) for _ in range(2))
        promise(
            [_essence(item) for item in first] == [_essence(item) for item in second],
            "bind() gives the same each time for one component",
        )
        hooks = [item.hook for item in first + second if isinstance(item, Binding)]
        promise(len(set(map(id, hooks))) == len(hooks), "bind() makes a new hook for each binding, each time")

    @on_random_models
    def test_applying_twice_is_refused(self, data: st.DataObject) -> None:
        """The second time is a ConflictError that leaves the model as it is."""
        case, model, bare, applied = self.draw_applied(data)
        assume(any(step.bindings for step in applied.plan.steps))
        _refused(model, self.make(), "applying twice is a ConflictError")
        self.call_both(case, model, bare)

    @on_random_models
    def test_conflicts_leave_the_model_alone(self, data: st.DataObject) -> None:
        """What cannot live with this technique is refused beside it, and it beside that; nothing changes."""
        case, model, bare = self.draw_pair(data)
        before = ModelSnapshot.take(model, twin=bare)
        technique = self.make()
        rival = make_rival(technique, model, claims=data.draw(st.booleans(), label="claims the same"))
        if rival is None:
            reject()
        applied = self.apply(model, technique)
        _refused(model, rival, "a technique that cannot live with it is refused")
        self.call_both(case, model, bare)
        self.remove(applied, model)
        with hookcore.apply(model, [rival]):
            _refused(model, technique, "it is refused beside a technique that cannot live with it")
            if self.home == self.device:
                self.call_both(case, model, bare)
        self.is_restored(before, model)


def _refused(model: nn.Module, technique: Technique, what: str) -> None:
    before = ModelSnapshot.take(model)
    try:
        hookcore.apply(model, [technique])
    except ConflictError:
        before.assert_restored(model, same_storage=True)
    else:
        promise(False, what)


def _hash(technique: Technique) -> int:
    try:
        return hash(technique)
    except TypeError as error:
        raise AssertionError(f"broken promise: techniques can be hashed: {error}") from error


def _bound(technique: Technique, component: Component) -> list[Binding | Skipped]:
    before = ModelSnapshot.take(component.module)
    try:
        items = list(technique.bind(component))
    except REFUSALS:
        before.assert_restored(component.module, same_storage=True)
        reject()
    before.assert_restored(component.module, same_storage=True)
    return items


def _essence(item: Binding | Skipped) -> tuple[object, ...]:
    """Return what a binding is, without its hook."""
    if isinstance(item, Skipped):
        return "skipped", item.fqn, item.reason
    return item.fqn, item.entry, item.claims, item.forbids_below, type(item.hook)
