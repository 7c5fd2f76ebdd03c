"""Models under offloading tell the device that they compute on, and are not moved from there."""

from __future__ import annotations

import copy
import pickle
from unittest.mock import patch

import pytest
import torch
from torch import nn

import hookcore
from hookcore import ConflictError
from hookcore.memory.instance_override import override_members, restore_class
from hookcore.testing import simulator
from hookcore.testing.snapshot import ModelSnapshot
from hookcore_plugins import DiskOffload, GroupOffload, LayerwiseCasting, ModelOffload, SequentialOffload

OFFLOADS = pytest.mark.parametrize(
    "offload",
    [
        ModelOffload,
        SequentialOffload,
        GroupOffload,
        lambda device: GroupOffload(device, use_stream=False),
        lambda device: GroupOffload(device, exclude_modules=["inner"]),
    ],
    ids=["model", "sequential", "groups", "leaves", "excluded"],
)


class Told(nn.Module):
    """Tells its device and dtype as models of diffusers and transformers do."""

    def __init__(self, inner=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(3))
        self.inner = inner

    @property
    def device(self):
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self):
        return next(it.dtype for it in self.parameters() if it.is_floating_point())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x if self.inner is None else self.inner(x)


def build():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Told(Told())


def call(model):
    with torch.no_grad():
        return model(torch.ones(1, 5, dtype=model.dtype))


@OFFLOADS
@pytest.mark.parametrize("device", ["cpu", "sim", "sim:1"])
def test_a_model_and_those_in_it_tell_where_they_compute(sim, offload, device):
    model = build()
    before = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [offload(device)])
    answer = torch.empty(0, device=device).device
    for it in (model, model.inner):
        assert it.device == answer
        assert it.dtype == torch.float32
    assert call(model).device == answer
    assert type(model).__name__ == type(model).__qualname__ == "Told"
    assert type(model)().device.type == "cpu"
    applied.remove()
    assert model.device.type == "cpu"
    before.assert_restored(model)


def test_a_model_on_disk_tells_where_it_computes(sim, tmp_path):
    from safetensors.torch import save_file

    model = build()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    applied = hookcore.apply(model, [DiskOffload(tmp_path, execution_device="sim")])
    assert model.device == torch.device("sim", 0)
    applied.remove()
    assert model.device.type == "cpu"


@OFFLOADS
def test_moving(sim, offload):
    model, bare = build(), build()
    applied = hookcore.apply(model, [offload("sim")])
    for _ in range(2):
        for same in (("sim",), ("sim:0",), (torch.device("sim", 0), None), (None, None)):
            assert model.to(*same) is model
        if not hookcore.status(model).nbytes.get("sim:0"):  # what has room stays, from the first call on
            assert {it.device.type for it in model.parameters()} == {"cpu"}
        assert torch.equal(call(model).cpu(), call(bare))
    for other in ("cpu", "sim:1", torch.device("cpu")):
        with pytest.raises(
            ConflictError,
            match=r"^cannot move Told to '(cpu|sim:1)': it is offloaded, and runs on 'sim:0', .*",
        ):
            model.inner.to(other)
    with pytest.raises(ConflictError):
        model.to(torch.zeros(1))
    applied.remove()
    assert model.to("sim").device.type == "sim"


@OFFLOADS
def test_a_dtype_is_taken(sim, offload):
    model, bare = build(), build()
    hookcore.apply(model, [offload("sim")])
    call(model)
    for move in (
        (torch.float16,),
        ("sim", torch.float64),
        (None, torch.bfloat16),
        (torch.zeros(1, device="sim"),),
    ):
        model.to(*move, non_blocking=True)
        bare.to(*(it.cpu() if isinstance(it, torch.Tensor) else it for it in move if it != "sim"))
        assert model.dtype == bare.dtype
        assert torch.equal(call(model).cpu(), call(bare))


def test_a_memory_format_is_taken():
    model = Told(nn.Conv2d(3, 3, 3))
    hookcore.apply(model, [GroupOffload("cpu")])
    model.to("cpu", memory_format=torch.channels_last)
    assert model.inner.weight.is_contiguous(memory_format=torch.channels_last)


WAYS_TO_COPY = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("way", WAYS_TO_COPY)
@OFFLOADS
def test_copies_tell_their_own(sim, offload, way):
    model = build()
    hookcore.apply(model, [offload("sim:1")])
    copied = way(model)
    assert type(copied) is type(copied.inner) is Told
    assert copied.to("sim:0").device == torch.device("sim", 0)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("removed", [[0, 1], [1, 0]])
def test_with_casting_that_answers_for_the_dtype(sim, order, removed):
    techniques = [GroupOffload("sim"), LayerwiseCasting(keep_originals=True)]
    model = build()
    before = ModelSnapshot.take(model)
    handles = {at: hookcore.apply(model, [techniques[at]]) for at in order}
    assert model.device.type == model.inner.device.type == "sim"
    assert model.dtype == model.inner.dtype == torch.float32
    call(model)
    for way in WAYS_TO_COPY:
        copied = way(model)
        assert type(copied) is type(copied.inner) is Told
    for at in removed:
        handles[at].remove()
    before.assert_restored(model)


def test_the_dtype_is_no_read_of_weights(sim):
    """Or the host would wait, and what might have been changed meanwhile be copied back and forth."""
    models = {"one": build(), "other": build()}
    streamed = build()
    hookcore.apply(models, [ModelOffload("sim")])
    hookcore.apply(streamed, [SequentialOffload("sim")])
    x = torch.ones(1, 5, device="sim")
    with torch.no_grad():
        for _ in range(3):
            for model in (*models.values(), streamed):
                model(x)

        def waits(*_):
            raise AssertionError("the host waited")

        with patch.object(simulator.state.get_machine(), "host_waits", waits), sim.traced() as trace:
            for model in (*models.values(), streamed):
                assert model.dtype == model.inner.dtype == torch.float32
                model(x)
    assert "copy out" not in {it.engine for it in trace.spans}


def test_going_through_all_weights_is_a_read(sim):
    """Whoever does it may change them."""
    models = {"one": build(), "other": build()}
    hookcore.apply(models, [ModelOffload("sim", memory_budget="1KiB")])
    call(models["one"])
    for parameter in models["one"].parameters():
        parameter.data.zero_()
    call(models["other"])
    assert not call(models["one"]).any()


def test_classes_that_answer_are_equal_to_the_ones_they_stand_in_for():
    model, bare = build(), build()
    override_members(model, {"dtype": lambda *_: "first"})
    override_members(model, {"dtype": lambda it, own: (own(it), "second")})
    assert model.dtype == ("first", "second")
    assert bare.dtype == torch.float32
    assert type(model) is not Told
    assert type(model) in (nn.Linear, Told)
    assert Told in {type(model), nn.Linear}
    assert type(model) not in (nn.Linear, nn.Module)
    assert type(model).device.__doc__ == "The device of the first parameter."
    restore_class(model)
    assert model.dtype == "first"
    restore_class(model)
    assert type(model) is Told


def test_a_cast_model_is_not_converted():
    model = build()
    hookcore.apply(model, [LayerwiseCasting("bfloat16", keep_originals=True)])
    for same in ({"dtype": torch.float32}, {"device": "cpu", "dtype": torch.float32}, {"device": "cpu"}):
        assert model.to(**same) is model
    before = ModelSnapshot.take(model)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ConflictError, match=f"^cannot convert Told to {dtype}: .* is torch.float32"):
            model.to(dtype)
    before.assert_restored(model)
    assert {it.dtype for it in model.parameters()} == {torch.bfloat16}
    assert call(model).dtype == torch.float32
