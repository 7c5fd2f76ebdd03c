"""Masks over all pixels: made a few rows at a time they are what they would be at once."""

from __future__ import annotations

import pytest
import torch
from autoencoders import FAMILIES
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import prepare_causal_attention_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

import hookcore
from hookcore_plugins import Tiling
from hookcore_plugins.tiling.attention_masks import Deferring, Mask

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def causal(frames, pixels, dtype, rows=None):
    return prepare_causal_attention_mask(frames, pixels, dtype, torch.device("cpu"), batch_size=rows)


def deferred(frames, pixels, *rest):
    with Deferring():
        mask = causal(frames, pixels, *rest)
    assert type(mask) is (Mask if frames * pixels > 1 else torch.Tensor)
    return mask


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    frames=st.integers(1, 4),
    pixels=st.integers(1, 5),
    width=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_attention_a_few_queries_at_a_time_is_attention(**drawn):
    rows, heads, frames, pixels, width, dtype, seed = drawn.values()
    generator = torch.Generator().manual_seed(seed)
    shape = rows, heads, frames * pixels, width
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))

    def attended(mask):
        if heads > 1:
            mask = mask.repeat_interleave(heads, dim=0)
        mask = mask.view(rows, heads, -1, mask.shape[-1])
        assert mask.shape == (rows, heads, frames * pixels, frames * pixels)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    expected = attended(causal(frames, pixels, dtype, rows))
    torch.testing.assert_close(attended(deferred(frames, pixels, dtype, rows)), expected)


@settings(deadline=None, max_examples=30)
@given(frames=st.integers(1, 4), pixels=st.integers(1, 5), dtype=DTYPES)
def test_whatever_else_is_done_with_a_mask_is_done_with_all_of_it(frames, pixels, dtype):
    mask, whole = deferred(frames, pixels, dtype), causal(frames, pixels, dtype)
    assert (mask.shape, mask.dtype, mask.device) == (whole.shape, whole.dtype, whole.device)
    for something in (
        lambda it: it.unsqueeze(1),
        lambda it: it.t(),
        lambda it: it[0],
        lambda it: it.exp() + it.exp().sum(),
        lambda it: torch.where(it == 0, it, it.new_tensor(7)),
        lambda it: it.reshape(-1),
        lambda it: it.repeat_interleave(2, dim=0),
        lambda it: torch.cat([it, it]),
        lambda it: torch.zeros_like(it).masked_fill(it == 0, 1),
    ):
        assert torch.equal(something(mask), something(whole))


def test_what_is_written_into_a_mask_stays():
    mask, whole = deferred(2, 3, torch.float32, 1), causal(2, 3, torch.float32).clone()[None]
    for it in (mask, whole):
        it[..., 0, 0] = 5.0
    assert torch.equal(mask.unsqueeze(0) + 0, whole[None])


def test_nothing_is_deferred_that_compares_no_rows_with_columns():
    with Deferring():
        for one, other in ((torch.arange(3), 1), (torch.eye(3), torch.ones(3, 3)), (torch.eye(3), 0)):
            assert type(one >= other) is torch.Tensor


@pytest.mark.parametrize(("method", "contexts"), [("encode", ("global", "exact")), ("decode", ("global",))])
def test_attention_sees_the_whole_video_in_the_memory_of_a_tile(method, contexts, sim):
    """HunyuanVideo's mask takes more than all else: it has the square of the latents of all frames."""
    make, _, _, _ = FAMILIES["hunyuanvideo"]
    torch.manual_seed(0)
    model = make().eval().to("sim")
    device = torch.get_device_module("sim")
    whole = torch.randn((1, 3, 5, 240, 240) if method == "encode" else (1, 4, 2, 30, 30)).to("sim")

    def run(x):
        device.reset_peak_memory_stats()
        before = device.memory_allocated()
        with torch.no_grad():
            output = model.encode(x).latent_dist.parameters if method == "encode" else model.decode(x).sample
        return device.max_memory_allocated() - before, output

    size = whole.shape[-1] * 13 // 30
    part = whole[..., :size, :size].contiguous()
    tile, _ = run(part)
    tile += part.nbytes  # which is put together of patches, or taken out
    _, expected = run(whole)
    far = {"exact": 0.0}
    for context in ("tile", *contexts):
        with hookcore.apply(model, [Tiling(104, 24, context=context)]):
            peak, output = run(whole)
        assert peak <= 1.05 * (tile + output.nbytes)
        far[context] = float((output - expected).abs().mean() / expected.std())
    assert far["global"] < 0.5 * far["tile"]
    assert far["exact"] < 1e-5
