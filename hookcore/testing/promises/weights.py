"""What a technique promises of weights while it is applied: names, saving, loading, copies, other models."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import torch
from attrs import evolve
from hypothesis import strategies as st

from hookcore.testing.promises.base import Promises, on_random_models
from hookcore.testing.twins import doubled, is_hooked, promise

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class WeightPromises(Promises):
    """What is read, saved, loaded and copied is true."""

    @on_random_models
    def test_names_stay_while_applied(self, data: st.DataObject) -> None:
        """Modules, parameters and buffers have the FQNs, state dicts the keys of the bare model."""
        case, model, bare, _ = self.draw_applied(data)
        self._same_names(model, bare)
        self.call_both(case, model, bare)
        self._same_names(model, bare)

    @staticmethod
    def _same_names(model: nn.Module, bare: nn.Module) -> None:
        for kind, names in _NAMES.items():
            got, expected = names(model), names(bare)
            promise(got == expected, f"{kind} are {expected} while applied, not {got}")

    @on_random_models
    def test_the_state_dict_is_true(self, data: st.DataObject) -> None:
        """Saving shows the weights as they are, at any time; what is loaded is what the next call uses."""
        case, model, bare, _ = self.draw_applied(data)
        self.same_state(model, bare)
        self.call_both(case, model, bare)
        self.same_state(model, bare)
        loaded = doubled(bare.state_dict())
        for it in (model, bare):
            it.load_state_dict(loaded)
        self.same_state(model, bare)
        self.call_both(case, model, bare)

    @on_random_models
    def test_copies_are_plain_and_compute_the_same(self, data: st.DataObject) -> None:
        """`copy.deepcopy` and pickle give a model without hooks that shares nothing with this one.

        It is on the device that this one came from.
        """
        case, model, bare, _ = self.draw_applied(data)
        if data.draw(st.booleans(), label="called"):
            self.call_both(case, model, bare)
        way = data.draw(st.sampled_from(["deepcopy", "pickle"]), label="way")
        copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301
        reference = copy.deepcopy(bare)
        promise(not is_hooked(copied), f"a {way} has no hooks")
        for (fqn, module), (_, plain) in zip(copied.named_modules(), reference.named_modules(), strict=True):
            added = vars(module).keys() - vars(plain).keys()
            promise(not added, f"a {way} has no traces: {sorted(added)} in {fqn or 'the model'!r}")
        where = {it.device.type for it in (*copied.parameters(), *copied.buffers())}
        home = torch.device(self.home).type
        promise(where <= {home}, f"a {way} is on {home}, where the model came from, not on {sorted(where)}")
        copied.to(self.device)  # it has no hooks that would bring its weights to where it computes
        self.call_both(case, copied, reference, home=self.device, when=f"in a {way}")
        with torch.no_grad():
            for tensor in (*copied.parameters(), *copied.buffers()):
                tensor.zero_()
        self.call_both(case, model, bare)

    @on_random_models
    def test_two_models_share_nothing(self, data: st.DataObject) -> None:
        """One technique on two models with other weights: each computes, loads and saves its own."""
        case = self.draw(data)
        cases = (case, evolve(case, seed=case.seed + 1))
        pairs = [self.pair(it) for it in cases]
        technique = self.make()
        applied = [self.apply(model, technique) for model, _ in pairs]
        for it, pair in zip(cases, pairs, strict=True):
            self.call_both(it, *pair)
            self.same_state(*pair)
        changed, other = data.draw(st.permutations([0, 1]), label="changed and other")
        loaded = doubled(pairs[changed][1].state_dict())
        for model in pairs[changed]:
            model.load_state_dict(loaded)
        for it, pair in zip(cases, pairs, strict=True):
            self.same_state(*pair)
            self.call_both(it, *pair)
        self.remove(applied[changed], pairs[changed][0])
        self.same_state(*pairs[other])
        self.call_both(cases[other], *pairs[other])

    @on_random_models
    def test_a_technique_holds_no_state_of_a_run(self, data: st.DataObject) -> None:
        """A technique object is equal to a new one after a model was run with it."""
        case, model, bare = self.draw_pair(data)
        technique = self.make()
        applied = self.apply(model, technique)
        self.call_both(case, model, bare)
        promise(technique == self.make(), "a technique is as before while it is used")
        self.remove(applied, model)
        promise(technique == self.make(), "a technique is as before after it was used")


_NAMES: dict[str, Callable[[nn.Module], list[str]]] = {
    "FQNs of modules": lambda model: [fqn for fqn, _ in model.named_modules(remove_duplicate=False)],
    "FQNs of parameters": lambda model: [fqn for fqn, _ in model.named_parameters(remove_duplicate=False)],
    "FQNs of buffers": lambda model: [fqn for fqn, _ in model.named_buffers(remove_duplicate=False)],
    "keys of the state dict": lambda model: list(model.state_dict()),
}
