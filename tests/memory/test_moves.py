"""Moves of offloaded models: refused with the remedy, or done without breaking what is offloaded."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import ConflictError, HookcoreError
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import GroupOffload, ModelOffload, SequentialOffload

TECHNIQUES = {
    "model": lambda: ModelOffload("sim"),
    "group": lambda: GroupOffload("sim"),
    "budget": lambda: GroupOffload("sim", memory_budget="90KB"),
    "blocks": lambda: GroupOffload("sim", offload_type="block_level"),
    "excluded": lambda: GroupOffload("sim", exclude_modules=["1"]),
    "sequential": lambda: SequentialOffload("sim"),
    "plain": lambda: GroupOffload("sim", use_stream=False),
}


class Told(nn.Sequential):
    """Tells its device as models of diffusers and transformers do."""

    @property
    def device(self):
        return next(self.parameters()).device


def build(kind):
    torch.manual_seed(0)
    return kind(*[nn.Linear(32, 32) for _ in range(6)], nn.BatchNorm1d(32)).eval()


def around(model):
    return nn.ModuleList([model])


MOVES = {
    "to the host": lambda model: model.to("cpu"),
    "cpu": lambda model: model.cpu(),
    "to the accelerator": lambda model: model.to("sim"),
    "to another one": lambda model: model.to("sim:1"),
    "a part": lambda model: model[0].to("cpu"),
    "a part onto it": lambda model: model[6].to("sim"),
    "around": lambda model: around(model).to("cpu"),
    "around, onto it": lambda model: around(model).to("sim"),
    "around, another": lambda model: around(model).to("sim:1"),
    "applied by others": lambda model: model._apply(lambda it: it.to("sim:1")),
    "memory shared": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    kind=st.sampled_from([Told, nn.Sequential]),
    moves=st.lists(st.sampled_from([*MOVES, "call"]), min_size=1, max_size=4),
)
def test_a_move_leaves_the_model_working(sim, technique, kind, moves):
    model, bare = build(kind), build(kind)
    before = ModelSnapshot.take(model, twin=bare)
    x = torch.ones(2, 32)
    applied = hookcore.apply(model, [TECHNIQUES[technique]()])
    with torch.no_grad():
        for move in moves:
            if move == "call":
                assert same_bits(model(x).cpu(), bare(x))
            else:
                with contextlib.suppress(HookcoreError):
                    MOVES[move](model)
        assert same_bits(model(x).cpu(), bare(x))
    applied.remove()
    if "memory shared" not in moves:
        before.assert_restored(model)


@pytest.mark.parametrize("kind", [Told, nn.Sequential])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_model_can_be_saved_as_people_do_it(sim, technique, kind, tmp_path):
    model, bare = build(kind), build(kind)
    hookcore.apply(model, [TECHNIQUES[technique]()])
    with torch.no_grad():
        model(torch.ones(2, 32))
    saved = {name: it.cpu() for name, it in model.cpu().state_dict().items()}
    for name, it in bare.state_dict().items():
        assert same_bits(saved[name], it)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize(
    "convert", [lambda it: it.double(), lambda it: it.half(), lambda it: it.to("sim", torch.bfloat16)]
)
def test_a_conversion_is_taken(sim, technique, convert):
    model, bare = build(nn.Sequential), build(nn.Sequential)
    hookcore.apply(model, [TECHNIQUES[technique]()])
    with torch.no_grad():
        convert(model)
        bare.to(model[0].weight.dtype)
        x = torch.ones(2, 32, dtype=model[0].weight.dtype)
        assert same_bits(model(x).cpu(), bare(x))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_move_to_where_nothing_lies_is_refused_before_anything_moves(sim, technique):
    model = build(nn.Sequential)
    hookcore.apply(model, [TECHNIQUES[technique]()])
    where = [it.device for it in model.parameters()]
    for move in (lambda: model.to("sim:1"), lambda: model[0].to("sim:1"), lambda: around(model).to("sim:1")):
        with pytest.raises(ConflictError, match=r"cannot move \w+ to 'sim:1': it is offloaded.*remove\(\)"):
            move()
    assert [it.device for it in model.parameters()] == where


def test_copies_can_be_moved(sim):
    model = build(nn.Sequential)
    hookcore.apply(model, [GroupOffload("sim")])
    assert next(copy.deepcopy(model).to("sim:1").parameters()).device.index == 1
