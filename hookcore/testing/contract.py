"""The contract kit: everything that a technique promises, as a class of tests to subclass.

    from hookcore.testing import TechniqueContract

    class TestMyTechnique(TechniqueContract):
        def make(self):
            return MyTechnique(size=4)

pytest then runs each promise on random models. A failure names the promise and shows the smallest model
that Hypothesis found. Needs the packages in `hookcore[testing]`.

The form is that of the array API's and scikit-learn's conformance suites: the author supplies the object,
the suite knows the rules. The promises themselves are in `hookcore.testing.promises`.
"""

from __future__ import annotations

from hookcore.testing.promises.calls import CallPromises
from hookcore.testing.promises.memory import MemoryPromises
from hookcore.testing.promises.planning import PlanningPromises
from hookcore.testing.promises.removal import RemovalPromises
from hookcore.testing.promises.weights import WeightPromises


class TechniqueContract(PlanningPromises, CallPromises, WeightPromises, RemovalPromises, MemoryPromises):
    """Subclass it, name the subclass `Test...`, and override `make`, and what else differs.

    Attributes:
        tolerance: None: outputs are those of the bare model in every bit, and so are the weights after
            removal. A number: the technique loses bits, and outputs, gradients and weights may differ by so
            much, relative and absolute, as in `torch.testing.assert_close`.
        devices: Where models compute; each test runs on each. `"sim"` is a simulated accelerator, on which
            races fail a test and memory is counted. A technique in phase PLACE finds models and inputs on
            the CPU and has to bring them to the device, any other finds them there.
        device: The one of them that a test runs on, for `make` to read.
        gradients: Whether a model can be trained while the technique is on.
        hides_modules: Whether calls that it hooks do not go through the modules below (tracing, compiling),
            so that hooks of others there may be refused.
    """
