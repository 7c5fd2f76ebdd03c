"""Training parameters that are offloaded: step by step as without any technique."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import GroupOffload, ModelOffload, SequentialOffload

WIDTH = 16
TECHNIQUES = {
    "model": lambda: ModelOffload("sim"),
    "group": lambda: GroupOffload("sim"),
    "budget": lambda: GroupOffload("sim", memory_budget=3 * WIDTH * (WIDTH + 1) * 4),
    "blocks": lambda: GroupOffload("sim", offload_type="block_level"),
    "sequential": lambda: SequentialOffload("sim"),
    "plain": lambda: GroupOffload("sim", use_stream=False),
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
}


class Training:
    """Two models that are trained, one after another or at once."""

    def __init__(self, models, optimizer):
        self.models = models
        self.optimizers = [OPTIMIZERS[optimizer](it.parameters()) for it in models]

    def backward(self, at):
        self.models[at](torch.ones(2, WIDTH)).square().sum().backward()

    def step(self, at):
        self.optimizers[at].step()

    def zero_grad(self, at):
        self.optimizers[at].zero_grad()

    def look(self, at):
        with torch.no_grad():
            self.models[at](torch.ones(2, WIDTH))

    def freeze(self, at):
        self.models[at][0].requires_grad_(requires_grad=False)

    def thaw(self, at):
        self.models[at][0].requires_grad_(requires_grad=True)

    def state(self):
        return [
            (it.detach().cpu(), None if it.grad is None else it.grad.cpu())
            for model in self.models
            for it in model.parameters()
        ]


STEPS = [Training.backward, Training.backward, Training.step, Training.step]
STEPS += [Training.zero_grad, Training.look, Training.freeze, Training.thaw]


def same(one, other):
    return (one is None and other is None) or same_bits(one, other)


@pytest.mark.parametrize("technique", TECHNIQUES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1)), max_size=10),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
)
def test_training_goes_as_without_it(sim, technique, steps, optimizer):
    torch.manual_seed(0)
    models = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5))) for _ in range(2)]
    bare = Training(copy.deepcopy(models), optimizer)
    applied = hookcore.apply(dict(zip("ab", models, strict=True)), [TECHNIQUES[technique]()])
    trained = Training(models, optimizer)
    for step, at in steps:
        step(trained, at)
        step(bare, at)
        for found, wanted in zip(trained.state(), bare.state(), strict=True):
            assert all(map(same, found, wanted))
    applied.remove()
    for model in models:
        for it in model.parameters():
            assert it.device.type == "cpu"
            assert it.grad is None or it.grad.device.type == "cpu"
            assert not it._backward_hooks
            assert not it._post_accumulate_grad_hooks
    sim.check()
