"""Tensors of the simulated device are torch's own: they do what tensors do, with the CPU's bits."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from hookcore.testing.snapshot import same_bits

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
FOR_EACH_EXAMPLE = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def module():
    return torch.get_device_module("sim")


def values(dtype, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2 if dtype is torch.bool else 50, shape, generator=generator).to(dtype)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_all_types_go_there_and_back(sim, dtype):
    host = values(dtype, 3, 4)
    there = host.to("sim")
    assert type(there) is torch.Tensor
    assert there.device == torch.device("sim", 0)
    assert there.dtype == dtype
    assert there.is_sim
    assert same_bits(there.cpu(), host)
    assert same_bits(there.clone().cpu(), host)
    assert same_bits(there.view(torch.uint8).cpu(), host.view(torch.uint8))
    assert same_bits(there.to(torch.float32).cpu(), host.to(torch.float32))
    assert module().memory_allocated() == host.nbytes


@pytest.mark.parametrize("device", ["sim", "sim:1", "sim:0"])
def test_tensors_are_made_where_they_are_wanted(sim, device):
    for make in (torch.zeros, torch.ones, torch.rand, torch.empty):
        assert make(2, 3, device=device).device.index == (torch.device(device).index or 0)
    with torch.device(device):
        assert torch.zeros(2).device.type == "sim"
        assert nn.Linear(2, 2).weight.device.type == "sim"
    assert torch.arange(5, device=device).tolist() == [0, 1, 2, 3, 4]
    assert torch.tensor([1.0, 2.0], device=device).sum().item() == 3


def test_a_device_that_is_not_there_is_refused(sim):
    with pytest.raises(
        sim.SimulatorError, match="no device sim:2: the simulator was installed with devices=2"
    ):
        torch.zeros(2, device="sim:2")


VIEWS = [
    torch.Tensor.t,
    lambda it: it[1:],
    lambda it: it[:, ::2],
    lambda it: it.reshape(-1),
    lambda it: it.unsqueeze(0).expand(2, -1, -1),
    lambda it: it.flatten().unfold(0, 3, 2),
    torch.Tensor.diagonal,
    lambda it: it.chunk(2)[1],
    torch.Tensor.detach,
    lambda it: it.as_strided((2, 2), (1, 3), 1),
]


@FOR_EACH_EXAMPLE
@given(st.lists(st.sampled_from(VIEWS[:7] + VIEWS[8:9]), max_size=1), st.sampled_from(VIEWS))
def test_views_share_memory_and_follow_changes(sim, first, second):
    host = torch.arange(24.0).view(4, 6)
    there = host.to("sim")
    one, other = host, there
    for view in (*first, second):
        if one.dim() != 2:
            break
        one, other = view(one), view(other)
    assert other.stride() == one.stride()
    assert other.storage_offset() == one.storage_offset()
    assert same_bits(other.cpu(), one)
    shares = one.untyped_storage().data_ptr() == host.untyped_storage().data_ptr()
    assert (other.untyped_storage().data_ptr() == there.untyped_storage().data_ptr()) == shares
    if not shares:  # reshape had to copy
        return
    version = there._version
    there.mul_(3)
    host.mul_(3)
    assert other._version == version + 1
    assert same_bits(other.cpu(), one)
    assert module().memory_allocated() == host.nbytes


OPERATORS = {
    "add": operator.add,
    "mul": operator.mul,
    "matmul": lambda a, b: a @ b.mT,
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a, b]),
    "where": lambda a, b: torch.where(a > b, a, b),
    "softmax": lambda a, b: (a + b).softmax(-1),
    "layer_norm": lambda a, b: F.layer_norm(a, a.shape[-1:]) + b,
    "sort": lambda a, b: torch.sort(a * b, dim=-1)[0],
    "topk": lambda a, b: torch.topk(a - b, 2)[1],
    "index": lambda a, b: a[b.argsort(dim=0)[0]],
    "mask": lambda a, b: a[a > b],
    "nonzero": lambda a, b: (a > b).nonzero(),
    "index_put": lambda a, b: a.clone().index_put_((b > 0,), torch.zeros((), device=a.device)),
    "out": lambda a, b: torch.add(a, b, out=torch.empty(0, device=a.device)),
    "scatter": lambda a, b: torch.zeros_like(a).scatter_(1, b.argsort(-1), a),
    "cumsum": lambda a, b: (a + b).cumsum(0),
    "var": lambda a, b: torch.var_mean(a * b, dim=0)[0],
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "dropout": lambda a, b: F.dropout(a + b, 0.5),
    "pad": lambda a, b: F.pad(a, (1, 2)) + F.pad(b, (1, 2)),
    "attention": lambda a, b: F.scaled_dot_product_attention(*[it[None, None] for it in (a, b, a)]),
    "conv": lambda a, b: F.conv1d(a[None], b[:, None, :3], groups=a.shape[0]),
    "foreach": lambda a, b: torch._foreach_add([a, b], [b, a])[0],
    "pairwise": torch.cdist,
    "complex": lambda a, b: torch.view_as_real(torch.complex(a, b) * 2),
    "fft": lambda a, b: torch.fft.rfft(a + b).abs(),
    "scalar": lambda a, b: a * torch.tensor(2.0) + b.max().item(),
}


@FOR_EACH_EXAMPLE
@given(
    st.sampled_from(sorted(OPERATORS)),
    st.integers(2, 5),
    st.integers(3, 6),
    st.integers(0, 3),
    st.sampled_from([torch.no_grad, torch.enable_grad, torch.inference_mode]),
)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_operators_give_the_bits_of_the_cpu(  # noqa: PLR0917
    sim, name, rows, columns, seed, mode
):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    with mode():
        torch.manual_seed(seed)
        expected = OPERATORS[name](first, second)
        torch.manual_seed(seed)
        found = OPERATORS[name](first.to("sim"), second.to("sim"))
    assert found.device.type == "sim"
    assert found.stride() == expected.stride()
    assert same_bits(found.cpu(), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda there, here: there + here,
        lambda there, here: here + there,
        torch.matmul,
        lambda there, here: torch.cat([there, here]),
        F.linear,
        lambda there, here: there + here.to("sim:1"),
        lambda there, here: there.add_(here),
    ],
)
def test_mixed_devices_raise_as_they_do_on_cuda(sim, call):
    with pytest.raises(
        RuntimeError, match="Expected all tensors to be on the same device, but found at least"
    ):
        call(torch.ones(2, 2, device="sim:0"), torch.ones(2, 2))


def test_a_number_on_the_cpu_mixes_with_anything(sim):
    assert (torch.ones(2, device="sim") * torch.tensor(3.0)).tolist() == [3, 3]


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_what_is_not_supported_says_so(sim):
    there = torch.eye(3, device="sim")
    with pytest.raises(sim.UnsupportedOperationError, match="strided tensors only"):
        there.to_sparse()
    with pytest.raises(RuntimeError):
        there.untyped_storage().resize_(0)
    with pytest.raises(sim.UnsupportedOperationError, match="has no autocast, and was asked for one in"):
        torch.autocast("sim", dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError):
        torch.Generator("sim")
    with pytest.raises(sim.UnsupportedOperationError, match="_thnn_fused_lstm_cell.default there is none"):
        nn.LSTM(3, 3).to("sim")(there[None])
    with pytest.raises(RuntimeError, match="not resizable"):
        torch.add(there, 1, out=torch.ones(1, 3, device="sim"))


# Parameters and modules


def test_data_is_swapped_across_devices(sim):
    parameter = nn.Parameter(torch.ones(2, 2))
    host = parameter.data
    parameter.data = host.to("sim")
    assert parameter.device.type == "sim"
    assert type(parameter) is nn.Parameter
    parameter.data = host
    assert parameter.data_ptr() == host.data_ptr()
    assert module().memory_allocated() == 0


def test_modules_move_and_train(sim):
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    there = copy.deepcopy(bare).to("sim")
    inputs = torch.randn(6, 4)
    for model, device in ((bare, "cpu"), (there, "sim")):
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs.to(device)).square().sum().backward()
            optimizer.step()
    for parameter, other in zip(there.parameters(), bare.parameters(), strict=True):
        assert parameter.device.type == "sim"
        assert same_bits(parameter.detach().cpu(), other.detach())
    assert {it.device.type for it in there.cpu().state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("device", ["sim", "cpu"])
def test_activation_checkpointing_works_there_and_beside_it(sim, device, reentrant):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)).to(device)
    inputs = torch.ones(2, 3, device=device, requires_grad=True)
    gradients = []
    for run in (layer, lambda it: checkpoint(layer, it, use_reentrant=reentrant)):
        torch.manual_seed(1)
        inputs.grad = None
        run(inputs).sum().backward()
        gradients.append(inputs.grad.cpu())
    assert same_bits(*gradients)


@pytest.mark.parametrize("device", ["sim:0", "sim:1"])
def test_backward_runs_where_and_on_the_stream_that_it_is_called(sim, device):
    weight = torch.ones(3, device=device, requires_grad=True)
    stream = sim.Stream(device)
    stream.wait_stream(module().current_stream(device))
    with stream, sim.traced() as trace:
        (weight * 2).sum().backward()
        (other,) = torch.autograd.grad((weight * 3).sum(), weight)
    assert {span.stream for span in trace.spans} == {(stream.device_index, stream.stream_id)}
    module().synchronize(device)
    assert weight.grad.tolist() == [2, 2, 2]
    assert other.tolist() == [3, 3, 3]


def test_backward_runs_also_where_it_ran_before_the_device_was_there():
    code = """
        import torch, hookcore.testing.simulator as sim
        torch.ones(1, requires_grad=True).sum().backward()
        sim.install()
        weight = torch.ones(1, device="sim:1", requires_grad=True)
        weight.sum().backward()
        print(weight.grad.device)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert result.stdout == "sim:1\n", result.stderr


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "save": lambda it: torch.load(_saved(it), weights_only=False),
}


def _saved(it):
    stream = io.BytesIO()
    torch.save(it, stream)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_models_are_copied(sim, copied):
    model = nn.Linear(3, 3).to("sim:1")
    other = copied(model)
    assert other.weight.device == torch.device("sim", 1)
    assert type(other.weight) is nn.Parameter
    assert same_bits(other.weight.detach().cpu(), model.weight.detach().cpu())
    assert other.weight.data_ptr() != model.weight.data_ptr()


def test_checkpoints_are_loaded_to_it(sim, tmp_path):
    weights = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    save_file(weights, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors", device="sim:1")
    assert all(loaded[name].device == torch.device("sim", 1) for name in weights)
    assert all(same_bits(loaded[name].cpu(), weights[name]) for name in weights)
    import safetensors

    with safetensors.safe_open(tmp_path / "weights.safetensors", "pt", device="sim") as file:
        assert set(file.keys()) == {"a", "b"}
        assert same_bits(file.get_tensor("a").cpu(), weights["a"])
        assert same_bits(file.get_slice("a")[1:].cpu(), weights["a"][1:])
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert file.get_tensor("b").device.type == "cpu"
    torch.save(weights, tmp_path / "weights.pt")
    assert torch.load(tmp_path / "weights.pt", map_location="sim")["a"].device.type == "sim"


def test_tensors_print(sim):
    assert repr(torch.ones(2, device="sim")) == "tensor([1., 1.], device='sim:0')"


# The device-neutral spelling


def test_generic_names(sim):
    stream = torch.Stream("sim:1")
    assert isinstance(stream, torch.Stream)
    assert isinstance(stream, sim.Stream)
    assert stream.device == torch.device("sim", 1)
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    assert torch.accelerator.device_count() == 2
    with stream:
        assert torch.accelerator.current_device_index() == 1
        assert torch.accelerator.current_stream() == stream
        event = torch.Event(device="sim")
        event.record()
    assert isinstance(event, torch.Event)
    assert torch.accelerator.current_device_index() == 0
    assert torch.accelerator.current_stream("sim:1") == module().default_stream("sim:1")
    event.synchronize()
    assert event.query()
    torch.accelerator.set_device_index(1)
    assert torch.zeros(1, device="sim").device.index == 1
    torch.accelerator.set_device_index(0)
    with torch.accelerator.device_index(1):
        torch.accelerator.set_stream(stream)
        assert module().current_stream() == stream
        torch.accelerator.set_stream(module().default_stream())
    torch.accelerator.synchronize()
    kept = torch.ones(100, device="sim")
    assert torch.accelerator.memory_allocated() == kept.nbytes
    assert not isinstance(torch.Stream("cpu"), sim.Stream)


def test_events_measure_virtual_time(sim):
    start, end = (torch.Event("sim", enable_timing=True) for _ in range(2))
    start.record()
    torch.ones(1000, device="sim") + 1
    end.record()
    assert start.elapsed_time(end) > 0
    with pytest.raises(sim.SimulatorError, match="enable_timing"):
        sim.Event().elapsed_time(end)
