"""What all promises are tested with: devices, drawn models, applying and removing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import Phase as HypothesisPhase
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

import hookcore
from hookcore.errors import BudgetError, CheckpointError, PlanError, UnsupportedModelError
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot
from hookcore.testing.twins import Twins, promise

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from hookcore.applied import Applied
    from hookcore.technique import Technique
    from hookcore.testing.cases import ModelCase

_TestT = TypeVar("_TestT", bound="Callable[..., Any]")
_EXAMPLES = 10
SEED = 1
REFUSALS = (PlanError, UnsupportedModelError, BudgetError, CheckpointError)
"""What a technique raises for a model that it is not for."""


def on_random_models(test: _TestT) -> _TestT:
    """Run a test with `data` to draw from, for every subclass with a setting that suits slow techniques."""

    @functools.wraps(test)
    def checked(self: Promises, data: st.DataObject) -> None:
        test(self, data)
        self.check_device()

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
    drawn = configured(given(data=st.data())(checked))

    @functools.wraps(drawn)
    def tested(self: Promises, *args: Any, **kwargs: Any) -> None:
        self._refusal = None
        try:
            drawn(self, *args, **kwargs)
        except Unsatisfiable as error:
            if self._refusal is None:
                raise
            raise AssertionError(
                f"{self.make()!r} refuses every model that was drawn, so that nothing was tested. Override "
                f"models() to draw models that it is for. The last refusal: {self._refusal}"
            ) from error

    return tested  # type: ignore[return-value]


class Promises(Twins):
    """Base of all groups of promises; `TechniqueContract` documents what there is to override."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    gradients: ClassVar[bool] = True
    hides_modules: ClassVar[bool] = False
    _refusal: str | None = None  # what the technique said to the last model that it refused

    def make(self) -> Technique:
        """Make the technique with the options to test; equal ones at each call."""
        raise NotImplementedError(f"{type(self).__name__} has to define make()")

    def models(self) -> st.SearchStrategy[ModelCase]:
        """The models to test on; random ones unless overridden.

        What the technique refuses (PlanError, UnsupportedModelError, BudgetError, CheckpointError) is passed
        over; a test fails if that is all.
        """
        return module_trees()

    # Devices

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test on each device."""
        metafunc.parametrize("_device", self.devices, indirect=True)

    @pytest.fixture(autouse=True)
    def _device(self, request: pytest.FixtureRequest) -> None:
        self.device = request.param
        self.prepare(request)

    def prepare(self, request: pytest.FixtureRequest) -> None:
        """Prepare the device before a test, or skip the test."""
        if self.on_simulator:
            request.getfixturevalue("sim")
        elif torch.device(self.device).type != "cpu" and not torch.accelerator.is_available():
            pytest.skip(f"there is no {self.device} here")

    @property
    def on_simulator(self) -> bool:
        """Whether the device is a simulated one."""
        return self.device.partition(":")[0] == "sim"

    def check_device(self) -> None:
        """Fail for what the simulator finds late."""
        if self.on_simulator:
            from hookcore.testing import simulator

            simulator.check()

    @property
    def home(self) -> str:
        """Where the model lies before the technique is put on."""
        return self.home_of([self.make()])

    # Models

    def draw(self, data: st.DataObject) -> ModelCase:
        """Draw a case."""
        return data.draw(self.models(), label="model")

    def pair(self, case: ModelCase) -> tuple[nn.Module, nn.Module]:
        """Build the model, at home, and the bare one, on the device."""
        return self.build(case).to(self.home), self.build(case).to(self.device)

    def draw_pair(self, data: st.DataObject) -> tuple[ModelCase, nn.Module, nn.Module]:
        """Draw a case and build both of it."""
        case = self.draw(data)
        return case, *self.pair(case)

    def draw_applied(self, data: st.DataObject) -> tuple[ModelCase, nn.Module, nn.Module, Applied]:
        """Likewise, with the technique on the model."""
        case, model, bare = self.draw_pair(data)
        return case, model, bare, self.apply(model)

    def apply(self, model: nn.Module, technique: Technique | None = None) -> Applied:
        """Apply the technique; a refusal has to leave the model alone, and passes it over."""
        before = ModelSnapshot.take(model)
        try:
            return hookcore.apply(model, [self.make() if technique is None else technique])
        except REFUSALS as error:
            self.pass_over(model, before, error)

    def pass_over(self, model: nn.Module, before: ModelSnapshot, refusal: BaseException) -> NoReturn:
        """Go on to the next model after a refusal, which has to leave this one alone."""
        before.assert_restored(model, same_storage=True)
        self._refusal = str(refusal)
        reject()

    def remove(self, applied: Applied, model: nn.Module) -> None:
        """Remove the technique, and remembers whether that lost bits."""
        self._lost = self.take_off(applied, model)

    def is_restored(self, before: ModelSnapshot, model: nn.Module) -> None:
        """The model has to be as it was before the technique that was removed last."""
        found = self.differences(before, model, exact=not self._lost)
        promise(not found, f"remove() gives the model back: {'; '.join(found)}")

    def entries(self, case: ModelCase, model: nn.Module) -> tuple[str, ...]:
        """What can be called: weights are brought elsewhere only for the entries that a plugin declares."""
        if self.home == self.device:
            return case.entries
        (component,) = hookcore.status(model).components
        return tuple(entry for entry in case.entries if entry in component.conventions.entries)

    def call_both(
        self,
        case: ModelCase,
        model: nn.Module,
        bare: nn.Module,
        *,
        when: str = "at the next call",
        home: str | None = None,
    ) -> None:
        """Call each entry of both, without gradients; the outputs have to be the same."""
        for entry in self.entries(case, model):
            self.call_one(case, model, bare, entry, SEED, when=when, home=home)

    def call_one(
        self,
        case: ModelCase,
        model: nn.Module,
        bare: nn.Module,
        entry: str,
        seed: int,
        *,
        when: str,
        home: str | None = None,
    ) -> None:
        """Likewise, one entry."""
        with torch.no_grad():
            self.same_outputs(case, (model, bare), entry, seed, home=home or self.home, when=when)
