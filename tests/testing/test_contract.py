"""The contract kit finds what is wrong with broken techniques, and nothing with right ones."""

import random
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from attrs import field, frozen
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st
from techniques import Held, Moving, MovingHook, Recording, Scaling, SwallowsErrors

import hookcore
from hookcore import Binding, Hook, Phase, PlanError, Technique, UnsupportedModelError
from hookcore.stack import HookStack
from hookcore.testing import ModelCase, TechniqueContract, module_trees
from hookcore.testing.models import bert, cnn
from hookcore.testing.modules import Recipe, TreeModel, linear, sequential

PROMISES = [name for name in dir(TechniqueContract) if name.startswith("test_")]


def linears():
    """Models without a step in them, so that rounding stays small."""
    trees = st.sampled_from([Recipe(linear), Recipe(sequential, (Recipe(linear), Recipe(linear)))])
    return st.builds(ModelCase, st.builds(TreeModel, trees, width=st.just(4)), seed=st.integers(0, 9))


# Right ones


class TestRecording(TechniqueContract):
    def make(self):
        return Recording()


class TestMoving(TechniqueContract):
    def make(self):
        return Moving()

    def models(self):
        return st.one_of(module_trees(), st.builds(cnn), st.builds(bert))


class RoundingHook(Hook):
    """Weights are rounded when it is put on, and stay so."""

    def attach(self, module):
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.copy_(parameter.bfloat16().float())

    def loss_on_detach(self, module):
        return "weights were rounded to bfloat16"


@frozen
class Rounding(Technique):
    name: ClassVar[str] = "rounding"
    phase: ClassVar[Phase] = Phase.CAST

    def bind(self, component):
        for fqn, module in component.modules.items():
            if module._parameters:
                yield Binding(fqn, RoundingHook())


class TestRoundingThatSaysSo(TechniqueContract):
    tolerance = 0.05

    def make(self):
        return Rounding()

    def models(self):
        return linears()


@frozen
class Picky(Moving):
    """Refuses many models, and says so in time."""

    name: ClassVar[str] = "picky"

    def bind(self, component):
        if component.module.training:
            raise PlanError("is for inference")
        if not component.slots:
            raise UnsupportedModelError("no weights")
        return Moving.bind(self, component)


class TestPicky(TechniqueContract):
    def make(self):
        return Picky()

    def models(self):
        modes = st.builds(TreeModel, st.just(Recipe(linear)), width=st.just(2), training=st.booleans())
        return st.builds(ModelCase, modes)


# Broken ones: each breaks one promise, as real techniques have done


def broken(name: str, make_hook: Callable[..., Hook], *, phase=Phase.COMPUTE):
    """A technique with one hook on each module."""

    def bind(self, component):
        for fqn in component.modules:
            yield Binding(fqn, make_hook())

    return frozen(type(name, (Technique,), {"name": name, "phase": phase, "bind": bind}))()


class AddsOne(Hook):
    def post_forward(self, module, output):
        return output + 1


class WorksOnce(Hook):
    """Learns at the first call what is not true at the second."""

    def __init__(self):
        self.learned = None

    def around_forward(self, module, call, /, *args, **kwargs):
        if self.learned is None:
            self.learned = call(*args, **kwargs)
        return self.learned

    def reset(self, module):
        self.learned = None


class LeavesAnAttribute(Hook):
    def attach(self, module):
        vars(module)["_left"] = 1


class ReplacesParameters(Hook):
    """As torch's own swapping of parameters does, and diffusers' removal."""

    def attach(self, module):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.data, parameter.requires_grad)


class BreaksTies(Hook):
    def detach(self, module):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()


class ForgetsErrors(Hook):
    """Tidies up after calls that succeed."""

    def pre_forward(self, module, args, kwargs):
        vars(module).setdefault("_busy", True)

    def post_forward(self, module, output):
        vars(module).pop("_busy", None)


class ReplacesErrors(Hook):
    def around_forward(self, module, call, /, *args, **kwargs):
        try:
            return call(*args, **kwargs)
        except Exception as error:
            raise RuntimeError("something failed") from error


class LeavesMarksInCopies(Hook):
    def attach(self, module):
        vars(module)["_marked"] = True

    def detach(self, module):
        del module._marked


class ComputesWithTheOriginal(Hook):
    """Puts a closure over the module in its place, as chains of forwards do."""

    def attach(self, module):
        bound = module.forward
        vars(module)["forward"] = lambda *args, **kwargs: bound(*args, **kwargs)  # noqa: PLW0108

    def detach(self, module):
        del module.forward


class GoesAroundOthers(Hook):
    """Calls the class's forward and not what it is given."""

    def around_forward(self, module, call, /, *args, **kwargs):
        return type(module).forward(module, *args, **kwargs)


class ForgetsTooMuch(Hook):
    """Loses at `reset` what its calls need."""

    def __init__(self):
        self.offset = 0

    def post_forward(self, module, output):
        return output + self.offset if self.offset else None

    def reset(self, module):
        self.offset = 1


class RoundsInSilence(RoundingHook):
    loss_on_detach = Hook.loss_on_detach


class KeepsWhatItSaw(Hook):
    """Computes with the weights of when it was put on, whatever was loaded since."""

    def attach(self, module):
        self.kept = {
            name: tensor.detach().clone() for name, tensor in module._parameters.items() if tensor is not None
        }

    def pre_forward(self, module, args, kwargs):
        for name, tensor in self.kept.items():
            module._parameters[name].data.copy_(tensor)


class HalvesGradients(Hook):
    def post_forward(self, module, output):
        return output + (output.detach() - output) / 2 if output.requires_grad else None


class AddsABuffer(Hook):
    def attach(self, module):
        module.register_buffer("_scale", torch.ones(()))

    def detach(self, module):
        del module._scale


class KnowsItAgain(Hook):
    """Keeps track of modules outside of them, and is wrong about those that it sees again."""

    seen: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def attach(self, module):
        self.again = module in self.seen
        self.seen.add(module)

    def post_forward(self, module, output):
        return output + 1 if self.again else None


@frozen
class FollowsALearnedOrder(Technique):
    """Prepares what the first call showed, and not what is called."""

    name: ClassVar[str] = "follows"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def bind(self, component):
        learned = Learned()
        for fqn, module in component.modules.items():
            if module is not component.module:
                yield Binding(fqn, LearningHook(learned))
        yield Binding("", LearningRootHook(learned))


class Learned:
    def __init__(self):
        self.order, self.called = None, []


class LearningHook(Hook):
    def __init__(self, learned):
        self.learned = learned

    def post_forward(self, module, output):
        self.learned.called.append(module)
        order = self.learned.order
        at = len(self.learned.called)
        wrong = order and order[:at] != self.learned.called and isinstance(output, torch.Tensor)
        return output + 1 if wrong else None


class LearningRootHook(LearningHook):
    def post_forward(self, module, output):
        self.learned.order = self.learned.order or self.learned.called
        self.learned.called = []


@frozen
class WritesToOneFolder(Technique):
    """Names what it writes after FQNs, and believes what is there already."""

    name: ClassVar[str] = "writes"
    phase: ClassVar[Phase] = Phase.COMPUTE
    folder: dict = field(factory=dict, eq=False)

    def bind(self, component):
        for fqn in component.modules:
            yield Binding(fqn, ReadingHook(self.folder, fqn))


class ReadingHook(Hook):
    def __init__(self, folder, fqn):
        self.folder, self.fqn = folder, fqn

    def attach(self, module):
        for name, parameter in module.named_parameters(recurse=False):
            self.folder.setdefault((self.fqn, name), parameter.detach().clone())

    def pre_forward(self, module, args, kwargs):
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data.copy_(self.folder[self.fqn, name])


@frozen
class TouchesBesideOthers(Technique):
    name: ClassVar[str] = "touches_beside"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def bind(self, component):
        if hookcore.status(component.module).attachments:
            vars(component.module)["_met"] = True
        return [Binding("", Hook())]


@frozen
class NeedsAConfig(Technique):
    """Expects of every component what only whole models have."""

    name: ClassVar[str] = "needs_config"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def bind(self, component):
        return [Binding("", Hook())] if component.module.config else []


@frozen
class TouchesWhilePlanning(Technique):
    name: ClassVar[str] = "touches"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def bind(self, component):
        vars(component.module)["_planned"] = True
        return [Binding("", Hook())]


@frozen
class ReusesHooks(Technique):
    name: ClassVar[str] = "reuses"
    phase: ClassVar[Phase] = Phase.COMPUTE
    hook: ClassVar[Hook] = Hook()

    def bind(self, component):
        return [Binding("", self.hook)]


@frozen
class BindsAtRandom(Technique):
    name: ClassVar[str] = "at_random"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def bind(self, component):
        return [Binding(random.choice(list(component.modules)), Hook())]  # noqa: S311


@frozen
class IgnoresTheSecondTime(Technique):
    """Skips what is hooked, as libraries do that look for their own attribute."""

    name: ClassVar[str] = "ignores"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def bind(self, component):
        for fqn, module in component.modules.items():
            if HookStack.at(module, "forward") is None:
                yield Binding(fqn, Hook())


@frozen
class HoldsState(Technique):
    """Keeps the state of a run in itself, so that two models share it."""

    name: ClassVar[str] = "holds_state"
    phase: ClassVar[Phase] = Phase.PLACE
    runs: list = field(factory=list)

    def bind(self, component):
        yield Binding("", CountingHook(self.runs))


class CountingHook(Hook):
    def __init__(self, runs):
        self.runs = runs

    def pre_forward(self, module, args, kwargs):
        self.runs.append(1)


@frozen
class CannotBeHashed(Technique):
    name: ClassVar[str] = "cannot_be_hashed"
    phase: ClassVar[Phase] = Phase.COMPUTE
    sizes: list = field(factory=list)


@frozen
class EqualsNothing(Technique):
    name: ClassVar[str] = "equals_nothing"
    phase: ClassVar[Phase] = Phase.COMPUTE
    mark: object = field(factory=object)


@frozen
class RefusesTooLate(Technique):
    """Finds out while it is put on, and does not tidy up."""

    name: ClassVar[str] = "refuses_too_late"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def bind(self, component):
        return [Binding("", Refusing())]


class Refusing(Hook):
    def attach(self, module):
        vars(module)["_half"] = True
        raise PlanError("does not fit")


class HookThatMovesForEver(MovingHook):
    on_error = Hook.on_error


@frozen
class MovesForEver(Moving):
    """Its count of calls is wrong after an error, so that nothing is moved any more, or given back."""

    def bind(self, component):
        held = Held(component)
        for binding in super().bind(component):
            yield Binding("", Tripping(held), binding.entry, claims=binding.claims)


class Tripping(HookThatMovesForEver):
    def pre_forward(self, module, args, kwargs):
        if self.held.depth:
            raise RuntimeError("called while it is being called")
        super().pre_forward(module, args, kwargs)


BROKEN = [
    (broken("adds_one", AddsOne), "test_outputs_are_those_of_the_bare_model"),
    (broken("works_once", WorksOnce), "test_outputs_are_those_of_the_bare_model"),
    (broken("leaves", LeavesAnAttribute), "test_removal_gives_the_model_back"),
    (broken("replaces_parameters", ReplacesParameters), "test_removal_gives_the_model_back"),
    (broken("breaks_ties", BreaksTies), "test_removal_gives_the_model_back"),
    (broken("rounds_in_silence", RoundsInSilence), "test_removal_gives_the_model_back"),
    (Rounding(), "test_removal_gives_the_model_back"),
    (broken("forgets_errors", ForgetsErrors), "test_a_failing_call_leaves_the_next_one_right"),
    (broken("swallows_errors", SwallowsErrors), "test_a_failing_call_leaves_the_next_one_right"),
    (broken("replaces_errors", ReplacesErrors), "test_a_failing_call_leaves_the_next_one_right"),
    (MovesForEver(), "test_a_failing_call_leaves_the_next_one_right"),
    (broken("marks", LeavesMarksInCopies), "test_copies_are_plain_and_compute_the_same"),
    (broken("closure", ComputesWithTheOriginal), "test_copies_are_plain_and_compute_the_same"),
    (Scaling(), "test_copies_are_plain_and_compute_the_same"),
    (Scaling(), "test_the_state_dict_is_true"),
    (broken("keeps", KeepsWhatItSaw), "test_the_state_dict_is_true"),
    (broken("goes_around", GoesAroundOthers), "test_removal_in_any_order_beside_another_technique"),
    (broken("forgets_too_much", ForgetsTooMuch), "test_reset_keeps_outputs"),
    (broken("halves_gradients", HalvesGradients), "test_gradients_are_those_of_the_bare_model"),
    (broken("adds_a_buffer", AddsABuffer), "test_names_stay_while_applied"),
    (broken("knows_it_again", KnowsItAgain), "test_it_can_be_applied_again"),
    (FollowsALearnedOrder(), "test_modules_are_called_in_any_order"),
    (WritesToOneFolder, "test_two_models_share_nothing"),
    (TouchesBesideOthers(), "test_conflicts_leave_the_model_alone"),
    (NeedsAConfig(), "test_it_works_on_a_submodule"),
    (TouchesWhilePlanning(), "test_planning_touches_nothing"),
    (RefusesTooLate(), "test_outputs_are_those_of_the_bare_model"),
    (ReusesHooks(), "test_binding_is_repeatable"),
    (BindsAtRandom(), "test_binding_is_repeatable"),
    (IgnoresTheSecondTime(), "test_applying_twice_is_refused"),
    (CannotBeHashed(), "test_options_are_a_value"),
    (EqualsNothing, "test_options_are_a_value"),
    ("no technique", "test_options_are_a_value"),
]


def make_kit(technique):
    class Kit(TechniqueContract):
        def make(self):
            return technique() if isinstance(technique, type) else technique

        def build(self, case):
            model = super().build(case)
            if isinstance(technique, NeedsAConfig):
                model.config = {"is": "whole"}
            return model

    return Kit()


def find_broken(kit, promise, max_examples=400):
    """Runs one test until it fails: more models than the kit draws in one run, and no smallest one."""
    test = getattr(TechniqueContract, promise)
    if hasattr(test, "hypothesis"):
        finding = settings(
            test._hypothesis_internal_use_settings,
            max_examples=max_examples,
            derandomize=True,
            phases=[HypothesisPhase.generate],
        )
        test = finding(given(data=st.data())(test.hypothesis.inner_test))
    test(kit)


@pytest.mark.parametrize(("technique", "promise"), BROKEN, ids=str)
def test_each_broken_promise_is_found(technique, promise):
    with pytest.raises((AssertionError, AttributeError, BaseExceptionGroup, RuntimeError)) as caught:
        find_broken(make_kit(technique), promise)
    assert_about_a_promise(caught.value)


# On the simulated device


class OnDevice(Hook):
    """Has what it keeps on the device of the model, in a list."""

    kept: ClassVar[list] = []

    def attach(self, module):
        self.kept.append(torch.zeros(5, device="sim"))


class TakesTwiceTheMemory(Hook):
    def pre_forward(self, module, args, kwargs):
        self.copies = [parameter.detach().clone() for parameter in module.parameters()]

    def post_forward(self, module, output):
        self.copies = []


class CopiesWithoutWaiting(Hook):
    """Brings weights on a stream of its own, and does not have the call wait for it."""

    def pre_forward(self, module, args, kwargs):
        with torch.Stream("sim"):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.cpu().pin_memory().to("sim", non_blocking=True)


class DeviceKit(TechniqueContract):
    device = "sim"

    def __init__(self, technique):
        self.technique = technique

    def make(self):
        return self.technique

    def models(self):
        return linears()

    def peak_bound(self, model):
        return sum(parameter.nbytes for parameter in model.parameters())


def test_memory_that_is_left_on_a_device_is_found(sim):
    kit = DeviceKit(broken("on_device", OnDevice))
    with pytest.raises(AssertionError, match=r"leaves no memory on sim, not \d+ bytes: sim:0 \d+ B"):
        find_broken(kit, "test_no_device_memory_is_left")
    OnDevice.kept.clear()
    find_broken(DeviceKit(Recording()), "test_no_device_memory_is_left", max_examples=5)


def test_a_peak_above_the_bound_is_found(sim):
    kit = DeviceKit(broken("twice", TakesTwiceTheMemory))
    with pytest.raises(AssertionError, match="has at most 80 bytes of weights on sim at once, not 160"):
        find_broken(kit, "test_peaks_are_bounded")
    find_broken(DeviceKit(Recording()), "test_peaks_are_bounded", max_examples=5)


def test_a_race_is_found(sim):
    kit = DeviceKit(broken("races", CopiesWithoutWaiting))
    with pytest.raises(sim.RaceError, match="read before it was written"):
        find_broken(kit, "test_outputs_are_those_of_the_bare_model")


def assert_about_a_promise(error):
    if isinstance(error, BaseExceptionGroup):  # Hypothesis found several ways in which it is broken
        error = error.exceptions[0]
    known = (
        "broken promise: ",
        "the model is not as it was",
        "called while it is being called",
        "something failed",
        "'Linear' object has no attribute 'config'",
    )
    assert str(error).startswith(known)


def test_state_that_two_models_share_is_found():
    class Kit(TechniqueContract):
        def make(self):
            return HoldsState()

    with pytest.raises(AssertionError, match="a technique is as before while it is used"):
        Kit().test_a_technique_holds_no_state_of_a_run()


def test_every_promise_is_broken_by_some_technique_here():
    tested = {promise for _, promise in BROKEN} | {
        "test_a_technique_holds_no_state_of_a_run",
        "test_no_device_memory_is_left",
        "test_peaks_are_bounded",
    }
    assert tested == set(PROMISES)


def test_an_author_who_forgets_make_is_told():
    with pytest.raises(NotImplementedError, match=r"^TechniqueContract has to define make\(\)$"):
        TechniqueContract().make()


def test_a_third_partys_test_file_is_collected_and_run(tmp_path):
    """All it takes is a subclass in a file; the kit itself is not collected."""
    (tmp_path / "test_theirs.py").write_text(
        "from typing import ClassVar\n"
        "from attrs import frozen\n"
        "from hookcore import Binding, Hook, Phase, Technique\n"
        "from hookcore.testing import TechniqueContract\n"
        "class AddsOne(Hook):\n"
        "    def post_forward(self, module, output):\n"
        "        return output + 1\n"
        "@frozen\n"
        "class Theirs(Technique):\n"
        "    name: ClassVar[str] = 'theirs'\n"
        "    phase: ClassVar[Phase] = Phase.COMPUTE\n"
        "    def bind(self, component):\n"
        "        return [Binding('', AddsOne())]\n"
        "class TestTheirs(TechniqueContract):\n"
        "    devices = ('cpu', 'sim')\n"
        "    def make(self):\n"
        "        return Theirs()\n",
        encoding="utf-8",
    )
    chosen = "outputs_are or planning or memory"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "broken promise: forward() gives the outputs of the bare model" in done.stdout
    assert "FAILED test_theirs.py::TestTheirs::test_outputs_are_those_of_the_bare_model[sim]" in done.stdout
    assert f"2 failed, 3 passed, 1 skipped, {2 * len(PROMISES) - 6} deselected" in done.stdout


def test_names_are_imported_when_they_are_asked_for():
    program = (
        "import sys, hookcore.testing as testing\n"
        "assert 'hypothesis' not in sys.modules\n"
        "assert all(hasattr(testing, name) for name in testing.__all__)\n"
        "assert 'hypothesis' in sys.modules\n"
        "assert not hasattr(testing, 'no_such_name')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@frozen
class Never(Technique):
    """Refuses whatever it is put on."""

    name: ClassVar[str] = "never"
    phase: ClassVar[Phase] = Phase.COMPUTE

    def bind(self, component):
        raise UnsupportedModelError("it is for transformers only")


@pytest.mark.parametrize(
    "name", ["test_planning_touches_nothing", "test_outputs_are_those_of_the_bare_model"]
)
def test_a_technique_that_refuses_all_models_is_told_to_bring_its_own(name):
    class Kit(TechniqueContract):
        def make(self):
            return Never()

        def models(self):
            return st.just(ModelCase(TreeModel(Recipe(linear), width=8)))

    kit = Kit()
    kit.device = "cpu"
    with pytest.raises(AssertionError, match=r"Override models\(\) to draw .*: it is for transformers only$"):
        getattr(kit, name)()
