"""A copy of a model of which techniques have moved or converted tensors is a plain model that computes."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import hookcore
from hookcore.errors import BudgetError, PlanError
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import DiskOffload, GroupOffload, LayerwiseCasting, ModelOffload, SequentialOffload


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_process(model):
    """As `torch.multiprocessing` sends it."""
    return pickle.loads(ForkingPickler.dumps(model))


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch,
    "process": through_a_process,
}
OFFLOADS = {
    "sequential": SequentialOffload,
    "model": ModelOffload,
    "groups": GroupOffload,
    "groups without streams": lambda device: GroupOffload(device, use_stream=False),
    "blocks": lambda device: GroupOffload(device, offload_type="block_level"),
    "groups with a budget": lambda device: GroupOffload(device, memory_budget="1KB"),
    "pinned groups": lambda device: GroupOffload(device, pin_groups="first_last"),
    "excluded": lambda device: GroupOffload(device, exclude_modules=["0"]),
}


class Exchanging(nn.Module):
    """Puts another tensor in the place of its buffer at each call, and registers one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.seen = self.seen + 1
        self.register_buffer("last", x.detach()[:1].clone(), persistent=False)
        return x * self.scale + self.seen


class Mixed(nn.Sequential):
    """Ties, buffers that calls change and exchange, parameters without gradients."""

    def __init__(self):
        super().__init__(
            nn.Linear(4, 4), nn.BatchNorm1d(4), Exchanging(), nn.Linear(4, 4), Exchanging(), nn.Linear(4, 4)
        )
        self[3].weight = self[0].weight
        self[5].weight.requires_grad_(False)
        self[5].weight.tag = "mine"


class MixedCase:
    """As a `ModelCase`."""

    entries = ("forward",)

    def build(self):
        torch.manual_seed(0)
        return Mixed().eval()

    def call(self, model, entry="forward", seed=0, device="cpu"):
        return [getattr(model, entry)(torch.linspace(-1, 1, 12, device=device).view(3, 4) + seed)]


def case_strategy():
    return st.one_of(module_trees(), st.builds(MixedCase))


def devices_of(model):
    return {it.device for it in (*model.parameters(), *model.buffers())}


def ties(model):
    """Which names of parameters and buffers are of one object."""
    names = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return sorted(names.values())


def assert_is_copy_of(bare, copied, case, home):
    assert not hookcore.status(copied).techniques
    assert devices_of(copied) == devices_of(bare)
    assert ties(copied) == ties(bare)
    for module, plain in zip(copied.modules(), bare.modules(), strict=True):
        assert vars(module).keys() == vars(plain).keys()
        assert type(module._parameters) is type(module._buffers) is dict
        for name, tensor in plain._parameters.items():
            if tensor is not None:
                assert module._parameters[name].requires_grad == tensor.requires_grad
                assert vars(module._parameters[name]).keys() <= vars(tensor).keys()
    assert all(map(same_bits, case.call(copied, device=home), case.call(copy.deepcopy(bare), device=home)))


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
@given(
    case=case_strategy(),
    options=st.tuples(
        st.sampled_from(sorted(WAYS)),
        st.sampled_from(["cpu", "sim:0", "sim:1"]),
        st.integers(0, 2),
        st.booleans(),
    ),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_copies_are_plain_models_where_the_original_came_from(sim, offload, case, options):
    way, home, calls, casts = options
    assume(way != "process" or home == "cpu")  # torch itself sends no other tensors of the simulator's kind
    model, bare = case.build().to(home), case.build().to(home)
    techniques = [LayerwiseCasting(skip_modules_pattern=())] if casts else []
    try:
        hookcore.apply(model, [*techniques, offload("sim:0")])
    except (PlanError, BudgetError):
        assume(False)
    if casts:
        round_like(bare, model)
    with torch.no_grad():
        for seed in range(calls):
            case.call(bare, seed=seed, device=home)
            case.call(model, seed=seed, device=home)
        copied = WAYS[way](model)
        assert_is_copy_of(bare, copied, case, home)
        del copied
        expected = case.call(bare, device=home)
        assert all(map(same_bits, (it.to(home) for it in case.call(model, device=home)), expected))


def round_like(bare, model):
    stored = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if stored[name].dtype == torch.float8_e4m3fn:
                parameter.copy_(parameter.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_copies_that_a_call_makes_are_where_the_original_came_from(sim, offload, way):
    case = MixedCase()
    model = case.build()
    hookcore.apply(model, [offload("sim")])
    copies = []
    hook = register_module_forward_pre_hook(
        lambda module, _: copies.append(way(model)) if module is model[3] else None
    )
    with torch.no_grad():
        for _ in range(2):
            case.call(model)
    hook.remove()
    assert len(copies) == 2
    for copied in copies:
        assert devices_of(copied) == {torch.device("cpu")}
        case.call(copied)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("casts", [False, True])
def test_copies_of_a_model_on_disk_are_in_host_memory(sim, way, casts, tmp_path):
    from safetensors.torch import save_model

    case = MixedCase()
    bare = case.build()
    save_model(bare, tmp_path / "model.safetensors")
    model = case.build()
    casting = [LayerwiseCasting(skip_modules_pattern=())] if casts else []
    hookcore.apply(model, [*casting, DiskOffload(tmp_path, execution_device="sim", memory_budget="1KB")])
    if casts:
        in_memory = case.build()
        hookcore.apply(in_memory, casting)
        round_like(bare, in_memory)
    with torch.no_grad():
        for seed in range(2):
            assert_is_copy_of(bare, way(model), case, "cpu")
            case.call(model, seed=seed)
            case.call(bare, seed=seed)


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_nothing_of_it_stays_when_the_technique_is_removed(sim, offload):
    case = MixedCase()
    model = case.build()
    applied = hookcore.apply(model, [offload("sim")])
    with torch.no_grad():
        case.call(model)
    applied.remove()
    assert [vars(it) for it in model.parameters()] == [{}, {}, {}, {}, {}, {}, {}, {"tag": "mine"}, {}]
    assert not any(vars(it) for it in model.buffers())
    assert all(type(vars(it)[kind]) is dict for it in model.modules() for kind in ("_parameters", "_buffers"))
