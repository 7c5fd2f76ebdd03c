"""Channels last: as torch lays a model out, kept by what moves weights, and undone to the stride."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import hookcore
from hookcore.testing import simulator
from hookcore.testing.cases import tensors_in
from hookcore.testing.models import autoencoder, cnn, unet
from hookcore.testing.snapshot import ModelSnapshot
from hookcore_plugins import (
    ChannelsLast,
    Compile,
    DiskOffload,
    GroupOffload,
    LayerwiseCasting,
    ModelOffload,
    SequentialOffload,
)


def strides(model):
    return {name: tensor.stride() for name, tensor in model.named_parameters() if tensor.dim() > 3}


def with_torch(model, case, entry, seed):
    """What torch's own way gives: the model converted for good, and its inputs."""

    def converted(value):
        is_picture = isinstance(value, torch.Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if is_picture else value

    args, kwargs = case.inputs(entry, seed)
    method = model if entry == "forward" else getattr(model, entry)
    out = method(*map(converted, args), **{name: converted(value) for name, value in kwargs.items()})
    return next(tensors_in(out))


PLACING = {
    "nothing": lambda _: [],
    "blocks": lambda device: [GroupOffload(device, offload_type="block_level")],
    "leaves": lambda device: [GroupOffload(device)],
    "sequential": lambda device: [SequentialOffload(device)],
    "whole": lambda device: [ModelOffload(device)],
}


@pytest.mark.parametrize("device", ["cpu", "sim"])
@settings(max_examples=5, deadline=None, phases=set(Phase) - {Phase.explain})
@given(data=st.data(), make=st.sampled_from([unet, autoencoder, cnn]), placing=st.sampled_from([*PLACING]))
def test_it_is_what_torch_does_with_any_offloading_and_undone_to_the_stride(device, data, make, placing):
    if device == "sim":
        simulator.install()
        simulator.reset()
    case = make()
    others = PLACING[placing](device)
    home = "cpu" if others else device
    model, bare, reference = case.build().to(home), case.build().to(device), case.build()
    reference.to(memory_format=torch.channels_last)
    before = ModelSnapshot.take(model)
    for technique in data.draw(st.permutations([ChannelsLast(), *others])):
        hookcore.apply(model, [technique])
    entry = data.draw(st.sampled_from(case.entries))
    with torch.no_grad():
        for seed in range(2):
            got = case.call(model, entry, seed, device=home)[0].cpu()
            assert torch.equal(got, with_torch(reference, case, entry, seed))
            expected = case.call(bare, entry, seed, device=device)[0].cpu()
            assert torch.allclose(got, expected, atol=1e-4)
    assert strides(model) == strides(reference)
    assert strides(model) != strides(case.build())
    hookcore.remove(model)
    before.assert_restored(model)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_casting_keeps_the_layout(order):
    case = unet()
    model, reference = case.build(), case.build()
    both = [ChannelsLast(), LayerwiseCasting("bfloat16")]
    hookcore.apply(reference, [both[1]])
    hookcore.apply(model, [both[index] for index in order])
    weight = model.conv_in.weight
    assert weight.stride() == (36, 1, 12, 4)
    with torch.no_grad():
        got, expected = case.call(model)[0], case.call(reference)[0]
    assert torch.allclose(got, expected, atol=1e-4)
    assert (weight.stride(), weight.dtype) == ((36, 1, 12, 4), torch.bfloat16)
    hookcore.remove(model, allow_lossy=True)
    assert weight.stride() == (36, 9, 3, 1)


def test_compiled_blocks_get_it_too():
    case = autoencoder()
    model, reference = case.build(), case.build()
    hookcore.apply(model, [ChannelsLast(), Compile(backend="eager")])
    hookcore.apply(reference, [ChannelsLast()])
    with torch.no_grad():
        assert torch.equal(case.call(model, "decode")[0], case.call(reference, "decode")[0])


def test_pictures_in_3d():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ConvTranspose3d(4, 2, 3))
    x = torch.randn(1, 3, 5, 6, 7)
    expected = model(x)
    with hookcore.apply(model, [ChannelsLast()]):
        assert all(it.weight.is_contiguous(memory_format=torch.channels_last_3d) for it in model)
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert all(it.weight.is_contiguous() for it in model)


def test_saving_is_right(tmp_path):
    model, bare = unet().build(), unet().build()
    hookcore.apply(model, [ChannelsLast()])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in bare.state_dict().items())


def test_weights_that_came_later_are_laid_out_too():
    model = cnn().build()
    hookcore.apply(model, [ChannelsLast()])
    model[0].weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    model(torch.randn(1, 3, 16, 16))
    assert model[0].weight.stride() == (27, 1, 9, 3)
    hookcore.remove(model)
    assert model[0].weight.stride() == (27, 9, 3, 1)


def test_values_that_changed_meanwhile_are_kept_in_memory_that_others_see():
    memory = torch.randn(2, 3, 3, 3, 3)
    model = nn.Conv2d(3, 3, 3)
    model.weight.data = memory[1]
    with hookcore.apply(model, [ChannelsLast()]), torch.no_grad():
        model.weight.mul_(2)
        doubled = model.weight.clone()
    assert model.weight.data_ptr() == memory[1].data_ptr()
    assert torch.equal(memory[1], doubled)


def test_data_that_was_given_meanwhile_lies_as_it_was_given():
    model = nn.Conv2d(3, 3, 3)
    given_data = torch.randn(3, 3, 3, 3).transpose(2, 3)
    with hookcore.apply(model, [ChannelsLast()]):
        model.weight.data = given_data
    assert model.weight.data_ptr() == given_data.data_ptr()


def test_a_model_without_pictures_is_left_alone():
    handle = hookcore.apply(nn.Linear(2, 2), [ChannelsLast()])
    assert "it has no weights of 2D or 3D convolutions" in str(handle)


def test_weights_that_share_memory_differently_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach().transpose(2, 3))
    plan = hookcore.plan(model, [ChannelsLast()])
    assert "its weight shares memory with '1.weight', which lies in it differently" in str(plan)


def test_weights_from_disk_are_left_as_they_lie_there(tmp_path):
    case = unet()
    bare = case.build()
    bare.save_pretrained(tmp_path)
    model = hookcore.load(type(bare), tmp_path, [DiskOffload()], torch_dtype="float32")
    handle = hookcore.apply(model, [ChannelsLast()])
    assert "is read from a checkpoint for each call" in str(handle)
    model = case.build()
    before = ModelSnapshot.take(model)
    hookcore.apply(model, [ChannelsLast()])
    hookcore.apply(model, [DiskOffload(tmp_path)])
    with torch.no_grad():
        assert torch.allclose(case.call(model)[0], case.call(bare)[0], atol=1e-5)
    hookcore.remove(model)
    before.assert_restored(model)


def test_inputs_lie_as_weights_do():
    seen = []

    class Looking(nn.Conv2d):
        def forward(self, x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    model, x = Looking(2, 2, 3), torch.randn(1, 2, 5, 5)
    model(x)
    hookcore.apply(model, [ChannelsLast()])
    model(x)
    model(x=x)
    assert seen == [False, True, True]


def test_parameters_that_share_memory_go_on_sharing_it():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    first, second = model
    second.weight = nn.Parameter(first.weight.data)
    with hookcore.apply(model, [ChannelsLast()]):
        assert first.weight.data_ptr() == second.weight.data_ptr()
        assert second.weight.is_contiguous(memory_format=torch.channels_last)
    assert first.weight.data_ptr() == second.weight.data_ptr()
    assert first.weight.is_contiguous()
