"""Exact attention in memory that grows with the sequence's length and not with its square.

Scores are computed tile by tile, some queries by some keys, and each row keeps its maximum, the sum of its
exponentials and its weighted sum of values so far, corrected whenever the maximum rises. That is the
algorithm of Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021, arXiv:2112.05682). The
backward pass computes each tile's scores anew, as Dao et al., "FlashAttention" (2022, arXiv:2205.14135), do.

Only operations that every device of torch has are used.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

TILE_BYTES = 2 * 1024**2
"""What the scores of one tile may take: about what a core's own cache holds (`benchmarks/attention.py`)."""
MOST_KEYS = 1024
"""Keys in one tile at most: more of them leave room for few queries, and narrow products are slow."""


def chunked_attention(  # noqa: PLR0917 -- torch's own signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, tile by tile.

    It adds up in float32 where the inputs are in float16 or bfloat16. A row whose keys are all masked is
    zero, as torch has it. A mask given with `is_causal` holds beside it.

    Args:
        query: `(..., heads, L, E)`, or without heads.
        key: `(..., heads, S, E)`; with `enable_gqa`, of fewer heads.
        value: `(..., heads, S, Ev)`.
        attn_mask: What can be broadcast to `(..., heads, L, S)`: True where a key is attended to, or a number
            that is added to the score.
        dropout_p: Has to be 0.
        is_causal: Whether query i attends to the keys up to i only, counted from the first.
        scale: What scores are multiplied by; None for `1 / sqrt(E)`.
        enable_gqa: Whether neighbouring heads of the query share a head of key and value.
        tile_bytes: How much the scores of one tile may take, unless those of one query and one key take more.

    Returns:
        `(..., heads, L, Ev)`, in the query's dtype.

    Raises:
        NotImplementedError: Dropout was asked for.
        ValueError: The shapes do not fit each other.
    """
    if dropout_p:
        raise NotImplementedError(f"it has no dropout, found dropout_p={dropout_p}")
    shape = _Shape.of(query, key, value, enable_gqa=enable_gqa)
    q, k, v = shape.arrange(query, key, value)
    mask = None if attn_mask is None else shape.arrange_mask(attn_mask)
    how = _How(is_causal, query.shape[-1] ** -0.5 if scale is None else scale, tile_bytes)
    differentiable = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    out: Tensor
    if torch.compiler.is_compiling():
        out, _, _ = _operator(q, k, v, mask, *how)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        out = _Attention.apply(q, k, v, mask, how)  # type: ignore[no-untyped-call]
    else:
        out, _, _ = _forward(q, k, v, mask, how)
    return out.reshape(*shape.lead, *query.shape[-2:-1], value.shape[-1])


class _Shape(NamedTuple):  # of which torch.compile can make one, and not of a frozen attrs class
    """What the inputs have in common.

    Attributes:
        lead: Their dimensions before the last two, broadcast; with the query's heads.
        batch: The product of those before the heads.
        heads: Heads of key and value.
        group: How many heads of the query share one of these.
    """

    lead: tuple[int, ...]
    batch: int
    heads: int
    group: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> _Shape:
        """Finds it out.

        Raises:
            ValueError: The shapes do not fit each other.
        """
        shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
        if min(map(len, shapes)) < 2 or shapes[0][-1] != shapes[1][-1] or shapes[1][-2] != shapes[2][-2]:
            raise ValueError(
                f"query, key and value have shapes {shapes}; expected (..., L, E), (..., S, E), (..., S, Ev)"
            )
        leads = [shape[:-2] for shape in shapes]
        group = 1
        if enable_gqa:
            heads = [lead[-1] if lead else 1 for lead in leads]
            if heads[1] != heads[2] or not heads[1] or heads[0] % heads[1]:
                raise ValueError(
                    f"query, key and value have {heads} heads; key and value have to have as many, by which "
                    "those of the query can be divided"
                )
            group = heads[0] // heads[1]
            leads = [(*lead[:-1], heads[0]) for lead in leads]
        try:
            lead = tuple(torch.broadcast_shapes(*leads))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ValueError(f"query, key and value have shapes that do not fit: {shapes}") from error
        return cls(lead, math.prod(lead[:-1]), (lead[-1] if lead else 1) // group, group)

    def arrange(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of `(batch, heads, group, L, E)`, `(batch, heads, S, E)` and `(batch, heads, S, Ev)`."""
        shared = (*self.lead[:-1], self.heads) if self.lead else ()
        q = query.expand(*self.lead, *query.shape[-2:])
        k, v = (tensor.expand(*shared, *tensor.shape[-2:]) for tensor in (key, value))
        return (
            q.reshape(self.batch, self.heads, self.group, *q.shape[-2:]),
            k.reshape(self.batch, self.heads, *k.shape[-2:]),
            v.reshape(self.batch, self.heads, *v.shape[-2:]),
        )

    def arrange_mask(self, mask: Tensor) -> Tensor:
        """A view with five dimensions, each as the scores' or 1."""
        if mask.dim() < 2:
            raise ValueError(f"attn_mask has the shape {tuple(mask.shape)}; expected (..., L, S)")
        lead = (1,) * (len(self.lead) + 2 - mask.dim()) + tuple(mask.shape[:-2])
        rows = mask.shape[-2:]
        before = lead[:-1]
        if math.prod(before) > 1:  # what several dimensions are broadcast to cannot be one that is
            mask = mask.expand(*self.lead[:-1], *lead[-1:], *rows)
        batch = self.batch if math.prod(before) > 1 else 1
        grouped = (self.heads, self.group) if lead and lead[-1] > 1 else (1, 1)
        return mask.reshape(batch, *grouped, *rows)


class _How(NamedTuple):
    """How to attend.

    Attributes:
        causal: Whether keys after the query's own place are masked.
        scale: What scores are multiplied by.
        tile_bytes: How much the scores of one tile may take.
    """

    causal: bool
    scale: float
    tile_bytes: int


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: _How
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends.

    Args:
        q: `(B, H, G, L, E)`.
        k: `(B, H, S, E)`.
        v: `(B, H, S, Ev)`.
        mask: Five dimensions, each as the scores' or 1.
        how: How.

    Returns:
        `(B, H, G, L, Ev)`, and of each row, `(B, H, G, L, 1)`, what is taken from its scores before they are
        exponentiated, and what their exponentials are divided by. The two are not one logarithm, which
        would lose the second where the first is very large, as of rows that a mask lowers as a whole.
    """
    kind = _summed_in(q)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    shifts, totals = (q.new_empty(*q.shape[:-1], 1, dtype=kind) for _ in range(2))
    for rows in _blocks(q, k, how):
        query = q[rows.of_query].to(kind).mul(how.scale).flatten(2, 3)
        top = query.new_full((*query.shape[:-1], 1), -math.inf)
        total = torch.zeros_like(top)
        mixed = query.new_zeros(*query.shape[:-1], v.shape[-1])
        for keys in rows.tiles():
            scores = _scores(query, k[keys.of_key].to(kind), mask, keys, how)
            higher = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
            # Where every key so far is masked the maximum is -inf, and -inf - -inf would be no number.
            shift = higher.masked_fill(higher == -math.inf, 0)
            weights = scores.sub_(shift).exp_()
            fade = top.sub_(shift).exp_()
            total = total.mul_(fade).add_(weights.sum(dim=-1, keepdim=True))
            mixed = mixed.mul_(fade).add_(weights @ v[keys.of_key].to(kind))
            top = higher
        total.masked_fill_(total == 0, 1)  # no key at all: the row is zero
        mixed.div_(total)
        out[rows.of_query] = rows.by_head(mixed).to(out.dtype)
        shifts[rows.of_query] = rows.by_head(top.masked_fill_(top == -math.inf, 0))
        totals[rows.of_query] = rows.by_head(total)
    return out, shifts, totals


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, tile: _Tile, how: _How) -> Tensor:
    """The masked scores of one tile, `(B, H, G * L, S)`; `query` is scaled already."""
    scores = query @ key.mT
    grouped = tile.by_head(scores)
    if mask is not None:
        part = mask[tile.within(mask)]
        if part.dtype is torch.bool:
            grouped.masked_fill_(part.logical_not(), -math.inf)
        else:
            grouped.add_(part)
    if how.causal and tile.keys.stop > tile.queries.start + 1:
        rows = torch.arange(tile.queries.start, tile.queries.stop, device=scores.device)
        columns = torch.arange(tile.keys.start, tile.keys.stop, device=scores.device)
        grouped.masked_fill_(columns > rows.unsqueeze(1), -math.inf)
    return scores


class _Attention(torch.autograd.Function):
    """Attention that keeps no scores for the backward pass but computes them anew."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- torch passes them by position
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: _How
    ) -> Tensor:
        out, shifts, totals = _forward(q, k, v, mask, how)
        ctx.save_for_backward(q, k, v, mask, out, shifts, totals)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "chunked attention has no second derivative; use 'math' where gradients are differentiated"
            )
        learned = ctx.needs_input_grad[3]
        return (*_backward(grad, ctx.saved_tensors, ctx.how, mask_is_learned=learned), None)


def _backward(
    grad: Tensor, saved: tuple[Tensor, ...], how: _How, *, mask_is_learned: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of `_forward` by query, key, value and, if it is learned, mask.

    Args:
        grad: That of the output, `(B, H, G, L, Ev)`.
        saved: What `_forward` was given and returned: query, key, value, mask, output, shifts, totals.
        how: How it attended.
        mask_is_learned: Whether the mask's is wanted too.
    """
    q, k, v, mask, out, shifts, totals = saved
    kind = totals.dtype
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(tensor, dtype=kind) for tensor in (k, v))
    grad_mask = torch.zeros_like(mask, dtype=kind) if mask_is_learned else None
    for rows in _blocks(q, k, how):
        query = q[rows.of_query].to(kind).mul(how.scale).flatten(2, 3)
        given = grad[rows.of_query].to(kind).flatten(2, 3)
        common = (given * out[rows.of_query].to(kind).flatten(2, 3)).sum(dim=-1, keepdim=True)
        shift, total = (tensor[rows.of_query].flatten(2, 3) for tensor in (shifts, totals))
        by_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for tile in rows.tiles():
            key = k[tile.of_key].to(kind)
            weights = _scores(query, key, mask, tile, how).sub_(shift).exp_().div_(total)
            grad_v[tile.of_key] += weights.mT @ given
            by_score = (given @ v[tile.of_key].to(kind).mT).sub_(common).mul_(weights)
            by_query += by_score @ key
            grad_k[tile.of_key] += by_score.mT @ query
            if grad_mask is not None:
                part = grad_mask[tile.within(grad_mask)]
                part += tile.by_head(by_score).sum_to_size(part.shape)
        grad_q[rows.of_query] = rows.by_head(by_query.mul_(how.scale)).to(q.dtype)
    by_mask = None if grad_mask is None else grad_mask.to(mask.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), by_mask


# As operators, for torch.compile: it would unroll the loop over tiles


_HOW = "bool causal, float scale, SymInt tile_bytes"


@torch.library.custom_op(
    "hookcore::chunked_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {_HOW}) -> (Tensor, Tensor, Tensor)",
)
def _operator(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(q, k, v, mask, _How(*how))


@_operator.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, _mask: Tensor | None, *_how: Any) -> tuple[Tensor, Tensor, Tensor]:
    shifts, totals = (q.new_empty(*q.shape[:-1], 1, dtype=_summed_in(q)) for _ in range(2))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), shifts, totals


@torch.library.custom_op(
    "hookcore::chunked_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor shifts, "
    f"Tensor totals, {_HOW}, bool mask_is_learned) -> Tensor[]",
)
def _backward_operator(grad: Tensor, *given: Any) -> list[Tensor]:
    *saved, causal, scale, tile_bytes, learned = given
    how = _How(causal, scale, tile_bytes)
    return [it for it in _backward(grad, tuple(saved), how, mask_is_learned=learned) if it is not None]


@_backward_operator.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> list[Tensor]:
    learned = [mask] if mask is not None and rest[-1] else []
    return [torch.empty_like(q), *(it.new_empty(it.shape) for it in (k, v, *learned))]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.how = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    learned = ctx.needs_input_grad[3]
    grads = _backward_operator(grad, *ctx.saved_tensors, *ctx.how, learned)
    return (*grads, *([] if learned else [None]), None, None, None)


_operator.register_autograd(_differentiate, setup_context=_keep)


def _summed_in(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


# Tiles


@frozen(slots=False)
class _Rows:
    """Some queries of some heads, with all the keys that they may attend to.

    Attributes:
        batch: Which of the batch.
        heads: Which heads of key and value.
        group: How many heads of the query share one of these.
        queries: Which queries.
        reach: How many keys any of them may attend to, counted from the first.
        width: How many keys a tile has at most.
    """

    batch: slice
    heads: slice
    group: int
    queries: slice
    reach: int
    width: int

    @property
    def of_query(self) -> tuple[slice, ...]:
        """Where these rows are in `(B, H, G, L, ...)`."""
        return self.batch, self.heads, slice(None), self.queries

    def by_head(self, tensor: Tensor) -> Tensor:
        """A view of `(B, H, G * L, ...)` as `(B, H, G, L, ...)`."""
        length = self.queries.stop - self.queries.start
        return tensor.view(*tensor.shape[:2], self.group, length, *tensor.shape[3:])

    def tiles(self) -> Iterator[_Tile]:
        """The tiles of these rows, from the first key on."""
        for start in range(0, self.reach, self.width):
            keys = slice(start, min(start + self.width, self.reach))
            yield _Tile(self.batch, self.heads, self.group, self.queries, self.reach, self.width, keys)


@frozen(slots=False)
class _Tile(_Rows):
    """Some queries and some keys of some heads.

    Attributes:
        keys: Which keys.
    """

    keys: slice

    @property
    def of_key(self) -> tuple[slice, ...]:
        """Where the keys are in `(B, H, S, ...)`."""
        return self.batch, self.heads, self.keys

    def within(self, mask: Tensor) -> tuple[slice, ...]:
        """Where the tile is in a mask, of which any dimension may be 1."""
        whole = slice(None)
        places = (self.batch, self.heads, whole, self.queries, self.keys)
        return tuple(whole if size == 1 else place for size, place in zip(mask.shape, places, strict=True))


def _blocks(q: Tensor, k: Tensor, how: _How) -> Iterator[_Rows]:
    """Cuts the rows of all scores `(B, H, G, L, S)`, so that no tile takes more than it may."""
    batch, heads, group, length, _ = q.shape
    keys = k.shape[2]
    numbers = max(how.tile_bytes // _summed_in(q).itemsize, 1)
    width = max(min(keys, MOST_KEYS, numbers), 1)
    height = max(min(length, numbers // (width * group)), 1)
    heads_at_once = max(min(heads, numbers // (width * group * height)), 1)
    batch_at_once = max(min(batch, numbers // (width * group * height * max(heads, 1))), 1)
    if heads_at_once < heads:
        batch_at_once = 1
    for items, some_heads, queries in itertools.product(
        _cut(batch, batch_at_once), _cut(heads, heads_at_once), _cut(length, height)
    ):
        reach = min(keys, queries.stop) if how.causal else keys
        yield _Rows(items, some_heads, group, queries, reach, width)


def _cut(size: int, most: int) -> list[slice]:
    """Slices of as even a size as can be, of `most` at most."""
    count = -(-size // most)
    return [slice(index * size // count, (index + 1) * size // count) for index in range(count)]
