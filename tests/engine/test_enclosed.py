"""Calls that run the modules below as one: what stands there then, with techniques that write it down."""

from typing import ClassVar

import pytest
import torch
from attrs import field, frozen
from torch import nn

import hookcore
from hookcore import Binding, ConflictError, Hook, Phase, Technique, bare_entry
from hookcore.memory import leaf_units
from hookcore.registry import HookRegistry
from hookcore.testing.snapshot import ModelSnapshot


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.block(x))


class WholeHook(Hook):
    def __init__(self, log):
        self.log = log

    def pre_forward(self, module, args, kwargs):
        self.log.append("whole")

    def substitute(self, module, entry):
        def run(*args):
            self.log.append("in place")
            return entry(*args)

        return run


@frozen
class Whole(Technique):
    name: ClassVar[str] = "whole"
    phase: ClassVar[Phase] = Phase.COMPUTE
    encloses: ClassVar[bool] = True

    log: list = field(eq=False)
    at: str = "block"

    def bind(self, component):
        yield Binding(self.at, WholeHook(self.log), encloses=True)


class BringHook(Hook):
    swaps_weights = True
    only_brings_weights = True

    def __init__(self, log, fqn):
        self.log = log
        self.fqn = fqn

    def pre_forward(self, module, args, kwargs):
        self.log.append(f"bring {self.fqn}:{type(module).__name__}")

    def post_forward(self, module, output):
        self.log.append(f"drop {self.fqn}:{type(module).__name__}")

    def on_error(self, module, error):
        self.log.append(f"error {self.fqn}:{type(module).__name__}")


@frozen
class Bring(Technique):
    name: ClassVar[str] = "bring"
    phase: ClassVar[Phase] = Phase.PLACE
    replans: ClassVar[bool] = True

    log: list = field(eq=False)
    by_units: bool = True

    def bind(self, component):
        units = [unit for (unit,) in leaf_units(component)] if self.by_units else ["block.0", "head"]
        for fqn in units:
            yield Binding(fqn, BringHook(self.log, fqn))


X = torch.ones(1, 2)


@pytest.mark.parametrize("whole_first", [True, False])
def test_hooks_that_bring_weights_do_so_around_the_whole_call(whole_first):
    model, log = Model(), []
    before = ModelSnapshot.take(model)
    techniques = [Whole(log), Bring(log, by_units=False)]
    for technique in techniques if whole_first else reversed(techniques):
        hookcore.apply(model, [technique])
    model(X)
    block = ["bring block.0:Linear", "whole", "in place", "drop block.0:Linear"]
    assert log == [*block, "bring head:Linear", "drop head:Linear"]
    assert "forward" not in vars(model.block[0])
    log.clear()
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 3))
    assert log == ["bring block.0:Linear", "whole", "in place", "error block.0:Linear"]
    (whole,) = (it for it in hookcore.status(model).attachments if it.technique.name == "whole")
    HookRegistry([whole.component]).detach([whole])
    log.clear()
    model(X)
    assert log == ["bring block.0:Linear", "drop block.0:Linear", "bring head:Linear", "drop head:Linear"]
    hookcore.remove(model)
    before.assert_restored(model, same_storage=True)


def test_what_a_whole_call_needs_is_one_unit():
    model, log = Model(), []
    hookcore.apply(model, [Bring(log), Whole(log)])
    model(X)
    block = ["bring block:Sequential", "whole", "in place", "drop block:Sequential"]
    assert log == [*block, "bring head:Linear", "drop head:Linear"]


def test_what_a_whole_call_needs_is_one_unit_wherever_that_module_goes():
    model, log = Model(), []
    hookcore.apply(model, [Bring(log), Whole(log)])
    model.block = nn.Sequential(model.block)
    model(X)
    block = ["bring block.0:Sequential", "whole", "in place", "drop block.0:Sequential"]
    assert log == [*block, "bring head:Linear", "drop head:Linear"]


def test_a_failure_to_bind_anew_leaves_everything_as_it_was():
    @frozen
    class Failing(Bring):
        name = "failing"

        def bind(self, component):
            if component.wholes:
                raise hookcore.PlanError("not as a whole")
            return super().bind(component)

    model, log = Model(), []
    hookcore.apply(model, [Failing(log)])
    before = ModelSnapshot.take(model)
    with pytest.raises(hookcore.PlanError, match="not as a whole"):
        hookcore.apply(model, [Whole(log)])
    before.assert_restored(model, same_storage=True)
    model(X)
    assert log[0] == "bring block.0:Linear"


def test_replanning_below_a_whole_call_stands_outside_of_it():
    model, log = Model(), []
    hookcore.apply(model.block, [Bring(log)])
    hookcore.apply(model, [Whole(log, "")])
    assert "forward" not in vars(model.block)
    model.block[0] = nn.Linear(2, 2)
    model(X)
    assert log == ["bring 0:Linear", "whole", "in place", "drop 0:Linear"]


def test_a_hook_that_does_more_is_refused_below_and_called_at_the_whole_call():
    @frozen
    class Seeing(Bring):
        name = "seeing"

        def bind(self, component):
            yield Binding("block.0", type("SeeingHook", (Hook,), {"pre_forward": lambda *_: None})())

    model, log = Model(), []
    with pytest.raises(ConflictError, match="whole runs all that is in 'block' as one") as caught:
        hookcore.apply(model, [Whole(log), Seeing(log)])
    assert (caught.value.first.technique, caught.value.second.technique) == ("whole", "seeing")
    hookcore.apply(model, [Whole(log, "block.0"), Seeing(log)])


def test_what_stands_in_for_an_entry_is_inside_of_all_hooks_whatever_the_order():
    model, log = Model(), []
    hookcore.apply(model, [Whole(log, "head")])
    entry = bare_entry(model.head, "forward")
    assert entry == nn.Linear.forward.__get__(model.head)
    hookcore.apply(model, [Bring(log)])
    model.head(X)
    assert log == ["bring head:Linear", "whole", "in place", "drop head:Linear"]
    assert bare_entry(model.block, "forward") == model.block.forward


class InsideHook(Hook):
    """Does at a call that encloses its module, or that is its own, what it cannot do here."""

    def __init__(self, log):
        self.log = log

    def pre_forward(self, module, args, kwargs):
        self.log.append("own call")

    def outside(self, module):
        return OutsideHook(self.log, module)


class OutsideHook(Hook):
    def __init__(self, log, module):
        self.log = log
        self.module = module

    def pre_forward(self, module, args, kwargs):
        self.log.append(f"outside {type(module).__name__} for {type(self.module).__name__}")

    def substitute(self, module, entry):
        def run(*args):
            self.log.append("inside of all")
            return entry(*args)

        return run if module is self.module else entry


@frozen
class Inside(Technique):
    name: ClassVar[str] = "inside"
    phase: ClassVar[Phase] = Phase.COMPUTE
    after: ClassVar[tuple[str, ...]] = ("whole",)

    log: list = field(eq=False)

    def bind(self, component):
        yield Binding("block.0", InsideHook(self.log))


@pytest.mark.parametrize("whole_first", [True, False])
@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("block", ["whole", "outside Sequential for Linear", "in place"]),
        ("block.0", ["whole", "outside Linear for Linear", "in place", "inside of all"]),
        ("head", ["own call", "whole", "in place"]),
    ],
)
def test_a_hook_gives_the_one_that_stands_for_it_outside(whole_first, at, expected):
    model, log = Model(), []
    before = ModelSnapshot.take(model)
    techniques = [Whole(log, at), Inside(log)]
    handles = {}
    for technique in techniques if whole_first else reversed(techniques):
        handles[technique.name] = hookcore.apply(model, [technique])
    model(X)
    assert log == expected
    handles["whole"].remove()
    log.clear()
    model(X)
    assert log == ["own call"]
    hookcore.remove(model)
    before.assert_restored(model)
