"""Any sequence of applying, removing, calling, failing, copying, loading and changing, against a list."""

import itertools

import pytest
from attrs import evolve, frozen
from hypothesis import Phase as HypothesisPhase
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test
from techniques import ENTRIES, Moving, Pushing, Recording, Scaling, SwallowsErrors, toy

import hookcore
from hookcore import Binding, Claim, Component, ConflictError, Hook, ModelConventions, Phase
from hookcore.stack import HookStack
from hookcore.testing import HookMachine, ModelCase
from hookcore.testing.modules import Recipe, TreeModel, linear, sequential
from hookcore.testing.snapshot import ModelSnapshot

LABELS = ("one", "two", "three")


@frozen(eq=False)
class TaggedLog:
    """Writes modules where hooks write FQNs, which mean something in one component only."""

    log: list
    modules: dict

    def append(self, event):
        what, label, fqn, entry = event
        self.log.append((what, label, self.modules[fqn], entry))


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


class Machine(HookMachine):
    """The public machine, with a reference that knows which hooks are where, in which order, and why not."""

    def __init__(self):
        super().__init__()
        self.log = []
        self.owns = {}

    def techniques(self):
        return [Moving(), Pushing(), Scaling()]

    @property
    def reads_true(self):
        return not any(isinstance(item.technique, Scaling) for item in self.items)

    @rule(data=st.data())
    def apply_recording(self, data):
        label = data.draw(st.sampled_from(LABELS))
        phase = data.draw(st.sampled_from([Phase.SPLIT, Phase.COMPUTE]))
        fqn = data.draw(st.sampled_from(self.targets()))
        modules = dict(self.model.get_submodule(fqn).named_modules())
        inner = Recording(TaggedLog(self.log, modules), label, data.draw(st.booleans()))

        def bind(component):
            return [evolve(binding, claims=[Claim(label)]) for binding in inner.bind(component)]

        self.put_on(toy(label, bind, phase=phase), fqn)

    def put_on(self, technique, fqn):
        if isinstance(technique, Scaling):
            fqn = ""  # to the whole: what reads a weight directly has to see its true value
        target = self.model.get_submodule(fqn)
        owns = owned(technique, target)
        if any(owns & self.owns[item] for item in self.items):
            before = ModelSnapshot.take(self.model)
            with pytest.raises(ConflictError):
                hookcore.apply(target, [technique])
            before.assert_restored(self.model, same_storage=True)
            return
        super().put_on(technique, fqn)
        self.owns[self.items[-1]] = owns
        assert self.items[-1].target is target

    def call_entry(self, entry, seed):
        self.log.clear()
        super().call_entry(entry, seed)
        self.check_log()
        expected = self.expected_labels(id(self.model), entry)
        through = {(id(module), called) for _, _, module, called in self.log}
        assert bool(expected) == ((id(self.model), entry) in through)

    def fail_entry(self, entry, seed, fqn):
        self.log.clear()
        super().fail_entry(entry, seed, fqn)
        self.check_log()

    def check_log(self):
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

    def expected_labels(self, module, entry):
        return [
            item.technique.name
            for item in sorted(self.items, key=lambda item: item.technique.phase)
            if item.technique.name in LABELS and (item.technique.name, module, entry) in self.owns[item]
        ]

    @invariant()
    def what_is_on_is_what_the_list_says_in_that_order(self):
        expected = [item.technique for item in sorted(self.items, key=lambda item: item.technique.phase)]
        assert [it.technique for it in hookcore.status(self.model).attachments] == expected

    @invariant()
    def entries_have_hooks_where_something_is_on_and_nowhere_else(self):
        for module in self.model.modules():
            for entry in ENTRIES:
                hooked = any(
                    (item.technique.name, id(module), entry) in self.owns[item] for item in self.items
                )
                assert (HookStack.at(module, entry) is not None) == hooked


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
TestMachine = Machine.TestCase


# The public machine finds what is wrong


class AddsOne(Hook):
    def post_forward(self, module, output):
        return output + 1


class LeavesAnAttribute(Hook):
    def attach(self, module):
        vars(module)["_left"] = 1


class KeepsWhatItSaw(Hook):
    def attach(self, module):
        self.kept = {name: it.detach().clone() for name, it in module.named_parameters(recurse=False)}

    def pre_forward(self, module, args, kwargs):
        for name, tensor in self.kept.items():
            getattr(module, name).data.copy_(tensor)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AddsOne, r"forward\(\) gives the outputs of the bare model, in a call"),
        (LeavesAnAttribute, "as it ever was: .*'_left' was added"),
        (SwallowsErrors, "reaches the caller of forward\\(\\) unchanged"),
        (KeepsWhatItSaw, "gives the outputs of the bare model, in a call|state_dict\\(\\) has the true"),
    ],
)
def test_the_machine_finds_what_is_wrong(kind, message):
    class Broken(HookMachine):
        def techniques(self):
            return [toy("broken", lambda component: [Binding(fqn, kind()) for fqn in component.modules])]

        def models(self):
            return st.just(ModelCase(TreeModel(Recipe(sequential, (Recipe(linear),)), 4)))

    finding = settings(
        Broken.TestCase.settings,
        max_examples=500,
        derandomize=True,
        database=None,
        phases=[HypothesisPhase.generate],
    )
    with pytest.raises(AssertionError, match=message):
        run_state_machine_as_test(Broken, settings=finding)


def test_an_author_who_forgets_the_techniques_is_told():
    with pytest.raises(NotImplementedError, match=r"^HookMachine has to define techniques\(\)$"):
        HookMachine().techniques()
