"""The contract kit: everything that a technique promises, as a class of tests to subclass.

    from hookcore.testing import TechniqueContract

    class TestMyTechnique(TechniqueContract):
        def make(self):
            return MyTechnique(size=4)

pytest then runs each promise on random models. A failure names the promise and shows the smallest model
that Hypothesis found. Needs the packages in `hookcore[testing]`.

The form is that of the array API's and scikit-learn's conformance suites: the author supplies the object,
the suite knows the rules.
"""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import attrs
import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import Phase as HypothesisPhase
from hypothesis import strategies as st

import hookcore
from hookcore.errors import ConflictError, LossyRemovalError, PlanError, UnsupportedModelError
from hookcore.hook import Hook
from hookcore.stack import HookStack
from hookcore.technique import Binding, Phase, Skipped, Technique
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from hookcore.applied import Applied
    from hookcore.target import Component
    from hookcore.testing.cases import ModelCase

_TestT = TypeVar("_TestT", bound="Callable[..., Any]")
_EXAMPLES = 20
_SEED = 1


def _on_random_models(test: _TestT) -> _TestT:
    """Runs a test with `data` to draw from, for every subclass with a setting that suits slow techniques."""
    configured = settings(
        max_examples=_EXAMPLES,
        deadline=None,
        phases=set(HypothesisPhase) - {HypothesisPhase.explain},  # which traces every line, also of torch
        suppress_health_check=[
            HealthCheck.differing_executors,  # that one test serves many subclasses is the point
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,  # a technique may refuse many models
        ],
    )
    return configured(given(data=st.data())(test))  # type: ignore[return-value]


class TechniqueContract:
    """Subclass it, name the subclass `Test...`, and override `make`.

    Attributes:
        tolerance: None: outputs are those of the bare model in every bit, and so are the weights after
            removal. A number: the technique loses bits, and outputs and weights may differ by so much,
            relative and absolute, as in `torch.testing.assert_close`.
    """

    tolerance: ClassVar[float | None] = None

    def make(self) -> Technique:
        """Makes the technique with the options to test; equal ones at each call."""
        raise NotImplementedError(f"{type(self).__name__} has to define make()")

    def cases(self) -> st.SearchStrategy[ModelCase]:
        """The models to test on; random ones unless overridden.

        What the technique refuses with PlanError or UnsupportedModelError is passed over.
        """
        return module_trees()

    # The promises

    def test_options_are_a_value(self) -> None:
        """Equal options make equal techniques that can be hashed, shown, and not be changed."""
        technique = self.make()
        kind = type(technique)
        _promise(isinstance(technique, Technique), f"make() gives a Technique, not a {kind.__qualname__}")
        _promise(isinstance(technique.phase, Phase), f"phase is a Phase, not {technique.phase!r}")
        _promise(
            isinstance(technique.name, str) and technique.name.isidentifier() and technique.name.islower(),
            f"name is in snake_case, not {technique.name!r}",
        )
        _promise(technique == self.make(), "make() gives equal techniques each time")
        _promise(_hash(technique) == _hash(self.make()), "equal techniques have one hash")
        _promise(
            "__attrs_attrs__" in vars(kind),
            f"{kind.__qualname__} is decorated with @attrs.frozen itself, not only its base",
        )

    @_on_random_models
    def test_planning_touches_nothing(self, data: st.DataObject) -> None:
        """`plan` leaves every object and every bit of the model alone."""
        model = self._draw(data).build()
        before = ModelSnapshot.take(model)
        try:
            hookcore.plan(model, [self.make()])
        except (PlanError, UnsupportedModelError):
            before.assert_restored(model, same_storage=True)
            reject()
        before.assert_restored(model, same_storage=True)
        _promise(not hookcore.status(model).attachments, "plan() attaches nothing")

    @_on_random_models
    def test_binding_is_repeatable(self, data: st.DataObject) -> None:
        """`bind` gives the same bindings each time, with new hooks."""
        model = self._draw(data).build()
        technique = self.make()
        (component,) = hookcore.status(model).components
        first, second = (_bound(technique, component) for _ in range(2))
        _promise(
            [_essence(item) for item in first] == [_essence(item) for item in second],
            "bind() gives the same each time for one component",
        )
        hooks = [item.hook for item in first + second if isinstance(item, Binding)]
        _promise(
            len(set(map(id, hooks))) == len(hooks), "bind() makes a new hook for each binding, each time"
        )

    @_on_random_models
    def test_outputs_are_those_of_the_bare_model(self, data: st.DataObject) -> None:
        """Every entry, called repeatedly and in any order."""
        case, model, bare, _ = self._applied(data)
        calls = st.tuples(st.sampled_from(case.entries), st.integers(0, 2))
        for entry, seed in data.draw(st.lists(calls, min_size=1, max_size=4), label="calls"):
            self._same_outputs(case, model, bare, entry, seed, when="while applied")

    @_on_random_models
    def test_removal_gives_the_model_back(self, data: st.DataObject) -> None:
        """Every object, attribute, dtype, device and tie; every bit, unless it says before that it cannot."""
        case, model, bare = self._draw_twins(data)
        before = ModelSnapshot.take(model, twin=bare)
        applied = self._apply(model)
        if data.draw(st.booleans(), label="called"):
            self._call_all(case, model, bare)
        self._remove(applied, model)
        self._restored(before, model)
        self._call_all(case, model, bare)
        applied.remove()
        self._restored(before, model)

    @_on_random_models
    def test_applying_twice_is_refused(self, data: st.DataObject) -> None:
        """The second time is a ConflictError that leaves the model as it is."""
        case, model, bare, _ = self._applied(data)
        assume(_hooked(model))
        before = ModelSnapshot.take(model)
        try:
            hookcore.apply(model, [self.make()])
        except ConflictError:
            pass
        else:
            _promise(False, "applying twice is a ConflictError")
        before.assert_restored(model, same_storage=True)
        self._call_all(case, model, bare)

    @_on_random_models
    def test_removal_in_any_order_beside_another_technique(self, data: st.DataObject) -> None:
        """Another technique on the same modules, put on and taken off first or last, outside or inside."""
        case, model, bare = self._draw_twins(data)
        before = ModelSnapshot.take(model, twin=bare)
        calls: set[str] = set()
        phases = [self.make().phase, *Phase]  # its own first: so close they meet most often
        recording = _recording(data.draw(st.sampled_from(phases), label="phase of the other"))
        other = recording(calls)
        other_first = data.draw(st.booleans(), label="the other is put on first")
        if other_first:
            others = hookcore.apply(model, [other])
        applied = self._apply(model)
        if not other_first:
            others = hookcore.apply(model, [other])
        self._call_all(case, model, bare)
        expected = _calls_of(case, recording)
        _promise(
            expected <= calls, f"hooks of other techniques are called at {sorted(expected - calls)}, too"
        )
        if data.draw(st.booleans(), label="the other is taken off first"):
            others.remove()
            self._call_all(case, model, bare)
            self._remove(applied, model)
        else:
            self._remove(applied, model)
            self._call_all(case, model, bare)
            others.remove()
        self._restored(before, model)

    @_on_random_models
    def test_a_failing_call_leaves_the_next_one_right(self, data: st.DataObject) -> None:
        """Whichever module raises, the error goes on unchanged, and no trace of the call is left."""
        case, model, bare = self._draw_twins(data)
        before = ModelSnapshot.take(model, twin=bare)
        applied = self._apply(model)
        self._call_all(case, model, bare)
        before_failing = ModelSnapshot.take(model, twin=bare)
        fqn = data.draw(st.sampled_from(list(dict(model.named_modules()))), label="fails at")
        for entry in case.entries:
            outcomes = [_call_failing(case, it, entry, fqn) for it in (model, bare)]
            _promise(
                outcomes[0] == outcomes[1],
                f"an error in {fqn or 'the model'!r} reaches the caller of {entry}() unchanged",
            )
            found = self._differences(before_failing, model, exact=self.tolerance is None)
            _promise(not found, f"a call of {entry}() that fails leaves nothing behind: {'; '.join(found)}")
        self._call_all(case, model, bare)
        self._remove(applied, model)
        self._restored(before, model)

    @_on_random_models
    def test_copies_are_plain_and_compute_the_same(self, data: st.DataObject) -> None:
        """`copy.deepcopy` and pickle give a model without hooks that shares nothing with this one."""
        case, model, bare, _ = self._applied(data)
        if data.draw(st.booleans(), label="called"):
            self._call_all(case, model, bare)
        way = data.draw(st.sampled_from(["deepcopy", "pickle"]), label="way")
        copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301
        reference = copy.deepcopy(bare)
        _promise(not _hooked(copied), f"a {way} has no hooks")
        for (fqn, module), (_, plain) in zip(copied.named_modules(), reference.named_modules(), strict=True):
            added = vars(module).keys() - vars(plain).keys()
            _promise(not added, f"a {way} has no traces: {sorted(added)} in {fqn or 'the model'!r}")
        for entry in case.entries:
            self._same_outputs(case, copied, reference, entry, 0, when=f"in a {way}")
        with torch.no_grad():
            for tensor in (*copied.parameters(), *copied.buffers()):
                tensor.zero_()
        self._call_all(case, model, bare)

    @_on_random_models
    def test_the_state_dict_is_true(self, data: st.DataObject) -> None:
        """Saving shows the weights as they are, at any time; what is loaded is what the next call uses."""
        case, model, bare, _ = self._applied(data)
        self._same_state(model, bare)
        self._call_all(case, model, bare)
        self._same_state(model, bare)
        loaded = {
            fqn: tensor * 2 if tensor.is_floating_point() else tensor.clone()
            for fqn, tensor in bare.state_dict().items()
        }
        for it in (model, bare):
            it.load_state_dict(loaded)
        self._same_state(model, bare)
        self._call_all(case, model, bare)

    @_on_random_models
    def test_reset_keeps_outputs(self, data: st.DataObject) -> None:
        """After `reset` the calls are right, whatever was learned before."""
        case, model, bare, applied = self._applied(data)
        if data.draw(st.booleans(), label="called before"):
            self._call_all(case, model, bare)
        applied.reset()
        self._call_all(case, model, bare)

    @_on_random_models
    def test_a_technique_holds_no_state_of_a_run(self, data: st.DataObject) -> None:
        """One technique object serves two models at once, and is equal to a new one after that."""
        case, model, bare = self._draw_twins(data)
        other_model, other_bare = case.build(), case.build()
        technique = self.make()
        self._apply(model, technique)
        other = self._apply(other_model, technique)
        self._call_all(case, model, bare)
        self._call_all(case, other_model, other_bare)
        self._remove(other, other_model)
        self._call_all(case, model, bare)
        _promise(technique == self.make(), "a technique is as before after it was used")

    # What they are made of

    def _draw(self, data: st.DataObject) -> ModelCase:
        return data.draw(self.cases(), label="model")

    def _draw_twins(self, data: st.DataObject) -> tuple[ModelCase, nn.Module, nn.Module]:
        case = self._draw(data)
        return case, case.build(), case.build()

    def _applied(self, data: st.DataObject) -> tuple[ModelCase, nn.Module, nn.Module, Applied]:
        case, model, bare = self._draw_twins(data)
        return case, model, bare, self._apply(model)

    def _apply(self, model: nn.Module, technique: Technique | None = None) -> Applied:
        """Applies the technique; a refusal has to leave the model alone, and passes it over."""
        before = ModelSnapshot.take(model)
        try:
            return hookcore.apply(model, [self.make() if technique is None else technique])
        except (PlanError, UnsupportedModelError):
            before.assert_restored(model, same_storage=True)
            reject()

    def _remove(self, applied: Applied, model: nn.Module) -> None:
        """Removes the technique; if it has to be allowed to lose bits, it says so before any change."""
        before = ModelSnapshot.take(model)
        try:
            applied.remove()
        except LossyRemovalError:
            _promise(self.tolerance is not None, "remove() loses nothing, or `tolerance` is set")
            before.assert_restored(model, same_storage=True)
            applied.remove(allow_lossy=True)
            self._lost = True
        else:
            self._lost = False

    def _restored(self, before: ModelSnapshot, model: nn.Module) -> None:
        found = self._differences(before, model, exact=not self._lost)
        _promise(not found, f"remove() gives the model back: {'; '.join(found)}")

    @staticmethod
    def _differences(before: ModelSnapshot, model: nn.Module, *, exact: bool) -> list[str]:
        values = ("values differ", "values differ from the twin's")
        return [it for it in before.differences(model) if exact or not it.endswith(values)]

    def _call_all(self, case: ModelCase, model: nn.Module, bare: nn.Module) -> None:
        for entry in case.entries:
            self._same_outputs(case, model, bare, entry, _SEED, when="at the next call")

    def _same_outputs(
        self, case: ModelCase, model: nn.Module, bare: nn.Module, entry: str, seed: int, *, when: str
    ) -> None:
        with torch.no_grad():
            got, expected = (case.call(it, entry, seed) for it in (model, bare))
        _promise(len(got) == len(expected), f"{entry}() gives as many outputs as the bare model, {when}")
        _promise(
            all(map(self._same, got, expected)), f"{entry}() gives the outputs of the bare model, {when}"
        )

    def _same_state(self, model: nn.Module, bare: nn.Module) -> None:
        got, expected = model.state_dict(), bare.state_dict()
        _promise(list(got) == list(expected), f"state_dict() has the keys {list(expected)}, not {list(got)}")
        for fqn, tensor in expected.items():
            _promise(self._same(got[fqn], tensor), f"state_dict() has the true {fqn!r}")

    def _same(self, got: Tensor, expected: Tensor) -> bool:
        if self.tolerance is None:
            return same_bits(got, expected)
        got = got.to(expected.device)
        if got.dtype != expected.dtype or got.shape != expected.shape:
            return False
        return torch.allclose(
            got.double(), expected.double(), rtol=self.tolerance, atol=self.tolerance, equal_nan=True
        )


def _promise(kept: bool, promise: str) -> None:
    if not kept:
        raise AssertionError(f"broken promise: {promise}")


def _hash(technique: Technique) -> int:
    try:
        return hash(technique)
    except TypeError as error:
        raise AssertionError(f"broken promise: techniques can be hashed: {error}") from error


def _bound(technique: Technique, component: Component) -> list[Binding | Skipped]:
    before = ModelSnapshot.take(component.module)
    try:
        items = list(technique.bind(component))
    except (PlanError, UnsupportedModelError):
        before.assert_restored(component.module, same_storage=True)
        reject()
    before.assert_restored(component.module, same_storage=True)
    return items


def _essence(item: Binding | Skipped) -> tuple[object, ...]:
    """What a binding is, without its hook."""
    if isinstance(item, Skipped):
        return "skipped", item.fqn, item.reason
    return item.fqn, item.entry, item.claims, item.forbids_below, type(item.hook)


def _hooked(model: nn.Module) -> bool:
    return any(isinstance(value, HookStack) for module in model.modules() for value in vars(module).values())


class _DeliberateError(Exception):
    """Raised inside a forward to see what happens."""


def _call_failing(case: ModelCase, model: nn.Module, entry: str, fqn: str) -> str:
    def fail(_module: nn.Module, _args: object) -> None:
        raise _DeliberateError

    handle = model.get_submodule(fqn).register_forward_pre_hook(fail)
    try:
        with torch.no_grad():
            case.call(model, entry)
    except _DeliberateError:
        return "raised"
    finally:
        handle.remove()
    return "not reached"


class _RecordingHook(Hook):
    """Writes down where it was called, and has something to prepare, which must be undone in order."""

    def __init__(self, calls: set[str], where: str) -> None:
        self._calls = calls
        self._where = where
        self._attribute = f"_recorded at {where}"

    def attach(self, module: nn.Module) -> None:
        module.__dict__[self._attribute] = self

    def detach(self, module: nn.Module) -> None:
        del module.__dict__[self._attribute]

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.add(self._where)


def _recording(in_phase: Phase) -> Callable[[set[str]], Technique]:
    """Makes a technique class that hooks every entry of every module, at a phase."""

    @attrs.frozen
    class Recording(Technique):
        name: ClassVar[str] = "contract_recording"
        phase: ClassVar[Phase] = in_phase

        calls: set[str] = attrs.field(eq=False)

        def bind(self, component: Component) -> Iterator[Binding]:
            for fqn, module in component.modules.items():
                for entry in ("forward", "encode", "decode"):
                    if callable(getattr(module, entry, None)):
                        yield Binding(fqn, _RecordingHook(self.calls, f"{fqn}.{entry}"), entry)

    return Recording


def _calls_of(case: ModelCase, recording: Callable[[set[str]], Technique]) -> set[str]:
    """Where hooks are called in a model that has no other technique."""
    calls: set[str] = set()
    model = case.build()
    hookcore.apply(model, [recording(calls)])
    with torch.no_grad():
        for entry in case.entries:
            case.call(model, entry, _SEED)
    return calls
