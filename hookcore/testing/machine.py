"""A state machine that puts techniques on a model and takes them off in any order, and does all else beside.

    from hookcore.testing import HookMachine

    class Machine(HookMachine):
        def techniques(self):
            return [MyTechnique(size=4), LayerwiseCasting()]

    TestMachine = Machine.TestCase

Hypothesis draws what is done, step by step, and shows the shortest sequence that fails. The machine is made
as Hypothesis' own examples of stateful tests are: the real thing beside a model that is obviously right.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from hypothesis import HealthCheck, settings
from hypothesis import Phase as HypothesisPhase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import hookcore
from hookcore.errors import BudgetError, CheckpointError, PlanError, UnsupportedModelError
from hookcore.technique import Phase
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot
from hookcore.testing.twins import Twins, is_hooked, promise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hookcore.applied import Applied
    from hookcore.technique import Technique
    from hookcore.testing.cases import ModelCase


_SETTINGS = settings(
    max_examples=30,
    stateful_step_count=15,
    deadline=None,
    phases=set(HypothesisPhase) - {HypothesisPhase.explain},  # which traces every line, also of torch
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class InjectedError(Exception):
    """Raised inside of calls, to see what happens."""


@frozen(eq=False)
class Item:
    """One technique that is on.

    Attributes:
        handle: What `apply` returned.
        technique: The technique.
        target: The module that it was put on.
    """

    handle: Applied
    technique: Technique
    target: nn.Module


class HookMachine(Twins, RuleBasedStateMachine):
    """Subclass it, override `techniques`, and give pytest its `TestCase`.

    A step applies a technique to the model or to a module in it, removes one or all, resets, calls an entry,
    makes a call fail, copies, loads other weights or replaces a parameter. After each step outputs are those
    of a bare model that had the same done to it; when nothing is on, the model is as it ever was.

    `Machine.TestCase.settings` are Hypothesis' settings; by default 30 runs of up to 15 steps.

    Attributes:
        tolerance: As for `TechniqueContract`.
        device: Where models compute: "cpu", or "sim" for the simulated accelerator. As for
            `TechniqueContract`, the model is there from the beginning unless a technique is in phase PLACE.
    """

    case: ModelCase
    home: str
    gradients: bool
    model: nn.Module
    twin: nn.Module
    items: list[Item]
    removed: list[Item]
    lost: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.TestCase.settings = _SETTINGS

    def techniques(self) -> Sequence[Technique]:
        """The techniques that are put on, each any number of times."""
        raise NotImplementedError(f"{type(self).__name__} has to define techniques()")

    def models(self) -> st.SearchStrategy[ModelCase]:
        """The models to draw from; random ones unless overridden."""
        return module_trees()

    def targets(self) -> list[str]:
        """FQNs of the modules that a technique may be put on."""
        return list(dict(self.model.named_modules())) if self.home == self.device else [""]

    def __init__(self) -> None:
        super().__init__()
        self._cleanup = contextlib.ExitStack()
        if self._on_simulator:
            from hookcore.testing import simulator

            simulator.install()
            simulator.reset()
            self._cleanup.enter_context(simulator.limited(strict=True))
            self._cleanup.enter_context(simulator.watching_host())

    @property
    def _on_simulator(self) -> bool:
        return self.device.partition(":")[0] == "sim"

    @initialize(data=st.data(), gradients=st.booleans())
    def begin(self, data: st.DataObject, gradients: bool) -> None:
        """Build the model and its twin."""
        self.home = self.home_of(self.techniques())
        self.case = data.draw(self.models(), label="model")
        self.gradients = gradients
        self.model = self.build(self.case).to(self.home)
        self.twin = self.build(self.case).to(self.device)
        self.pristine = ModelSnapshot.take(self.model, twin=self.twin)
        self.items = []
        self.removed = []
        self.lost = False

    # What is on

    @rule(data=st.data())
    def apply_one(self, data: st.DataObject) -> None:
        """Put a technique on; a refusal changes nothing."""
        technique = data.draw(st.sampled_from(self.techniques()), label="technique")
        self.put_on(technique, data.draw(st.sampled_from(self.targets()), label="target"))

    def put_on(self, technique: Technique, fqn: str) -> None:
        """Apply a technique to a module."""
        target = self.model.get_submodule(fqn)
        before = ModelSnapshot.take(self.model)
        try:
            handle = hookcore.apply(target, [technique])
        except (PlanError, UnsupportedModelError, BudgetError, CheckpointError):
            before.assert_restored(self.model, same_storage=True)
        else:
            self.items.append(Item(handle, technique, target))

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def remove_one(self, data: st.DataObject) -> None:
        """Take a technique off, whatever was put on before or after it."""
        item = data.draw(st.sampled_from(self.items), label="item")
        self.items.remove(item)
        self.lost |= self.take_off(item.handle, self.model)
        self.removed.append(item)

    @precondition(lambda self: self.removed)
    @rule(data=st.data())
    def remove_again(self, data: st.DataObject) -> None:
        """Remove what has been removed."""
        data.draw(st.sampled_from(self.removed), label="item").handle.remove()

    @rule()
    def remove_all(self) -> None:
        """Take everything off."""
        lossy = self.tolerance is not None
        self.lost |= lossy and bool(self.items)
        hookcore.remove(self.model, allow_lossy=lossy)
        self.removed += self.items
        self.items.clear()

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        """Reset a technique."""
        data.draw(st.sampled_from(self.items), label="item").handle.reset()

    # What is done with the model

    def entries(self) -> tuple[str, ...]:
        """What can be called: weights are brought elsewhere only for the entries that a plugin declares."""
        if self.home == self.device:
            return self.case.entries
        (component,) = hookcore.status(self.model).components
        return tuple(entry for entry in self.case.entries if entry in component.conventions.entries)

    @rule(data=st.data(), seed=st.integers(0, 3))
    def call(self, data: st.DataObject, seed: int) -> None:
        """Call an entry of both."""
        self.call_entry(data.draw(st.sampled_from(self.entries()), label="entry"), seed)

    def call_entry(self, entry: str, seed: int) -> None:
        """Call both; outputs have to be the same."""
        with torch.set_grad_enabled(self.gradients), self.twin_beside_model() as device:
            models = self.model, self.twin
            self.same_outputs(self.case, models, entry, seed, home=self.home, when="in a call", device=device)

    @contextlib.contextmanager
    def twin_beside_model(self) -> Iterator[str]:
        """Move the twin to where the model computes while nothing brings that to the device.

        Not all kernels of two devices round in the same way.
        """
        is_brought = any(item.technique.phase is Phase.PLACE for item in self.items)
        device = self.device if is_brought else self.home
        self.twin.to(device)
        try:
            yield device
        finally:
            self.twin.to(self.device)

    @rule(data=st.data(), seed=st.integers(0, 3))
    def call_that_fails(self, data: st.DataObject, seed: int) -> None:
        """Raise in a module during a call of both: the error goes on unchanged."""
        entry = data.draw(st.sampled_from(self.entries()), label="entry")
        fqn = data.draw(st.sampled_from(list(dict(self.model.named_modules()))), label="fails at")
        self.fail_entry(entry, seed, fqn)

    def fail_entry(self, entry: str, seed: int, fqn: str) -> None:
        """Call both with a module that raises; what comes out has to be the same."""
        got = self._call_failing(self.model, fqn, entry, seed, self.home)
        with self.twin_beside_model() as device:
            expected = self._call_failing(self.twin, fqn, entry, seed, device)
        what = f"an error in {fqn or 'the model'!r} reaches the caller of {entry}() unchanged"
        promise(type(got) is type(expected), what)
        if isinstance(got, tuple) and isinstance(expected, tuple):  # it is not called, or not in this entry
            promise(all(map(self.same, got, expected)), f"{entry}() gives the outputs of the bare model")
        else:
            promise(got == expected, what)

    def _call_failing(
        self, model: nn.Module, fqn: str, entry: str, seed: int, device: str
    ) -> tuple[torch.Tensor, ...] | list[str]:
        """Return outputs, or, if the error came out, the notes on it."""
        handle = model.get_submodule(fqn).register_forward_pre_hook(_fail)
        with torch.set_grad_enabled(self.gradients):
            try:
                return self.case.call(model, entry, seed, device=device)
            except InjectedError as error:
                return getattr(error, "__notes__", [])
            finally:
                handle.remove()

    @property
    def reads_true(self) -> bool:
        """Whether weights that are read between calls are true, as techniques have to promise."""
        return True

    @precondition(lambda self: self.reads_true)
    @rule(way=st.sampled_from(["deepcopy", "pickle"]), data=st.data())
    def copy(self, way: str, data: st.DataObject) -> None:
        """Copy both; the copies have no hooks, and compute the same."""
        copied, twin = (_copied(it, way).to(self.device) for it in (self.model, self.twin))
        promise(not is_hooked(copied), f"a {way} has no hooks")
        entry = data.draw(st.sampled_from(self.case.entries), label="entry")
        with torch.no_grad():
            self.same_outputs(self.case, (copied, twin), entry, 0, home=self.device, when=f"in a {way}")

    @precondition(lambda self: self.reads_true)
    @rule(seed=st.integers(0, 3))
    def load(self, seed: int) -> None:
        """Save, and load other weights."""
        self.same_state(self.model, self.twin)
        other = self.build(type(self.case)(self.case.blueprint, seed)).state_dict()
        for model in (self.model, self.twin):
            model.load_state_dict(other)
        self.same_state(self.model, self.twin)

    @precondition(lambda self: self.reads_true and any(True for _ in self.model.parameters()))
    @rule(data=st.data())
    def replace_a_parameter(self, data: st.DataObject) -> None:
        """Put another parameter with the same values in the place of one, made where the model began."""
        first = self.build(self.case)
        shared = Counter(it.untyped_storage().data_ptr() for it in (*first.parameters(), *first.buffers()))
        alone = (fqn for fqn, it in first.named_parameters() if shared[it.untyped_storage().data_ptr()] == 1)
        fqns = list(alone)  # to replace one of two that are tied would untie them
        if not fqns:
            return
        holder, _, name = data.draw(st.sampled_from(fqns), label="parameter").rpartition(".")
        value = getattr(self.twin.get_submodule(holder), name).detach()
        for model, device in ((self.model, torch.device(self.home)), (self.twin, value.device)):
            module = model.get_submodule(holder)
            old = getattr(module, name)
            new = value.to(device, copy=True)
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))

    # What always holds

    @invariant()
    def status_tells_what_is_on(self) -> None:
        """`status` has each technique that is on, and no other; outer phases come first."""
        found = [it.technique for it in hookcore.status(self.model).attachments]
        expected = [item.technique for item in self.items]
        promise(sorted(map(repr, found)) == sorted(map(repr, expected)), f"status() has {expected}")
        promise(found == sorted(found, key=lambda it: it.phase), f"outer phases come first, not {found}")

    @invariant()
    def the_model_is_pristine_when_nothing_is_on(self) -> None:
        """As it ever was; values differ only if it was said that they would."""
        if not self.items:
            found = self.differences(self.pristine, self.model, exact=not self.lost)
            promise(not found, f"a model without techniques is as it ever was: {'; '.join(found)}")

    def teardown(self) -> None:
        """Leave nothing behind; fails for what the simulator finds late."""
        with self._cleanup:
            with contextlib.suppress(AttributeError):  # nothing was built
                hookcore.remove(self.model, allow_lossy=True)
            if self._on_simulator:
                from hookcore.testing import simulator

                try:
                    simulator.check()
                finally:
                    simulator.reset()


def _copied(model: nn.Module, way: str) -> Any:
    return copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301


def _fail(_module: nn.Module, _args: object) -> None:
    raise InjectedError
