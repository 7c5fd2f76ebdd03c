"""An interrupt at any line of the engine leaves a model that works, and from which everything can be removed.

The techniques are toys whose hooks are not interrupted; `make stress` interrupts real ones, too.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from stress.scenes import in_another_thread
from stress.tracing import interrupted
from techniques import toy
from torch import nn

import hookcore
from hookcore import Binding, Hook, Phase
from hookcore.testing import ModelSnapshot

X = torch.ones(2, 4)


class Halving(Hook):
    """Has a layer's weight be at half of its value between calls; is not interrupted itself."""

    swaps_weights = True

    def attach(self, module):
        module.weight.data = module.weight.data / 2

    def detach(self, module):
        module.weight.data = module.weight.data * 2

    def pre_forward(self, module, args, kwargs):
        self.detach(module)

    def post_forward(self, module, output):
        self.attach(module)

    def on_error(self, module, error):
        self.attach(module)


class Marking(Hook):
    """Leaves a mark on a module, and adds nothing to what comes out."""

    def attach(self, module):
        vars(module).setdefault("_marks", []).append(self)

    def detach(self, module):
        assert module._marks.pop() is self
        if not module._marks:
            del module._marks

    def around_forward(self, module, call, /, *args, **kwargs):
        return call(*args, **kwargs)


class Layer(nn.Linear):
    """A layer with a way of its own to be copied, which hooks have to be left out of, too."""

    def __deepcopy__(self, memo):
        copied = Layer(self.in_features, self.out_features)
        copied.load_state_dict(self.state_dict())
        return copied


def on_each_layer(make_hook, component):
    for fqn, module in component.modules.items():
        if isinstance(module, nn.Linear):
            yield Binding(fqn, make_hook())


halving = partial(toy, "halving", partial(on_each_layer, Halving), phase=Phase.PLACE)
marking = partial(toy, "marking", partial(on_each_layer, Marking))


class Subject:
    """A model and techniques that prepare modules and swap weights; one more is on a part of it already."""

    def __init__(self):
        self.model = nn.Sequential(Layer(4, 4), Layer(4, 4))
        self.before = ModelSnapshot.take(self.model)
        self.output = self.model(X)
        hookcore.apply(self.model[0], [toy("earlier", partial(on_each_layer, Marking))])
        self.techniques = [marking(), halving()]

    def apply(self):
        self.applied = hookcore.apply(self.model, self.techniques)

    def call(self):
        assert torch.equal(self.model(X), self.output)

    def reset(self):
        self.applied.reset()

    def remove(self):
        self.applied.remove()


VERBS = ["apply", "call", "reset", "remove"]


def interrupted_at(verb, at):
    """Interrupts a verb; returns what it was done with, the tracer, and the interrupt if it came out."""
    subject = Subject()
    return subject, *interrupted(subject, VERBS, verb, at)


@pytest.mark.usefixtures("few_objects_to_collect")
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_any_line_leaves_a_model_that_works(verb):
    interrupted_at(verb, None)  # once for what is done only once in a process
    _, tracer, _ = interrupted_at(verb, None)
    for number in tracer.first_and_last():
        # With all its frames, as an interactive session keeps it.
        subject, tracer, error = interrupted_at(verb, number)
        assert error is not None, f"{tracer.where} was not reached"
        try:
            check(subject)
        except BaseException as fault:
            fault.add_note(f"interrupted before {tracer.where}")
            raise


def check(subject):
    """The techniques are on or none is; calls are right, no lock is kept, and everything can be removed."""
    there = [item.technique for item in hookcore.status(subject.model).attachments]
    own = [technique for technique in there if any(technique is it for it in subject.techniques)]
    assert len(own) in (0, len(subject.techniques))
    assert len(there) == len(own) + 1
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    subject.call()
    in_another_thread(subject.call)
    in_another_thread(lambda: hookcore.remove(subject.model))
    assert not hookcore.status(subject.model).attachments
    subject.before.assert_restored(subject.model)
    subject.call()
