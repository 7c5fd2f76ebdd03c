"""Attention tile by tile is attention: any shape, mask, dtype and tile, both ways, and in less memory."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from attrs import frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hookcore.testing import simulator
from hookcore_plugins.attention_backend import chunked_attention, tiles

MASKS = ["none", "bool", "additive", "very negative"]


@frozen
class Case:
    """What to attend to.

    Attributes:
        batch: The query's dimensions before the heads.
        shared: Which of these key and value have as one, to be broadcast; a bit each.
        heads: Heads of key and value; 0 for tensors without that dimension.
        group: Heads of the query to each of these.
        lengths: Queries and keys.
        sizes: Features of query and key, and of value.
        mask: What kind of mask.
        mask_as_one: Which dimensions of the mask are one, from the last on; a bit each.
        mask_dims: How many leading dimensions the mask lacks.
        causal: is_causal.
        scale: scale.
        spread: How large queries are.
        seed: Of the numbers.
    """

    batch: tuple[int, ...]
    shared: int
    heads: int
    group: int
    lengths: tuple[int, int]
    sizes: tuple[int, int]
    mask: str
    mask_as_one: int
    mask_dims: int
    causal: bool
    scale: float | None
    spread: float
    seed: int

    def tensors(self, dtype):
        generator = torch.Generator().manual_seed(self.seed)
        queries, keys = self.lengths
        size, value_size = self.sizes
        batch = self.batch if self.heads else ()
        kept = tuple(1 if self.shared >> index & 1 else it for index, it in enumerate(batch))
        heads, more = ((self.heads,), (self.heads * self.group,)) if self.heads else ((), ())
        query = self.spread * torch.randn(*batch, *more, queries, size, generator=generator)
        key = torch.randn(*kept, *heads, keys, size, generator=generator)
        value = torch.randn(*kept, *heads, keys, value_size, generator=generator)
        shape = [*batch, *more, queries, keys]
        shape = [1 if self.mask_as_one >> index & 1 else it for index, it in enumerate(reversed(shape))][::-1]
        shape = shape[min(self.mask_dims, len(shape) - 2) :]
        mask = None
        if self.mask != "none":
            mask = torch.rand(shape, generator=generator) < 0.6
        if self.mask in {"additive", "very negative"}:
            low = -math.inf if self.mask == "additive" else torch.finfo(dtype).min
            mask = torch.randn(shape, generator=generator).to(dtype).masked_fill(~mask, low)
        return query.to(dtype), key.to(dtype), value.to(dtype), mask

    @property
    def options(self):
        return {"is_causal": self.causal, "scale": self.scale, "enable_gqa": self.group > 1}


CASES = st.builds(
    Case,
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    shared=st.integers(0, 3),
    heads=st.integers(0, 3),
    group=st.integers(1, 3),
    lengths=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    mask=st.sampled_from(MASKS),
    mask_as_one=st.integers(0, 31),
    mask_dims=st.integers(0, 3),
    causal=st.booleans(),
    scale=st.none() | st.sampled_from([0.0, 0.3, 2.0]),
    spread=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 99),
).filter(lambda case: case.heads or case.group == 1)
TILES = st.tuples(st.integers(1, 100), st.integers(1, 10))
"""How many numbers a tile may have, and keys."""


def tiled(tile, dtype, *args, **kwargs):
    numbers, keys = tile
    nbytes = numbers * max(dtype.itemsize, 4)
    with mock.patch.object(tiles, "MOST_KEYS", keys):
        return chunked_attention(*args, **kwargs, tile_bytes=nbytes)


def exact(query, key, value, mask=None, *, is_causal, scale, enable_gqa):
    """Attention by its definition, in float64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(group, dim=-3) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    return weights @ value


def bound(case, tensors, expected):
    """How far an output may be off: rounding once to the dtype, and sums of products in float32 or more.

    An error of e in each score changes each weight by a factor of at most exp(2e).
    """
    query, key, value, mask = tensors
    dtype = query.dtype
    unit = torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps
    scale = query.shape[-1] ** -0.5 if case.scale is None else case.scale
    scores = query.shape[-1] * query.double().abs().amax() * key.double().abs().amax() * scale
    added = 0.0
    if mask is not None and mask.is_floating_point():
        # What is added to scores takes their last bits; a very negative number all of them, which matters
        # only in a row that has nothing else.
        sizes = mask.double().abs().expand(*mask.shape[:-2], query.shape[-2], key.shape[-2])
        if case.causal:
            sizes = sizes.masked_fill(~torch.ones(sizes.shape[-2:], dtype=torch.bool).tril(), math.inf)
        large = sizes > torch.finfo(dtype).max / 2
        masked_rows = large.all(dim=-1) & sizes.isfinite().any(dim=-1)
        added = math.inf if masked_rows.any() else sizes[~large].max() if (~large).any() else 0.0
    in_score = float((query.shape[-1] + 4) * unit * (scores + added))
    in_weights = math.expm1(min(2 * in_score, 99.0)) + (2 * key.shape[-2] + 16) * unit
    return in_weights * value.double().abs().amax() + torch.finfo(dtype).eps * expected.abs()


@settings(deadline=None, max_examples=250)
@given(CASES, TILES, st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_it_is_attention(case, tile, dtype):
    query, key, value, mask = case.tensors(dtype)
    got = tiled(tile, dtype, query, key, value, mask, **case.options)
    expected = exact(query, key, value, mask, **case.options)
    assert got.shape == expected.shape
    assert got.dtype is dtype
    if not got.numel():
        return
    if not key.shape[-2]:
        assert not got.any()
        return
    off = (got.double() - expected).abs()
    assert (off <= bound(case, (query, key, value, mask), expected)).all()


@settings(deadline=None, max_examples=100)
@given(CASES, TILES)
def test_it_is_what_torch_computes(case, tile):
    """Also where a row has no key, in the shape and in what is broadcast."""
    query, key, value, mask = case.tensors(torch.float64)
    if case.causal and mask is not None:
        return  # torch takes both or not, by kernel
    theirs = scaled_dot_product_attention(query, key, value, mask, **case.options)
    ours = tiled(tile, torch.float64, query, key, value, mask, **case.options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=100)
@given(CASES, TILES, st.integers(1, 15))
def test_gradients_are_those_of_attention(case, tile, wanted):
    """By query, key, value and an additive mask, whichever are wanted."""
    query, key, value, mask = case.tensors(torch.float64)
    inputs = [query, key, value, *([] if mask is None else [mask])]
    chosen = [it for index, it in enumerate(inputs) if wanted >> index & 1 and it.is_floating_point()]
    if not chosen:
        return
    for tensor in chosen:
        tensor.requires_grad_()
    upstream = torch.randn(
        exact(query, key, value, mask, **case.options).shape,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(case.seed),
    )
    got = torch.autograd.grad(
        tiled(tile, torch.float64, query, key, value, mask, **case.options), chosen, upstream
    )
    expected = torch.autograd.grad(
        exact(query, key, value, mask, **case.options), chosen, upstream, allow_unused=True
    )
    for ours, theirs, tensor in zip(got, expected, chosen, strict=True):
        assert ours.shape == tensor.shape
        wanted_one = torch.zeros_like(tensor) if theirs is None else theirs
        torch.testing.assert_close(ours, wanted_one, rtol=1e-7, atol=1e-7)


def test_gradients_in_half_precision_are_summed_in_float32():
    """Sums over 600 queries in bfloat16 itself would be off by far more than its one rounding."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 1, 600, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    options = {"is_causal": False, "scale": None, "enable_gqa": False}
    expected = torch.autograd.grad(exact(*inputs, **options).square().sum(), inputs)
    got = torch.autograd.grad(chunked_attention(*inputs, tile_bytes=400).double().square().sum(), inputs)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).double().norm() <= 2**-7 * theirs.double().norm()


def test_a_second_derivative_is_refused():
    query = torch.randn(1, 1, 4, 2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(chunked_attention(query, query, query).sum(), query, create_graph=True)


def test_dropout_is_refused():
    query = torch.randn(1, 1, 4, 2)
    with pytest.raises(NotImplementedError, match=r"dropout_p=0.1"):
        chunked_attention(query, query, query, dropout_p=0.1)


@pytest.mark.parametrize(
    ("shapes", "gqa"),
    [
        (((2, 3), (2, 4), (2, 4)), False),
        (((2, 4), (3, 4), (2, 4)), False),
        (((4,), (3, 4), (3, 4)), False),
        (((2, 1, 2, 4), (3, 1, 2, 4), (3, 1, 2, 4)), False),
        (((3, 2, 4), (2, 2, 4), (2, 2, 4)), True),
        (((4, 2, 4), (2, 2, 4), (1, 2, 4)), True),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, gqa):
    with pytest.raises(ValueError, match=r"query, key and value have"):
        chunked_attention(*map(torch.zeros, shapes), enable_gqa=gqa)


def test_a_mask_of_one_dimension_is_refused_as_torch_does():
    query = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match=r"attn_mask has the shape \(4,\)"):
        chunked_attention(query, query, query, torch.ones(4, dtype=torch.bool))


# Memory


def peak_beyond_inputs(attend, length, *, grad=False):
    """Bytes that the simulated device had at most beside what it was given."""
    tensors = [torch.randn(1, 2, length, 8).to("sim").requires_grad_(grad) for _ in range(3)]
    device = torch.get_device_module("sim")
    before = device.memory_allocated()
    device.reset_peak_memory_stats()
    output = attend(*tensors)
    if grad:
        output.sum().backward()
    return device.max_memory_allocated() - before


@pytest.mark.parametrize("grad", [False, True])
def test_memory_is_linear_in_the_length(sim, grad):
    """Twice the length takes at most twice the memory, beside one tile; all scores would take four times."""

    def attend(*tensors):
        return chunked_attention(*tensors, tile_bytes=16 * 1024)

    small, large = (peak_beyond_inputs(attend, length, grad=grad) for length in (256, 512))
    assert large <= 2 * small
    in_out = 2 * 512 * 8 * 4
    assert large <= (7 if grad else 2) * in_out + 4 * 16 * 1024 + 8 * 1024
    simulator.check()


def test_no_tile_takes_more_than_it_may(sim):
    """Of a small tile the scores are little beside the rest; of all scores they are most."""
    peaks = {
        nbytes: peak_beyond_inputs(lambda *it, nbytes=nbytes: chunked_attention(*it, tile_bytes=nbytes), 256)
        for nbytes in (4096, 64 * 1024, 512 * 1024)
    }
    assert peaks[4096] < peaks[64 * 1024] < peaks[512 * 1024]
    for nbytes, peak in peaks.items():
        # Its scores, what else a tile's rows need, and the output with the sums.
        assert peak <= 4 * nbytes + 2 * (2 * 256 * 8 * 4) + 8 * 1024


@settings(deadline=None, max_examples=200)
@given(
    st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 9), st.integers(1, 9)),
    st.booleans(),
    st.integers(1, 200),
    st.integers(1, 10),
)
def test_tiles_cover_what_is_attended_to_once(shape, causal, numbers, most_keys):
    """No tile has more scores than it may, unless those of one query of a group are more."""
    batch, heads, group, queries, keys = shape
    q, k = torch.zeros(batch, heads, group, queries, 1), torch.zeros(batch, heads, keys, 1)
    seen = torch.zeros(shape, dtype=torch.int64)
    with mock.patch.object(tiles, "MOST_KEYS", most_keys):
        for rows in tiles.blocks_of_rows(q, k, tiles.Options(causal, 1.0, 4 * numbers)):
            for tile in rows.tiles():
                part = seen[tile.within(seen)]
                part += 1
                assert part.numel() <= max(numbers, group * part.shape[-1])
                assert part.shape[-1] <= min(most_keys, numbers)
                assert not causal or tile.keys.start < tile.queries.stop
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    assert seen.max() == 1
    assert (seen[..., allowed.tril() if causal else allowed] == 1).all()


@example(5, 3)
@given(st.integers(0, 30), st.integers(1, 30))
def test_ranges_are_even(size, most):
    pieces = tiles.even_slices(size, most)
    assert [it for piece in pieces for it in range(piece.start, piece.stop)] == list(range(size))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert not lengths or (max(lengths) <= most and max(lengths) - min(lengths) <= 1)
