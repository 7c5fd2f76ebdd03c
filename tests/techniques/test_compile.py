"""Compiling blocks: each kind once, with all hooks outside, whatever else is on the model."""

import gc
import shutil
import weakref

import pytest
import torch
from attrs import field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import Binding, ConflictError, Hook, Phase, PlanError, Technique
from hookcore.testing import simulator
from hookcore.testing.models import autoencoder, flux, gpt2, unet
from hookcore.testing.snapshot import ModelSnapshot
from hookcore_plugins import ChannelsLast, Compile, GroupOffload, LayerwiseCasting, ModelOffload
from hookcore_plugins.compile import CompileReport
from hookcore_plugins.compile.shared_code import LIMIT


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x, scale=1):
        return x + scale * self.layers(self.norm(x))


class Other(Block):
    def forward(self, x):
        return x - self.layers(x)


class Model(nn.Module):
    def __init__(self, width=4, blocks=3, others=2):
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.others = nn.ModuleList(Other(width) for _ in range(others))

    def forward(self, x):
        x = self.stem(x)
        for block in (*self.blocks, *self.others):
            x = block(x)
        return x


class Broken(Block):
    def forward(self, x):
        x = self.layers(x)
        torch._dynamo.graph_break()
        return x + 1


class Numbered(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.number = number

    def forward(self, x):
        return self.layer(x) + self.number


class CallHook(Hook):
    def __init__(self, calls):
        self.calls = calls

    def pre_forward(self, module, args, kwargs):
        self.calls.append(type(module).__name__)


class PreparingHook(CallHook):
    def attach(self, module):
        self.calls.append("attach")


@frozen
class Watch(Technique):
    """Watches calls of one module."""

    name = "watch"
    phase = Phase.COMPUTE

    fqn: str
    calls: list = field(factory=list, eq=False)

    def bind(self, component):
        yield Binding(self.fqn, CallHook(self.calls))


@frozen
class Prepare(Watch):
    """Does something to a module, which what stands outside is taken off for, and put on again."""

    name = "prepare"

    def bind(self, component):
        yield Binding(self.fqn, PreparingHook(self.calls))


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counts(model):
    """What was counted, without the number of blocks and reasons."""
    (found,) = (it.counted for it in hookcore.status(model).run_report().entries if it.technique == "compile")
    assert bool(found.reasons) == bool(found.recompiles + found.graph_breaks)
    return {"graphs": found.graphs, "recompiles": found.recompiles, "graph breaks": found.graph_breaks}


def compiled(**options):
    return Compile(backend="eager", **options)


def once(graphs):
    return {"graphs": graphs, "recompiles": 0, "graph breaks": 0}


# With others

OTHERS = {
    "casting": lambda _: LayerwiseCasting("bfloat16", skip_modules_pattern="norm"),
    "blocks": lambda device: GroupOffload(device, offload_type="block_level"),
    "leaves": lambda device: GroupOffload(device, offload_type="leaf_level"),
    "whole": ModelOffload,
    "budget": lambda device: GroupOffload(device, memory_budget=900),
}


@pytest.mark.parametrize("device", ["cpu", "sim"])
@settings(max_examples=6, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_blocks_are_compiled_once_whatever_else_is_on_the_model(device, data, seed):
    if device == "sim":
        simulator.install()
        simulator.reset()
    torch._dynamo.reset()
    torch.manual_seed(seed)
    placing = data.draw(
        st.sampled_from([None, "blocks", "leaves", "whole", *(["budget"] if device == "sim" else [])])
    )
    casting = data.draw(st.sampled_from([None, "casting"]))
    others = [OTHERS[name](device) for name in (placing, casting) if name]
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    home = device if placing is None else "cpu"
    model.to(home), reference.to(home)
    hookcore.apply(reference, others)
    for techniques in data.draw(st.permutations([*([it] for it in others), [compiled()]])):
        hookcore.apply(model, techniques)
    with torch.no_grad():
        for _ in range(4):  # a mover learns from the first ones and places groups otherwise later on
            x = torch.randn(2, 4).to(home)
            assert torch.equal(model(x).cpu(), reference(x).cpu())
    assert counts(model) == once(2)


@pytest.mark.parametrize("name", ["blocks", "leaves", "whole"])
def test_code_is_the_same_whether_a_block_is_called_in_its_model_or_by_itself(name):
    """It would not be if it noticed that weights are read, which is asked only outside of calls."""
    model = Model(others=0)
    hookcore.apply(model, [compiled(), OTHERS[name]("cpu")])
    x = torch.randn(2, 4)
    with torch.no_grad():
        model(x)
        for block in model.blocks:
            block(x)
    assert counts(model) == once(1)


@pytest.mark.parametrize("make", [pytest.param(flux, marks=pytest.mark.slow), unet, autoencoder, gpt2])
def test_real_models_compute_the_same(make):
    case = make()
    model, reference = case.build(), case.build()
    others = [GroupOffload("cpu", offload_type="leaf_level"), LayerwiseCasting("bfloat16")]
    hookcore.apply(reference, others)
    hookcore.apply(model, [Compile(backend="aot_eager"), *others])
    entry = case.entries[-1]
    with torch.no_grad():
        first = case.call(model, entry, 0)
        found = counts(model)
        assert torch.allclose(first[0], case.call(reference, entry, 0)[0], atol=1e-5)
        for seed in (1, 2):
            got, expected = case.call(model, entry, seed), case.call(reference, entry, seed)
            assert torch.allclose(got[0], expected[0], atol=1e-5)
    assert counts(model) == found  # nothing is compiled again in later steps
    assert found["graph breaks"] == 0


def test_what_diffusers_declares_to_repeat_is_compiled():
    hookcore.apply(model := unet().build(), [compiled()])
    (step,) = hookcore.status(model).attachments
    assert {type(step.component.modules[it.fqn]).__name__ for it in step.bindings} == {
        "BasicTransformerBlock"
    }


def test_weights_may_change_between_calls():
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    hookcore.apply(model, [compiled(), GroupOffload("cpu", offload_type="leaf_level")])
    x = torch.randn(2, 4)
    with torch.no_grad():
        model(x)
        for it in (model, reference):
            it.blocks[0].layers[0].weight.mul_(2)
            it.load_state_dict({name: value + 1 for name, value in it.state_dict().items()})
            it.blocks[1].layers[2].weight.data = torch.ones(4, 4)
            it.others[0].layers[0].bias = nn.Parameter(torch.ones(4))
        assert torch.equal(model(x), reference(x))
    assert counts(model) == once(2)


@pytest.mark.parametrize("order", [[0, 1], [1, 0], None])
def test_layers_of_a_compiled_block_are_brought_together_as_long_as_it_is_compiled(order):
    model = Model()
    leaves = GroupOffload("cpu", offload_type="leaf_level")

    def brought_at():
        (found,) = (it for it in hookcore.status(model).attachments if it.technique is leaves)
        return {binding.fqn for binding in found.bindings if not binding.hook.outermost_only}

    together = {"", "stem", *(f"blocks.{at}" for at in range(3)), *(f"others.{at}" for at in range(2))}
    techniques = [compiled(), leaves]
    for group in [techniques] if order is None else [[techniques[at]] for at in order]:
        handle = hookcore.apply(model, group)
    assert brought_at() == together
    model(torch.randn(2, 4))
    if order is not None:
        hookcore.remove(model)
        hookcore.apply(model, [leaves])
        with hookcore.apply(model, [compiled()]):
            assert brought_at() == together
        assert {"blocks.0.norm", "blocks.0.layers.0"} < brought_at()
    else:
        handle.remove()


# What may stand where


def test_a_hook_inside_of_a_compiled_block_is_refused_and_one_at_it_is_called():
    model = Model()
    hookcore.apply(model, [compiled()])
    before = ModelSnapshot.take(model)
    with pytest.raises(
        ConflictError, match=r"compile runs all that is in 'blocks\.1' as one, so that watch cannot stand at"
    ):
        hookcore.apply(model, [Watch("blocks.1.layers")])
    before.assert_restored(model, same_storage=True)
    watch = Watch("blocks.1")
    hookcore.apply(model, [watch])
    with torch.no_grad():
        model(torch.randn(2, 4))
        model(torch.randn(2, 4))
    assert watch.calls == ["Block"] * 2
    assert counts(model) == once(2)
    hookcore.remove(model)
    hookcore.apply(model, [Watch("blocks.1.layers")])
    with pytest.raises(ConflictError, match="cannot stand"):
        hookcore.apply(model, [compiled()])


def test_a_whole_model_is_compiled_where_nothing_is_brought_for_its_parts():
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 4)
    handle = hookcore.apply(model, [compiled(regional=False), ModelOffload("cpu")])
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
        model(x)
    assert counts(model) == once(1)
    handle.remove()
    for other in (GroupOffload("cpu", offload_type="leaf_level"), LayerwiseCasting("bfloat16")):
        with pytest.raises(ConflictError, match="hides the modules below it"):
            hookcore.apply(model, [compiled(regional=False), other])


def test_our_own_compiling_is_no_foreign_mechanism_and_a_users_is():
    model = Model()
    hookcore.apply(model, [compiled()])
    hookcore.apply(model, [GroupOffload("cpu")])
    hookcore.remove(model)
    model.blocks[0].compile(backend="eager")
    with pytest.raises(ConflictError, match=r"compiled in place by module\.compile"):
        hookcore.apply(model, [compiled()])


# Counting


def test_graph_breaks_are_counted_with_their_reason():
    model = nn.Sequential(Broken(4), Broken(4))
    hookcore.apply(model, [compiled()])
    with torch.no_grad():
        model(torch.randn(2, 4))
    assert counts(model)["graph breaks"] == 1
    assert "Sequential: 1 x graph break: " in str(hookcore.status(model).run_report())
    hookcore.remove(model)
    hookcore.apply(model, [compiled(fullgraph=True)])
    with pytest.raises(Exception, match="graph_break"):
        model(torch.randn(2, 4))


def test_recompiles_are_counted_with_their_reason():
    model = Model()
    handle = hookcore.apply(model, [compiled()])
    for width in (2, 3):
        model(torch.randn(width, 4))
    assert counts(model) == {"graphs": 4, "recompiles": 2, "graph breaks": 0}
    (entry,) = handle.run_report().entries
    assert entry.counted.blocks == 5
    assert sum(entry.counted.reasons.values()) == 2
    assert all("size mismatch at index 0. expected 2, actual 3" in it for it in entry.counted.reasons)
    handle.reset()
    model(torch.randn(3, 4))
    (entry,) = handle.run_report().entries
    assert entry.counted == CompileReport(blocks=5)


def test_dynamic_shapes_need_no_recompile():
    model = Model()
    hookcore.apply(model, [compiled(dynamic=True)])
    for width in (2, 3, 5):
        model(torch.randn(width, 4))
    assert counts(model) == once(2)


def test_what_others_compile_is_not_counted():
    model = Model()
    hookcore.apply(model, [compiled()])
    model(torch.randn(2, 4))
    torch.compile(Model(), backend="eager")(torch.randn(2, 4))
    model(torch.randn(2, 4))
    assert counts(model) == once(2)


@settings(max_examples=4, deadline=None)
@given(widths=st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=12))
def test_blocks_of_other_sizes_have_code_of_their_own(widths):
    torch._dynamo.reset()
    blocks = nn.ModuleList(Block(width) for width in widths)
    hookcore.apply(blocks, [compiled()])
    for width, block in zip(widths, blocks, strict=True):
        block(torch.randn(2, width))
    assert counts(blocks) == once(len(set(widths)))


@pytest.mark.skipif(
    LIMIT not in __import__("inspect").signature(torch.compile).parameters,
    reason="torch has one limit for all",
)
def test_no_block_is_left_out_where_code_depends_on_its_number():
    model = nn.Sequential(*map(Numbered, range(12)))
    hookcore.apply(model, [compiled()])
    model(torch.randn(2, 4))
    assert counts(model)["graphs"] == 12


# Coming and going


def test_removal_frees_what_was_compiled_and_leaves_no_trace():
    model = Model()
    before = ModelSnapshot.take(model)
    handle = hookcore.apply(model, [compiled()])
    model(torch.randn(2, 4))
    hook = handle.plan.steps[0].bindings[0].hook
    (function,) = hook._code._compiled
    code = weakref.ref(hook._code._compiled[function])
    handle.remove()
    gc.collect()
    assert code() is None
    before.assert_restored(model, same_storage=True)
    handle = hookcore.apply(model, [compiled()])
    model(torch.randn(2, 4))
    assert counts(model) == once(2)


def test_what_comes_and_goes_outside_compiles_nothing_again():
    model = Model()
    hookcore.apply(model, [compiled()])
    with torch.no_grad():
        model(torch.randn(2, 4))
        with hookcore.apply(model, [Watch("blocks.0"), Watch("")][1:]):
            model(torch.randn(2, 4))
        model(torch.randn(2, 4))
    assert counts(model) == once(2)


def test_an_error_inside_leaves_weights_where_they_were():
    class Failing(Block):
        def forward(self, x):
            if x.shape[0] == 5:
                raise ZeroDivisionError
            return x + self.layers(x)

    model = nn.Sequential(Failing(4), Failing(4))
    hookcore.apply(model, [compiled(), LayerwiseCasting("bfloat16", skip_modules_pattern="norm")])
    with torch.no_grad():
        expected = model(torch.ones(2, 4))
        with pytest.raises(ZeroDivisionError):
            model(torch.ones(5, 4))
        assert model[0].layers[0].weight.dtype is torch.bfloat16
        assert torch.equal(model(torch.ones(2, 4)), expected)


def test_torchs_marks_on_tensors_go_and_the_users_own_stay():
    model = Model()
    torch._dynamo.mark_static_address(model.blocks[0].norm.weight)
    before = ModelSnapshot.take(model)
    with hookcore.apply(model, [compiled()]):
        model(torch.randn(2, 4))
        inside = [Prepare("stem"), ChannelsLast(), LayerwiseCasting("bfloat16", keep_originals=True)]
        with hookcore.apply(model, inside):
            model(torch.randn(2, 4))
    before.assert_restored(model, same_storage=True)


# What cannot be


def test_options_are_those_of_torch():
    with pytest.raises(TypeError, match="torch.compile has no option 'fullgrap'; it has .*fullgraph"):
        Compile(fullgrap=True)
    for options in ({"backend": "no_such_backend"}, {"mode": "max-autotune", "options": {"x": 1}}):
        with pytest.raises(PlanError, match="torch.compile refuses"):
            hookcore.plan(Model(), [Compile(**options)])
    assert Compile(options={"trace.enabled": True}) == Compile(options={"trace.enabled": True})
    assert Compile(dynamic=True) != Compile(dynamic=False)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(PlanError, match=r"'Linear' has no repeated blocks.* Compile\(regional=False\)"):
        hookcore.plan(nn.Linear(2, 2), [compiled()])


def test_a_component_of_a_pipeline_without_blocks_is_left_alone_unless_it_is_named():
    models = {"blocks": Model(), "none": nn.Linear(4, 4)}
    applied = hookcore.apply(models, [compiled()])
    assert "none: it has no repeated blocks" in str(applied)
    applied.remove()
    with pytest.raises(PlanError, match="'none' has no repeated blocks"):
        hookcore.plan(models, {"none": [compiled()]})
    assert len(hookcore.plan(models, [compiled(regional=False)]).steps) == 2


def test_a_block_with_a_module_that_also_stands_outside_is_left_alone():
    model = Model()
    model.blocks[0].layers[0] = model.stem
    plan = hookcore.plan(model, [compiled()])
    assert "blocks.0: a module in it also stands at 'stem', which is not compiled" in str(plan)
    assert len(plan.steps[0].bindings) == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("make", [flux, unet])
def test_inductor(make):
    case = make()
    model, reference = case.build(), case.build()
    hookcore.apply(model, [Compile(fullgraph=True), GroupOffload("cpu", offload_type="leaf_level")])
    with torch.no_grad():
        for seed in range(3):
            got, expected = case.call(model, seed=seed), case.call(reference, seed=seed)
            assert torch.allclose(got[0], expected[0], atol=1e-4)
            if not seed:
                found = counts(model)
    assert counts(model) == found
