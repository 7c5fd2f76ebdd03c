"""Casting under interrupts: wherever one comes, calls are right, and removing gives the originals back."""

from __future__ import annotations

import pytest
import torch
from stress.tracing import interrupted
from torch import nn
from torch.nn import functional as F  # noqa: N812

import hookcore
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import LayerwiseCasting

X = torch.linspace(-2, 2, 8).reshape(2, 4)
FP8 = torch.float8_e4m3fn
VERBS = ("apply", "call", "fail", "remove")


class Model(nn.Module):
    """Layers that are called, that share a weight, and one that is only read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.read = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.broken = False

    def forward(self, x):
        x = F.linear(self.first(x), self.read.weight)
        if self.broken:
            raise ValueError
        return self.second(x)


class Subject:
    """A model under casting that keeps originals, and the outputs with and without it."""

    def __init__(self):
        self.model = Model().eval()
        self.before = ModelSnapshot.take(self.model)
        with torch.no_grad():
            self.plain = self.model(X)
            rounded = Model().eval()
            for parameter in rounded.parameters():
                parameter.copy_(parameter.to(FP8))
            self.rounded = rounded(X)

    def apply(self):
        hookcore.apply(self.model, [LayerwiseCasting(FP8, keep_originals=True)])

    @torch.no_grad()
    def call(self):
        self.output = self.model(X)

    @torch.no_grad()
    def fail(self):
        self.model.broken = True
        try:
            self.model(X)
        except ValueError:
            pass
        finally:
            self.model.broken = False

    def remove(self):
        hookcore.remove(self.model)

    def check(self):
        """Casting is on or not; calls are right, and removing finishes."""
        cast = bool(hookcore.status(self.model).attachments)
        self.call()
        assert same_bits(self.output, self.rounded if cast else self.plain)
        self.remove()
        self.before.assert_restored(self.model)
        assert all(type(module._parameters) is dict for module in self.model.modules())
        self.call()
        assert same_bits(self.output, self.plain)


def interrupted_at(verb, at):
    """Interrupts a verb; returns what it was done with, the tracer, and the interrupt if it came out."""
    subject = Subject()
    return subject, *interrupted(subject, VERBS, verb, at)


@pytest.mark.usefixtures("few_objects_to_collect")
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_any_line_leaves_weights_that_can_be_given_back(verb):
    interrupted_at(verb, None)  # once for what is done only once in a process
    _, tracer, _ = interrupted_at(verb, None)
    faults = []
    for number in tracer.first_and_last():
        subject, tracer, error = interrupted_at(verb, number)
        assert error is not None, f"{tracer.where} was not reached"
        try:
            subject.check()
        except Exception as fault:  # noqa: BLE001 - all are told together
            faults.append(f"{tracer.where}: {fault!r:.200}")
    assert not faults, "\n".join(faults)
