"""Any sequence of applying, removing, calling, failing, copying, loading and changing, against a list."""

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from attrs import frozen
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from techniques import ENTRIES, Moving, Pushing, Recording, Scaling, toy
from torch import nn

import hookcore
from hookcore import Component, ConflictError, ModelConventions, Phase
from hookcore.stack import HookStack
from hookcore.testing.modules import ModelCase, module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits

LABELS = ("one", "two", "three")


class InjectedError(Exception):
    pass


@frozen(eq=False)
class TaggedLog:
    """Writes modules where hooks write FQNs, which mean something in one component only."""

    log: list
    modules: dict

    def append(self, event):
        what, label, fqn, entry = event
        self.log.append((what, label, self.modules[fqn], entry))


@frozen(eq=False)
class Item:
    """One technique that is on, as the reference knows it."""

    handle: hookcore.Applied
    technique: hookcore.Technique
    target: nn.Module
    owns: frozenset


def owned(technique, target):
    """All that a technique claims: entries by its name, and, where it moves weights, tensors and places."""
    entries = ENTRIES
    if isinstance(technique, (Moving, Scaling)):
        on = Component("", target, lambda _: ModelConventions())
        kind = technique.name
        things = {(kind, id(it)) for slot in on.slots for it in slot.tensors}
        things |= {(kind, id(owner), name) for slot in on.slots for owner, name in slot.owners}
        return frozenset(things | {(kind, id(target), entry) for entry in entries if hasattr(target, entry)})
    if isinstance(technique, Pushing):
        entries = ("forward",)
    return frozenset(
        (technique.name, id(module), entry)
        for module in target.modules()
        for entry in entries
        if hasattr(module, entry)
    )


class Machine(RuleBasedStateMachine):
    @initialize(case=module_trees(), gradients=st.booleans())
    def build(self, case, gradients):
        self.case = case
        self.gradients = gradients
        self.model, self.twin = case.build(), case.build()
        self.pristine = ModelSnapshot.take(self.model, twin=self.twin)
        self.items = []
        self.log = []
        self.removed = []

    # What is on

    @property
    def true_at_rest(self):
        return not any(isinstance(item.technique, Scaling) for item in self.items)

    def targets(self):
        return st.sampled_from(list(dict(self.model.named_modules())))

    @rule(data=st.data())
    def apply_recording(self, data):
        label = data.draw(st.sampled_from(LABELS))
        phase = data.draw(st.sampled_from([Phase.SPLIT, Phase.COMPUTE]))
        fqn = data.draw(self.targets())
        modules = dict(self.model.get_submodule(fqn).named_modules())
        inner = Recording(TaggedLog(self.log, modules), label, data.draw(st.booleans()))
        self.put_on(toy(label, inner.bind, phase=phase), fqn)

    @rule(data=st.data())
    def apply_moving(self, data):
        self.put_on(Moving(), data.draw(self.targets()))

    @rule(data=st.data())
    def apply_pushing(self, data):
        self.put_on(Pushing(), data.draw(self.targets()))

    @rule()
    def apply_scaling(self):
        self.put_on(Scaling(), "")  # to the whole: what reads a weight directly has to see its true value

    def put_on(self, technique, fqn):
        target = self.model.get_submodule(fqn)
        owns = owned(technique, target)
        if any(owns & item.owns for item in self.items):
            before = ModelSnapshot.take(self.model)
            with pytest.raises(ConflictError):
                hookcore.apply(target, [technique])
            before.assert_restored(self.model, same_storage=True)
            return
        self.items.append(Item(hookcore.apply(target, [technique]), technique, target, owns))

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def remove_one(self, data):
        item = data.draw(st.sampled_from(self.items))
        self.items.remove(item)
        item.handle.remove()
        self.removed.append(item)

    @precondition(lambda self: self.removed)
    @rule(data=st.data())
    def remove_again(self, data):
        data.draw(st.sampled_from(self.removed)).handle.remove()

    @rule()
    def remove_all(self):
        hookcore.remove(self.model)
        self.removed += self.items
        self.items.clear()

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def reset(self, data):
        data.draw(st.sampled_from(self.items)).handle.reset()

    # What is done with the model

    @rule(data=st.data(), seed=st.integers(0, 3))
    def call(self, data, seed):
        entry = data.draw(st.sampled_from(self.case.entries))
        self.log.clear()
        with torch.set_grad_enabled(self.gradients):
            got = self.case.call(self.model, entry, seed)
            expected = self.case.call(self.twin, entry, seed)
        assert len(got) == len(expected)
        assert all(map(same_bits, got, expected))
        self.check_log(entry)

    @rule(data=st.data(), seed=st.integers(0, 3))
    def call_that_fails(self, data, seed):
        entry = data.draw(st.sampled_from(self.case.entries))
        fqn = data.draw(self.targets())
        self.log.clear()
        results, failed = [], ("failed", None)
        for model in (self.model, self.twin):
            handle = model.get_submodule(fqn).register_forward_pre_hook(fail)
            with torch.set_grad_enabled(self.gradients):
                try:
                    results.append(self.case.call(model, entry, seed))
                except InjectedError as error:
                    results.append(("failed", getattr(error, "__notes__", None)))
                finally:
                    handle.remove()
        if failed in results:
            assert results == [failed, failed]
        else:  # the module is not called, or not in this entry
            assert all(map(same_bits, *results))
        self.check_log(None)

    def check_log(self, entry):
        """Each call of each entry went in through its hooks, and out again or told of the error."""
        through = {}
        for what, label, module, called in self.log:
            through.setdefault((id(module), called), []).append((what, label))
        for (module, called), events in through.items():
            expected = self.expected_labels(module, called)
            assert expected
            rest = events
            while rest:
                entering = [label for what, label in itertools.takewhile(lambda it: it[0] == "pre", rest)]
                leaving = rest[len(entering) : 2 * len(entering)]
                assert entering == expected
                assert [label for _, label in leaving] == expected[::-1]
                assert {what for what, _ in leaving} in ({"post"}, {"error"})
                rest = rest[2 * len(entering) :]
        if entry is not None:
            expected = self.expected_labels(id(self.model), entry)
            assert bool(expected) == ((id(self.model), entry) in through)

    def expected_labels(self, module, entry):
        return [
            item.technique.name
            for item in sorted(self.items, key=lambda item: item.technique.phase)
            if item.technique.name in LABELS and (item.technique.name, module, entry) in item.owns
        ]

    @precondition(lambda self: self.true_at_rest)
    @rule(
        way=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]), data=st.data()
    )
    def copy(self, way, data):
        copied, twin = way(self.model), way(self.twin)
        assert hookcore.status(copied).attachments == ()
        entry = data.draw(st.sampled_from(self.case.entries))
        assert all(map(same_bits, self.case.call(copied, entry), self.case.call(twin, entry)))
        assert not any(HookStack in map(type, vars(module).values()) for module in copied.modules())

    @precondition(lambda self: self.true_at_rest)
    @rule(seed=st.integers(0, 3))
    def load(self, seed):
        self.check_state()
        other = ModelCase(self.case.blueprint, seed).build().state_dict()
        for model in (self.model, self.twin):
            model.load_state_dict(other)
        self.check_state()

    def check_state(self):
        got, expected = self.model.state_dict(), self.twin.state_dict()
        assert list(got) == list(expected)
        assert all(map(same_bits, got.values(), expected.values()))

    @precondition(lambda self: self.true_at_rest)
    @rule(data=st.data())
    def replace_a_parameter(self, data):
        fqns = [fqn for fqn, _ in self.model.named_parameters()]
        if not fqns:
            return
        holder, _, name = data.draw(st.sampled_from(fqns)).rpartition(".")
        for model in (self.model, self.twin):
            module = model.get_submodule(holder)
            old = getattr(module, name)
            setattr(module, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))

    # What always holds

    @invariant()
    def what_is_on_is_what_the_list_says(self):
        expected = [item.technique for item in sorted(self.items, key=lambda item: item.technique.phase)]
        assert [it.technique for it in hookcore.status(self.model).attachments] == expected

    @invariant()
    def entries_have_hooks_where_something_is_on_and_nowhere_else(self):
        if self.items:
            for module in self.model.modules():
                for entry in ENTRIES:
                    hooked = any((item.technique.name, id(module), entry) in item.owns for item in self.items)
                    assert (HookStack.at(module, entry) is not None) == hooked
        else:
            self.pristine.assert_restored(self.model)

    def teardown(self):
        with contextlib.suppress(AttributeError):  # nothing was built
            hookcore.remove(self.model)


def fail(module, args):
    raise InjectedError


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
TestMachine = Machine.TestCase
