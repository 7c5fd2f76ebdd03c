"""Weights are streamed whatever they were before, and are that afterwards: on any device, in any mode."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter

import pytest
import torch
from checkpoints import save, stored_tensors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore.testing.cases import tensors_in
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import DiskOffload, GroupOffload, SequentialOffload

FOR_EACH_EXAMPLE = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WAYS = {
    "disk on the cpu": DiskOffload,
    "disk to a device": lambda folder: DiskOffload(folder, execution_device="sim"),
    "written, on the cpu": lambda folder: GroupOffload("cpu", offload_to_disk_path=f"{folder}/written"),
    "written": lambda folder: GroupOffload("sim", offload_to_disk_path=f"{folder}/written"),
    "memory": lambda _: GroupOffload("sim"),
    "sequential": lambda _: SequentialOffload("sim"),
}


def own(model):
    return list(model.parameters())


@FOR_EACH_EXAMPLE
@given(
    case=module_trees(),
    way=st.sampled_from(sorted(WAYS)),
    some=st.sets(st.integers(0, 12)) | st.none(),
    devices=st.lists(st.sampled_from(["cpu", "sim:0", "sim:1"]), min_size=1, max_size=4),
    steps=st.lists(st.sampled_from(["call", "edit", "data", "moved data", "copy"]), max_size=6),
    inside=st.booleans(),
)
def test_weights_come_back_as_they_were(sim, case, way, some, devices, steps, inside):  # noqa: PLR0917
    model, twin = made_in_inference_mode(case, some), made_in_inference_mode(case, some)
    assume(own(model))
    memory = Counter(weight.untyped_storage().data_ptr() for weight in own(model))
    for weight, device in zip(own(model), itertools.cycle(devices), strict=False):
        if memory[weight.untyped_storage().data_ptr()] == 1:  # moved, others would be tied no more
            with torch.inference_mode(weight.is_inference()):
                weight.data = weight.data.to(device)
    before = ModelSnapshot.take(model, twin=twin)
    identities = list(map(id, own(model)))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(inside), torch.no_grad():
        save(stored_tensors(twin), folder)
        try:
            applied = hookcore.apply(model, [WAYS[way](folder)])
        except hookcore.UnsupportedModelError:
            before.assert_restored(model, same_storage=True)
            return
        # A plain module's other methods are no entries, where inputs would be moved.
        entries = case.entries if way.endswith("cpu") else ["forward"]
        for step in [*steps, "call"]:
            with torch.inference_mode(inside or some != set()):
                do(step, case, entries, model, twin)
        applied.remove()
    for one in (model, twin):  # what calls did to buffers differs in the last bits
        for buffer in one.buffers():
            with torch.inference_mode():
                buffer.zero_()
    assert list(map(id, own(model))) == identities
    before.assert_restored(model)


def made_in_inference_mode(case, some):
    """A model all of which, or some parameters of which, was made in inference mode."""
    with torch.inference_mode():
        inside = case.build()
    if some is None:
        return inside
    model = case.build()
    for number, (ours, theirs) in enumerate(zip(own(model), own(inside), strict=True)):
        if number in some:
            ours.data = theirs.data
    return model


def do(step, case, entries, model, twin):
    if step == "call":
        for entry in entries:
            outputs = [case.call(it, entry) for it in (model, twin)]
            torch.testing.assert_close(*([it.cpu() for it in tensors_in(found)] for found in outputs))
    elif step == "copy":
        copied = {name: it.clone() for name, it in model.state_dict().items()}
        assert all(same_bits(copied[name].cpu(), it) for name, it in twin.named_parameters())
    else:
        for one in (model, twin):
            if step == "edit":
                own(one)[0].data.mul_(1.5)
            else:
                own(one)[-1].data = own(one)[-1].data.cpu() / 2
        if step == "moved data":
            own(model)[-1].data = own(model)[-1].data.to("sim:1")


class Doubling(nn.Linear):
    """Doubles its weight before it uses it."""

    def forward(self, x):
        self.weight.mul_(2)
        return super().forward(x)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_what_a_forward_changes_in_a_weight_made_in_inference_mode_is_kept(sim, way, tmp_path):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), Doubling(4, 4))
        save(stored_tensors(model), tmp_path)
        expected = model[1].weight * 8
        applied = hookcore.apply(model, [WAYS[way](tmp_path)])
        for _ in range(3):
            model(torch.ones(1, 4))
        assert same_bits(model[1].weight.cpu(), expected)
        applied.remove()
        assert same_bits(model[1].weight, expected)
        assert model[1].weight.is_inference()


@pytest.mark.parametrize("way", ["disk on the cpu", "written", "memory"])
def test_the_memory_that_they_came_from_is_free_while_they_are_elsewhere(sim, way, tmp_path):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
        save(stored_tensors(model), tmp_path)
        model.to("sim")
    taken = torch.get_device_module("sim").memory_allocated()
    applied = hookcore.apply(model, [WAYS[way](tmp_path)])
    assert torch.get_device_module("sim").memory_allocated() < taken
    applied.remove()
    assert torch.get_device_module("sim").memory_allocated() == taken


def test_one_of_which_gradients_are_recorded_already_is_refused_and_nothing_is_changed(sim):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.inference_mode():
        model[1] = nn.Linear(4, 4)
    model[1].weight.data = torch.ones(4, 4)
    before = ModelSnapshot.take(model)
    held = model[1].weight + 1  # autograd has it
    with pytest.raises(hookcore.UnsupportedModelError, match="made in inference mode"):
        hookcore.apply(model, [GroupOffload("sim", offload_type="leaf_level")])
    before.assert_restored(model)
    del held


@pytest.mark.parametrize("way", sorted(WAYS))
def test_one_of_which_gradients_are_recorded_is_given_back_all_the_same(sim, way, tmp_path):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    save(stored_tensors(model), tmp_path)
    expected = model.state_dict()
    applied = hookcore.apply(model, [WAYS[way](tmp_path)])
    x = torch.ones(1, 4)
    output = model(x)
    applied.remove()
    assert all(same_bits(it, expected[name]) for name, it in model.named_parameters())
    output.sum().backward()
    assert same_bits(model[0].bias.grad.cpu(), torch.ones(4))


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("adapted", [False, True])
def test_what_gets_onto_the_device_later_is_planned_anew(sim, way, adapted, tmp_path):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    save(stored_tensors(model), tmp_path)
    x = torch.ones(1, 4)
    device = "cpu" if way.endswith("cpu") else "sim"
    with torch.no_grad():
        expected = model(x)
        applied = hookcore.apply(model, [WAYS[way](tmp_path)])
        torch.testing.assert_close(model(x).cpu(), expected)
        if adapted:
            peft = pytest.importorskip("peft")
            peft.inject_adapter_in_model(
                peft.LoraConfig(target_modules=["1"], init_lora_weights=False), model
            )
            adapter = model[1].lora_A.default.to(device)
        else:
            model.append(nn.Linear(4, 4, device=device))
            adapter = model[-1]
        outputs = [model(x).cpu() for _ in range(3)]
        assert not torch.equal(outputs[0], expected)
        applied.remove()
        assert adapter.weight.device.type == device
        assert model[0].weight.device.type == "cpu"
        adapter.to("cpu")
        for output in outputs:
            torch.testing.assert_close(output, model.to("cpu")(x))
