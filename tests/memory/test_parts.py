"""Parts of an offloaded model that somebody calls by themselves compute as those of the bare model."""

from __future__ import annotations

import pytest
import torch
from attrs import frozen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import hookcore
from hookcore import Binding, Hook, Phase, Technique, UnsupportedModelError
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import DiskOffload, GroupOffload, ModelOffload, SequentialOffload


class NothingHook(Hook):
    def pre_forward(self, module, args, kwargs):
        return args, kwargs


@frozen
class Nothing(Technique):
    """Stands at every module, so that inner calls of parts cannot pass the entries by."""

    name = "nothing"
    phase = Phase.COMPUTE

    def bind(self, component):
        return [Binding(fqn, NothingHook()) for fqn in component.modules]


TECHNIQUES = {
    "model": lambda _: [ModelOffload("sim")],
    "group": lambda _: [GroupOffload("sim")],
    "blocks": lambda _: [GroupOffload("sim", offload_type="block_level")],
    "plain blocks": lambda _: [GroupOffload("sim", offload_type="block_level", use_stream=False)],
    "sequential": lambda _: [SequentialOffload("sim")],
    "disk": lambda path: [DiskOffload(path, execution_device="sim")],
    "disk on the CPU": lambda path: [DiskOffload(path)],
    "beside others": lambda _: [Nothing(), GroupOffload("sim", offload_type="block_level")],
}
ALL = pytest.mark.parametrize("technique", TECHNIQUES)
FEWER = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def record_calls(case, model):
    """Runs a model, and returns each call that it makes of a module: FQN, inputs, output."""
    calls = []

    def note(fqn):
        def hook(_module, args, kwargs, output):
            calls.append((fqn, args, kwargs, output))

        return hook

    handles = [
        module.register_forward_hook(note(fqn), with_kwargs=True)
        for fqn, module in model.named_modules()
        # torch computes this one in another way on a CPU, with other bits.
        if not isinstance(module, nn.MultiheadAttention)
    ]
    with torch.no_grad():
        case.call(model)
    for handle in handles:
        handle.remove()
    return calls


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [it for item in value for it in tensors_in(item)]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return []


@ALL
@FEWER
@given(data=st.data())
def test_any_module_can_be_called_alone(sim, tmp_path_factory, technique, data):
    case = data.draw(module_trees(), label="model")
    model, bare = case.build(), case.build()
    model.eval()
    calls = record_calls(case, bare.eval())
    record_calls(case, model)  # calls may change buffers
    if not calls or not list(model.parameters()):
        return
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    if "disk" in technique:
        save_file({name: it.contiguous().clone() for name, it in model.state_dict().items()}, path)
    try:
        applied = hookcore.apply(model, TECHNIQUES[technique](path))
    except UnsupportedModelError:  # different views of one memory are in no file
        return
    chosen = data.draw(st.lists(st.sampled_from(calls), max_size=4), label="called alone")
    with torch.no_grad():
        for fqn, args, kwargs, _ in chosen:
            found = model.get_submodule(fqn)(*args, **kwargs)
            wanted = bare.get_submodule(fqn)(*args, **kwargs)
            for one, other in zip(tensors_in(found), tensors_in(wanted), strict=True):
                assert same_bits(one.cpu(), other)
        for one, other in zip(case.call(model), case.call(bare), strict=True):
            assert same_bits(one.cpu(), other)
    applied.remove(allow_lossy=True)
    sim.check()


class Reader(nn.Module):
    """Reads the weight of a child without calling that child."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.called(functional.linear(x, self.read.weight).to(self.read.weight.dtype))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.norm = Reader(), nn.LayerNorm(8)
        self.lists = nn.ModuleList([nn.ModuleList([Reader(), nn.TransformerEncoderLayer(8, 2, 8)])])

    def forward(self, x):
        return self.norm(self.lists[0][1](self.lists[0][0](self.part(x))))


@ALL
@pytest.mark.parametrize("fqn", ["part", "norm", "part.read", "lists.0.0", "lists.0.1"])
def test_a_part_reads_the_weights_of_its_children(sim, tmp_path, technique, fqn):
    torch.manual_seed(0)
    model = Whole().eval()
    x = torch.ones(2, 8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        wanted = tensors_in(model.get_submodule(fqn)(x))
        hookcore.apply(model, TECHNIQUES[technique](tmp_path))
        for _ in range(2):
            found = tensors_in(model.get_submodule(fqn)(x))
            assert all(same_bits(one.cpu(), other) for one, other in zip(found, wanted, strict=True))


@ALL
def test_a_part_that_changed_is_bound_anew_for_its_own_call(sim, tmp_path, technique):
    torch.manual_seed(0)
    model = Whole().eval()
    x = torch.ones(2, 8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        hookcore.apply(model, TECHNIQUES[technique](tmp_path))
        model.part(x)
        model.part.called = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        bare.load_state_dict({name: it.cpu() for name, it in model.part.called.state_dict().items()})
        between = functional.linear(x, model.part.read.weight.cpu())
        assert same_bits(model.part(x).cpu(), bare(between))


@ALL
def test_a_part_that_fails_leaves_the_model_working(sim, tmp_path, technique):
    torch.manual_seed(0)
    model = Whole().eval()
    x = torch.ones(2, 8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        wanted = model(x)
        applied = hookcore.apply(model, TECHNIQUES[technique](tmp_path))
        with pytest.raises(RuntimeError):
            model.part(torch.ones(2, 9))
        assert same_bits(model(x).cpu(), wanted)
    applied.remove(allow_lossy=True)
    assert same_bits(model.part.read.weight, model.get_parameter("part.read.weight"))
