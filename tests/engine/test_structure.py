"""Techniques are bound anew when a model's structure changes, once, and nothing looks when it does not."""

import gc
import threading
from typing import ClassVar

import pytest
import torch
from attrs import field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from techniques import Moving, PushingHook, Recording
from torch import nn

import hookcore
from hookcore import Binding, Hook, Phase, PlanError, Technique, structure
from hookcore.registry import HookRegistry


@frozen
class Following(Technique):
    """Binds every Linear, and remembers what it was asked to bind."""

    name: ClassVar[str] = "following"
    phase: ClassVar[Phase] = Phase.PLACE
    replans: ClassVar[bool] = True

    bound: list = field(factory=list, eq=False)
    refuses: list = field(factory=list, eq=False)

    def bind(self, component):
        linears = [fqn for fqn, module in component.modules.items() if isinstance(module, nn.Linear)]
        self.bound.append(linears)
        if self.refuses:
            raise PlanError("no room for that")
        for fqn in linears:
            yield Binding(fqn, PushingHook(self.name))


@frozen
class Staying(Following):
    """Likewise, but never anew."""

    name: ClassVar[str] = "staying"
    replans: ClassVar[bool] = False


X = torch.ones(1, 2)


def build():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))


def replace_parameter(model):
    model[0].weight = nn.Parameter(torch.zeros(2, 2))


def add_parameter(model):
    model[1].register_parameter("extra", nn.Parameter(torch.zeros(2)))


def delete_and_set(model):
    del model[1][0]
    model[1].append(nn.Linear(2, 2))


CHANGES = {
    "replace_parameter": replace_parameter,
    "add_parameter": add_parameter,
    "delete_and_set": delete_and_set,
    "set_parameter": lambda model: setattr(model[0], "bias", nn.Parameter(torch.ones(2))),
    "add_module": lambda model: model[1].add_module("lora", nn.Linear(2, 2)),
    "append": lambda model: model.append(nn.Linear(2, 2)),
    "replace_module": lambda model: setattr(model[1], "0", nn.Linear(2, 2)),
    "assign": lambda model: model.load_state_dict(
        {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}, assign=True
    ),
    "delete parameter": lambda model: (delattr(model[0], "bias"), model[0].register_parameter("bias", None),
                                       model.add_module("other", nn.Identity())),
}  # fmt: skip

NOT_CHANGES = {
    "nothing": lambda model: None,
    "a change elsewhere": lambda model: build(),
    "the same parameter again": lambda model: setattr(model[0], "weight", model[0].weight),
    "the same module again": lambda model: setattr(model[1], "0", model[1][0]),
    "load": lambda model: model.load_state_dict(model.state_dict()),
    "edit": lambda model: model[0].weight.data.add_(1),
    "cast": lambda model: model.double().float(),
    "buffer": lambda model: model.register_buffer("b", torch.zeros(1)),
}


def linears(model):
    return [fqn for fqn, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("keep_handle", [False, True])
def test_a_change_is_seen_by_the_next_call_once(change, keep_handle):
    model, technique, other = build(), Following(), Staying()
    applied = hookcore.apply(model, [technique, Recording()])
    hookcore.apply(model, [other])
    if not keep_handle:
        del applied
        gc.collect()
    model(X)
    assert len(technique.bound) == 1
    change(model)
    model(X)
    assert technique.bound[1:] == [linears(model)]
    for _ in range(3):
        model(X)
    assert len(technique.bound) == 2
    assert len(other.bound) == 1
    for module in model.modules():
        expected = isinstance(module, nn.Linear)
        assert (vars(module).get("_pile") or []).count("following") == expected
    hookcore.remove(model)
    assert not any(set(vars(module)) & {"_pile", "forward"} for module in model.modules())


class Numbered(Hook):
    """Notes its number when it runs."""

    def __init__(self, number, ran):
        self.number, self.ran = number, ran

    def pre_forward(self, module, args, kwargs):
        self.ran.append(self.number)


@frozen
class Renewed(Following):
    """Binds a hook at the root, each time with another number."""

    ran: list = field(factory=list, eq=False)

    def bind(self, component):
        self.bound.append(component)
        yield Binding("", Numbered(len(self.bound), self.ran))


def test_the_call_that_sees_a_change_goes_through_the_new_hooks_only():
    model, technique = build(), Renewed()
    hookcore.apply(model, [technique])
    model(X)
    replace_parameter(model)
    model(X)
    model(X)
    assert technique.ran == [1, 2, 2]


@pytest.mark.parametrize("change", NOT_CHANGES.values(), ids=NOT_CHANGES.keys())
def test_what_is_no_change_of_structure_binds_nothing_anew(change):
    model, technique = build(), Following()
    hookcore.apply(model, [technique])
    for _ in range(2):
        change(model)
        model(X)
    assert len(technique.bound) == 1


def test_nothing_is_walked_while_nothing_has_changed(monkeypatch):
    model = build()
    hookcore.apply(model, [Following()])
    walks, parts = [], structure._parts
    monkeypatch.setattr(structure, "_parts", lambda module: (walks.append(1), parts(module))[1])
    for _ in range(3):
        model(X)
    assert walks == []
    nn.Linear(1, 1)  # elsewhere
    for _ in range(3):
        model(X)
    assert walks == []
    model[0].extra = nn.Parameter(torch.zeros(1))
    del model[0].extra  # here, though nothing has changed: looked at once, then known
    for _ in range(3):
        model(X)
    assert walks == [1]


def test_techniques_that_do_not_ask_for_it_are_not_bound_anew_and_cost_nothing():
    model = build()
    hookcore.apply(model, [Staying()])
    model.append(nn.Linear(2, 2))
    model(X)
    assert "forward" not in vars(model)
    hookcore.remove(model)


def test_a_technique_that_found_nothing_at_first_prepares_what_comes():
    model = nn.Sequential(nn.Identity())
    hookcore.apply(model, [Following()])
    gc.collect()  # nothing but the hook that looks for changes keeps the technique
    model.append(nn.Linear(2, 2))
    model(X)
    assert model[1]._pile == ["following"]
    del model[1]
    model.append(nn.Identity())
    model(X)
    assert hookcore.status(model).techniques == ("following",)
    hookcore.remove(model)
    assert "forward" not in vars(model)


def test_a_failing_replan_leaves_all_as_before_and_is_tried_again():
    model, technique = build(), Following()
    hookcore.apply(model, [technique, Recording()])
    before = prepared(model)
    model.append(nn.Linear(2, 2))
    technique.refuses.append(True)
    for _ in range(2):
        with pytest.raises(PlanError, match="^no room for that$"):
            model(X)
        after = prepared(model)
        assert after.pop("2") == ([], [])
        # The hook at the root that looks for changes is a new one; it looks for the same.
        assert after.pop("")[1][1:] == before[""][1][1:]
        assert after == {fqn: here for fqn, here in before.items() if fqn}
    del model[2]
    model(X)  # back to what is known
    model.append(nn.Linear(2, 2))
    technique.refuses.clear()
    model(X)
    assert model[2]._pile == ["following"]


def prepared(model):
    """What each module has been prepared for, and which hooks stand in its calls."""
    return {
        fqn: (list(vars(module).get("_pile", ())), [*getattr(vars(module).get("forward"), "hooks", ())])
        for fqn, module in model.named_modules()
    }


class FailingPush(PushingHook):
    fails: ClassVar[list] = []

    def attach(self, module):
        if self.fails and module in self.fails:
            raise RuntimeError("cannot prepare this one")
        super().attach(module)


@frozen
class Fragile(Following):
    name: ClassVar[str] = "fragile"

    def bind(self, component):
        for fqn in linears(component.module):
            yield Binding(fqn, FailingPush("fragile"))


def test_a_replan_that_fails_while_attaching_puts_the_old_hooks_back():
    model = build()
    hookcore.apply(model, [Fragile()])
    model.append(nn.Linear(2, 2))
    before = prepared(model)
    FailingPush.fails[:] = [model[2]]
    try:
        with pytest.raises(RuntimeError, match="cannot prepare this one"):
            model(X)
    finally:
        FailingPush.fails.clear()
    assert model[0]._pile == model[1][0]._pile == ["fragile"]
    assert prepared(model)["0"] == before["0"]
    model(X)
    assert model[2]._pile == ["fragile"]
    hookcore.remove(model)


class Growing(nn.Module):
    """Adds a module in the middle of its first call."""

    def __init__(self):
        super().__init__()
        self.inner, self.grown = build(), False

    def forward(self, x):
        if not self.grown:
            self.grown = True
            self.inner.append(nn.Linear(2, 2))
        return self.inner(x)


def test_a_change_during_a_call_waits_for_the_next_one():
    """Also where the inner model has techniques of its own that would see it: weights are out then."""
    model, technique = Growing(), Following()
    hookcore.apply(model.inner, [technique])
    hookcore.apply(model, [Moving()])
    model(X)
    assert len(technique.bound) == 1
    model(X)
    assert len(technique.bound) == 1  # the inner model is always called within a call that moves weights
    model.inner(X)
    assert technique.bound[1:] == [["0", "1.0", "2"]]
    hookcore.remove(model)


def test_entries_beyond_forward_see_changes_too():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(2, 2)])

        def decode(self, x):
            return x

        forward = decode

    model, technique = Coder(), Following()
    opened = hookcore.Component(
        "", model, lambda _: hookcore.ModelConventions(entries=("forward", "decode", "no"))
    )
    from hookcore.plan import make_step

    registry = HookRegistry([opened])
    attached = registry.attach([make_step(technique, opened)])
    model.inner.append(nn.Linear(2, 2))
    model.decode(X)
    assert technique.bound[1:] == [["inner.0", "inner.1"]]
    HookRegistry([opened]).detach(attached)
    assert not {"forward", "decode"} & vars(model).keys()


@given(st.lists(st.sampled_from([*CHANGES, *NOT_CHANGES]), max_size=4), st.data())
@settings(max_examples=30)
def test_any_sequence_of_changes_and_calls_ends_in_the_hooks_of_the_last_structure(changes, data):
    model, technique = build(), Following()
    hookcore.apply(model, [technique])
    for name in changes:
        {**CHANGES, **NOT_CHANGES}[name](model)
        if data.draw(st.booleans()):
            model(X)
    model(X)
    assert technique.bound[-1] == linears(model)
    asked = len(technique.bound)
    assert asked <= len(changes) + 1
    model(X)
    assert len(technique.bound) == asked
    hookcore.remove(model)
    assert not any(set(vars(module)) & {"_pile", "forward"} for module in model.modules())


def test_two_threads_that_meet_a_change_bind_once():
    model, technique = build(), Following()
    hookcore.apply(model, [technique])
    model.append(nn.Linear(2, 2))
    threads = [threading.Thread(target=model, args=(X,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model[2]._pile == ["following"]
    hookcore.remove(model)


def test_a_change_is_not_forgotten_over_other_techniques_that_come_and_go_meanwhile():
    model, technique = build(), Following()
    hookcore.apply(model, [technique])
    model.append(nn.Linear(2, 2))
    hookcore.apply(model, [Recording()]).remove()
    with pytest.raises(PlanError):
        hookcore.apply(model, [Following(refuses=[True])])
    assert len(technique.bound) == 1
    model(X)
    assert technique.bound[1:] == [["0", "1.0", "2"]]
    hookcore.remove(model)
