"""Slicing: what is computed a few rows at a time is what is computed at once, in whatever it comes."""

from __future__ import annotations

import collections
import copy
import dataclasses

import diffusers
import pytest
import torch
import transformers
from autoencoders import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import HookcoreError, PlanError
from hookcore.testing import simulator
from hookcore.testing.cases import tensors_in
from hookcore.testing.models import autoencoder
from hookcore.testing.snapshot import ModelSnapshot
from hookcore_plugins import Slicing

Pair = collections.namedtuple("Pair", "first second")  # noqa: PYI024 -- as people write it


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    note: str = "all"
    cache: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    sample: torch.Tensor


class Distribution:
    """As an autoencoder's `encode` returns: an object with tensors, some of them views of others."""

    def __init__(self, moments):
        self.parameters = moments
        self.mean, self.logvar = moments.chunk(2, dim=1)
        self.deterministic = False


class Wrapping(nn.Module):
    """Puts what it computes into something."""

    def __init__(self, wrap):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.wrap = wrap
        self.seen = []

    def forward(self, x, *others, **named):
        self.seen.append(len(x))
        return self.wrap(self.linear(x))


WRAPS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, 2 * y),
    "list": lambda y: [y, None, "text", 3],
    "namedtuple": lambda y: Pair(y, (y, y + 1)),
    "dict": lambda y: {"sample": y, "more": {"deep": [y * 3]}},
    "ordered": lambda y: collections.OrderedDict(a=y),
    "dataclass": lambda y: Output(y, cache=[y]),
    "frozen": Frozen,
    "object": lambda y: (Distribution(y),),
    "same twice": lambda y: (y, y),
    "constant beside": lambda y: (y, torch.ones(13)),
    "scalar beside": lambda y: (y, torch.tensor(2.0)),
    "none": lambda y: None,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 9), size=st.integers(1, 10), seed=st.integers(0, 99))
def test_any_split_of_any_output_is_the_whole(wrap, rows, size, seed):
    torch.manual_seed(seed)
    model = Wrapping(wrap).eval()
    x = torch.randn(rows, 4)
    with torch.no_grad():
        expected = model(x)
        model.seen.clear()
        with hookcore.apply(model, [Slicing(size)]):
            got = model(x)
    assert model.seen == [size] * (rows // size) + [rows % size] * (rows % size > 0)
    assert type(got) is type(expected)
    expected_tensors = list(tensors_in(expected))
    for one, other in zip(tensors_in(got), expected_tensors, strict=True):
        torch.testing.assert_close(one, other)


def test_containers_come_out_as_they_were():
    model = Wrapping(lambda y: (y, {"again": y, "text": "a"}, Output(y))).eval()
    with torch.no_grad(), hookcore.apply(model, [Slicing(2)]):
        first, named, wrapped = model(torch.randn(5, 4))
    assert first is named["again"] is wrapped.sample
    assert named["text"] == "a"
    assert (wrapped.note, wrapped.cache) == ("all", [])


def test_split_is_what_is_as_long_as_the_first_input():
    seen = []

    class Conditioned(nn.Module):
        def forward(self, x, scale, *, extra, table):
            if not x.is_meta:
                seen.append((len(scale), len(extra["ids"][0]), len(table)))
            return x * scale + extra["ids"][0][:, None]

    model = Conditioned()
    x, scale, ids, table = torch.randn(4, 2), torch.randn(1, 2), torch.randn(4), torch.randn(7)
    expected = model(x, scale, extra={"ids": [ids]}, table=table)
    with hookcore.apply(model, [Slicing(3)]):
        seen.clear()
        got = model(x, scale, extra={"ids": [ids]}, table=table)
    assert torch.equal(got, expected)
    assert seen == [(1, 3, 7), (1, 1, 7)]


def test_encode_and_decode_of_an_autoencoder_are_split():
    case = autoencoder()
    model, bare = case.build(), case.build()
    before = ModelSnapshot.take(model, twin=bare)
    sizes = []
    model.encoder.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    applied = hookcore.apply(model, [Slicing()])
    assert "1 x encode(), 1 x decode()" in str(applied)
    with torch.no_grad():
        for entry in ("encode", "decode", "forward"):
            for one, other in zip(case.call(model, entry), case.call(bare, entry), strict=True):
                torch.testing.assert_close(one, other)
        latents = torch.randn(3, 4, 8, 8)
        assert type(model.decode(latents)) is type(bare.decode(latents))
        posterior, expected = (it.encode(torch.randn(3, 3, 16, 16)).latent_dist for it in (model, bare))
        assert type(posterior) is type(expected)
        assert posterior.sample().shape == expected.sample().shape
    assert set(sizes) == {1}
    applied.remove()
    model.encoder._forward_pre_hooks.clear()
    before.assert_restored(model)


def test_frames_of_a_video_stay_together():
    """`decode` of Stable Video Diffusion's autoencoder takes all frames of all videos as rows."""
    make, _, shape, options = FAMILIES["temporal decoder"]
    torch.manual_seed(0)
    model = make().eval()
    latents = torch.randn(6, *shape[1:-2], 8, 8)
    sizes = []
    model.decoder.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    with torch.no_grad():
        for size, expected in ((1, [2, 2, 2]), (2, [4, 2]), (3, [6])):
            whole = model.decode(latents, **options).sample
            with hookcore.apply(model, [Slicing(size)]):
                sizes.clear()
                torch.testing.assert_close(model.decode(latents, **options).sample, whole)
                assert sizes == expected
                torch.testing.assert_close(model.decode(latents, options["num_frames"]).sample, whole)
                with pytest.raises((RuntimeError, HookcoreError), match="is invalid for input of size"):
                    model.decode(latents, num_frames=4)  # 6 are no videos of 4


def test_the_number_of_frames_of_whole_videos_makes_slices_no_larger():
    class Denoiser(nn.Module):
        def forward(self, videos, num_frames):
            if not videos.is_meta:
                sizes.append(len(videos))
            return videos * num_frames

    sizes = []
    with hookcore.apply(Denoiser(), [Slicing()]) as applied:
        (model,) = (step.component.module for step in applied.plan.steps)
        model(torch.randn(4, 3, 2, 8, 8), num_frames=2)
    assert sizes == [1] * 4


@settings(deadline=None, max_examples=30)
@given(
    videos=st.integers(1, 4),
    frames=st.integers(1, 3),
    size=st.integers(1, 5),
    named=st.booleans(),
    as_list=st.booleans(),
)
def test_what_is_said_of_the_rows_is_said_of_those_of_a_slice(videos, frames, size, named, as_list):
    class Frames(nn.Module):
        def forward(self, frames, batch_size, shape=(2, 3), *, width=4):
            if not frames.is_meta:
                sizes.append(batch_size)
            assert shape[0] == len(frames)
            assert shape[1:] == type(shape)((3, width, width))
            return frames.reshape(batch_size, -1, *shape[1:]).cumsum(1).flatten(0, 1)

    sizes, model = [], Frames()
    x = torch.randn(videos * frames, 3 * 16)
    shape = (list if as_list else tuple)((len(x), 3, 4, 4))
    args, kwargs = ((x,), {"batch_size": videos, "shape": shape}) if named else ((x, videos, shape), {})
    expected = model(*args, **kwargs)
    sizes.clear()
    with hookcore.apply(model, [Slicing(size)]):
        torch.testing.assert_close(model(*args, **kwargs), expected)
    assert sizes == [size] * (videos // size) + [videos % size] * (videos % size > 0)


def test_a_shape_that_begins_with_a_height_is_left_as_it_is():
    class Resized(nn.Module):
        def forward(self, x, shape):
            return nn.functional.interpolate(x, shape)

    model, x = Resized(), torch.randn(4, 3, 2, 2)
    expected = model(x, (4, 6))
    with hookcore.apply(model, [Slicing()]):
        assert torch.equal(model(x, (4, 6)), expected)


def test_codes_of_a_codebook_are_looked_up_for_the_rows_of_a_slice():
    """`VQModel.decode` is given the shape of what codes stand for, with the length of the batch."""
    torch.manual_seed(0)
    model = diffusers.VQModel(
        block_out_channels=(32,), norm_num_groups=8, num_vq_embeddings=16, lookup_from_codebook=True
    ).eval()
    codes = torch.randint(16, (3, 4, 5))
    options = {"force_not_quantize": True, "shape": (3, 4, 5, 3)}
    with torch.no_grad():
        expected = model.decode(codes, **options).sample
        with hookcore.apply(model, [Slicing(2)]):
            torch.testing.assert_close(model.decode(codes, **options).sample, expected)


def test_a_cache_to_write_into_is_refused_and_one_that_is_made_is_joined():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(8, (3, 4))
    more = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected, text = model(tokens), model.generate(tokens, **more)
        with hookcore.apply(model, [Slicing(2)]):
            found = model(tokens)
            assert torch.equal(model.generate(tokens, **more, use_cache=False), text)
            with pytest.raises(HookcoreError, match="split the DynamicCache that .* `use_cache=False`"):
                model.generate(tokens, **more)
    torch.testing.assert_close(found.logits, expected.logits)
    (layer,), (other,) = found.past_key_values.layers, expected.past_key_values.layers
    torch.testing.assert_close((layer.keys, layer.values), (other.keys, other.values))


def test_the_loss_of_a_codebook_is_that_of_the_whole():
    """`VQModel.decode` returns it beside the image; slices differ in it."""
    make, _, shape, _ = FAMILIES["vq"]
    torch.manual_seed(0)
    model = make().eval()
    latents = torch.randn(5, *shape[1:-2], 8, 8, requires_grad=True)
    with torch.no_grad():
        whole = model.decode(latents)
        with hookcore.apply(model, [Slicing(2)]):
            sliced = model.decode(latents)
    torch.testing.assert_close(sliced.sample, whole.sample)
    torch.testing.assert_close(sliced.commit_loss, whole.commit_loss)
    assert sliced.commit_loss > 0

    def gradient():
        (found,) = torch.autograd.grad(model.decode(latents).commit_loss, latents)
        return found

    expected = gradient()
    with hookcore.apply(model, [Slicing(2)]):
        torch.testing.assert_close(gradient(), expected)


@pytest.mark.parametrize(
    ("shape", "layout"), [((3, 4, 5, 5), torch.channels_last), ((3, 4, 5, 5, 5), torch.channels_last_3d)]
)
def test_what_comes_out_lies_as_its_slices_do(shape, layout):
    x = torch.randn(shape).contiguous(memory_format=layout)
    for value in (x, x.contiguous()):
        model = nn.ReLU()
        with hookcore.apply(model, [Slicing(2)]):
            assert model(value).stride() == value.stride()


def test_gradients_are_those_of_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(5, 4, requires_grad=True)
    model(x).square().sum().backward()
    expected = [x.grad.clone(), *(it.grad.clone() for it in model.parameters())]
    x.grad = None
    model.zero_grad()
    with hookcore.apply(model, [Slicing(2)]):
        model(x).square().sum().backward()
    for got, other in zip([x.grad, *(it.grad for it in model.parameters())], expected, strict=True):
        torch.testing.assert_close(got, other)


def test_activations_of_one_slice_are_in_memory(sim):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 256)).eval().to("sim")
    x = torch.randn(64, 8, device="sim")
    device = torch.get_device_module("sim")

    def peak():
        with torch.no_grad():
            before = device.memory_allocated()
            device.reset_peak_memory_stats()
            wide(x)
            return device.max_memory_allocated() - before

    whole = peak()
    with hookcore.apply(wide, [Slicing(4)]):
        sliced = peak()
    output, row = 64 * 256 * 4, 512 * 4
    assert whole >= 64 * row + output
    assert sliced <= output + 2 * 4 * row + 2048  # rounded up by the allocator
    simulator.check()


def test_rows_that_depend_on_each_other_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    with pytest.raises(
        PlanError, match=r"'1' computes: it takes its statistics over the batch. Call `model.eval\(\)`"
    ):
        hookcore.apply(model, [Slicing()])
    hookcore.apply(model.eval(), [Slicing()]).remove()


UNJOINED = {
    "another dimension": (lambda y: y.t(), "first dimension is no batch"),
    "two in one": (lambda y: y[: len(y) // 2 * 2].reshape(-1, 2, 6), "first dimension is no batch"),
    "a number of the data": (lambda y: (y, float(y[0, 0])), "followed without data"),
    "one for each row": (tuple, "more than its tensors' rows"),
    "a sum": (lambda y: y.sum(), "cannot join what Wrapping returns"),
}


@pytest.mark.parametrize(("wrap", "reason"), UNJOINED.values(), ids=UNJOINED)
def test_what_cannot_be_joined_is_told(wrap, reason):
    model = Wrapping(wrap).eval()
    with torch.no_grad(), hookcore.apply(model, [Slicing(2)]):
        with pytest.raises(HookcoreError, match=reason):
            model(torch.randn(5, 4))
        model(torch.randn(2, 4))


class Attending(nn.Module):
    """Takes what else a denoiser is given, some of which has as many rows as the batch by chance."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, step, *, positions=None, mask=None, table=None, unused=None, beside=None):
        y = self.linear(x) * step[:, None, None]
        if positions is not None:
            y = y + positions[0]
        if mask is not None and mask.all():  # what a mask holds decides, as in transformers' models
            y = y.masked_fill(~mask[:, :, None], 0)
        if table is not None:
            y = y + table[(y.shape[-1] - torch.arange(y.shape[1])) % len(table), :1]
        if beside is not None:
            return y, positions[0] * beside
        return y


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(2, 5),
    length=st.integers(1, 5),
    size=st.integers(1, 3),
    options=st.sets(st.sampled_from(["positions", "mask", "unused", "beside"])),
    seed=st.integers(0, 99),
)
def test_what_is_as_long_as_the_batch_by_chance_is_told_from_rows(rows, length, size, options, seed):
    torch.manual_seed(seed)
    model = Attending().eval()
    x, step = torch.randn(rows, length, 4), torch.rand(rows)
    everything = {
        "positions": [torch.randn(length, 4)],
        "mask": torch.ones(rows, length, dtype=torch.bool),
        "unused": torch.randn(rows, 2),
        "beside": 2.0,
    }
    options = options | {"positions"} if "beside" in options else options
    kwargs = {name: value for name, value in everything.items() if name in options}
    expected = model(x, step, **kwargs)
    with hookcore.apply(model, [Slicing(size)]):
        torch.testing.assert_close(model(x, step, **kwargs), expected)


def test_a_table_that_is_as_long_as_the_batch_is_refused_unless_rows_are_named():
    model, x, step, table = Attending().eval(), torch.randn(3, 2, 4), torch.rand(3), torch.randn(3, 4)
    expected = model(x, step, table=table)
    with hookcore.apply(model, [Slicing()]), pytest.raises(HookcoreError, match="whether 'table' is 3 rows"):
        model(x, step, table=table)
    with hookcore.apply(model, [Slicing(rows=("x", "step"))]):
        torch.testing.assert_close(model(x, step, table=table), expected)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([torch.randn(2) for _ in range(4)], "fails with 5 in the place of 4 as the first dimension of 'x'"),
        ({number: torch.randn(2) for number in range(4)}, r"under the numbers of a dict \(0\)"),
    ],
    ids=["list", "dict"],
)
def test_what_is_keyed_by_row_is_refused(given, reason):
    class Keyed(nn.Module):
        def forward(self, x, rows):
            return torch.stack([row + rows[number] for number, row in enumerate(x)])

    model = Keyed()
    with hookcore.apply(model, [Slicing()]):
        with pytest.raises(HookcoreError, match=reason):
            model(torch.randn(4, 2), given)
        model(torch.randn(1, 2), given)


def test_a_batch_in_a_list_is_no_batch_of_its_tensors():
    """As of Z-Image: a list of images without a dimension for the batch."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, images):
            return [self.conv(image[None])[0] for image in images]

    with hookcore.apply(model := Listed(), [Slicing()]), pytest.raises(HookcoreError, match="of 'images'"):
        model([torch.randn(4, 2, 2), torch.randn(4, 2, 2)])


@pytest.mark.parametrize(
    "draws", [torch.randn_like, lambda y: nn.functional.dropout(y, 0.5)], ids=["noise", "dropout"]
)
def test_random_draws_are_refused_before_any_is_made(draws):
    model = Wrapping(draws).eval()
    state = torch.get_rng_state()
    with (
        hookcore.apply(model, [Slicing()]),
        pytest.raises(HookcoreError, match="draws random numbers .*dropout"),
    ):
        model(torch.zeros(3, 4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("notes", [[], [None], {}], ids=["list", "filled", "dict"])
def test_a_call_that_writes_into_its_arguments_is_refused_with_nothing_written(notes):
    class Writing(nn.Module):
        def forward(self, x, notes):
            self.last = x
            if isinstance(notes, dict):
                notes["x"] = x
            elif notes:
                notes[0] = x
            else:
                notes.append(x)
            return x

    before = copy.copy(notes)
    with hookcore.apply(model := Writing(), [Slicing(2)]):
        with pytest.raises(HookcoreError, match="writes into what it is given"):
            model(torch.randn(3, 2), notes)
        assert notes == before
        assert not hasattr(model, "last")
        model(torch.randn(2, 2), notes)
    assert notes != before


def test_what_is_rows_is_found_once_for_a_kind_of_call():
    """With other sizes and numbers, too; with another argument it is found anew."""
    followed = []

    class Counting(nn.Module):
        def forward(self, x, step, scale=None):
            followed.extend([1] * x.is_meta)
            return x * step if scale is None else x * step * scale

    with hookcore.apply(model := Counting(), [Slicing()]):
        model(torch.randn(3, 2), 1)
        first = len(followed)
        model(torch.randn(4, 5), 2)
        assert len(followed) == first > 0
        model(torch.randn(4, 5), 2, torch.randn(4, 1))
        assert len(followed) > first


def test_rows_that_no_entry_takes_are_refused():
    with pytest.raises(
        PlanError, match=r"forward\(\) of 'Linear' has none of the arguments .*'y'.* it has input"
    ):
        hookcore.apply(nn.Linear(2, 2), [Slicing(rows="y")])


def test_the_peers_slicing_is_refused():
    model = autoencoder().build()
    model.enable_slicing()
    with pytest.raises(
        PlanError, match=r"already splits its batches itself. Call `model.disable_slicing\(\)`"
    ):
        hookcore.apply(model, [Slicing()])


def test_entries_can_be_named():
    model = autoencoder().build()
    applied = hookcore.apply(model, [Slicing(2, entries="decode")])
    assert "1 x decode()" in str(applied)
    assert "encode()" not in str(applied)
    applied.remove()
    with pytest.raises(PlanError, match="has no method 'dekode' whose batches could be split"):
        hookcore.apply(model, [Slicing(entries=("dekode",))])


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_bad_sizes_are_refused_at_once(size):
    with pytest.raises(ValueError, match="batch_size is .* expected an int of 1 or more rows"):
        Slicing(size)


def test_only_autoencoders_are_taken_unasked():
    (vae,) = hookcore.status(autoencoder().build()).components
    (other,) = hookcore.status(nn.Linear(2, 2)).components
    assert Slicing().skip_unless_named(vae) is None
    assert "no autoencoder" in Slicing().skip_unless_named(other)
