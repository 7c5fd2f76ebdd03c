"""Exact attention in memory that grows with the sequence's length and not with its square.

Scores are computed tile by tile, and each row keeps its maximum, the sum of its exponentials and its weighted
sum of values so far, corrected whenever the maximum rises. That is the algorithm of Rabe and Staats,
"Self-attention Does Not Need O(n^2) Memory" (2021, arXiv:2112.05682). The backward pass computes each tile's
scores anew, as Dao et al., "FlashAttention" (2022, arXiv:2205.14135), do.

Only operations that every device of torch has are used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hookcore_plugins.attention_backend.tiles import Options, accumulation_dtype, blocks_of_rows

if TYPE_CHECKING:
    from torch import Tensor

    from hookcore_plugins.attention_backend.tiles import Tile

TILE_BYTES = 2 * 1024**2
"""The most bytes of the scores of one tile: about a core's own cache (`benchmarks/attention.py`)."""


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

    Sums are in float32 where the inputs are in float16 or bfloat16. A row whose keys are all masked is zero,
    as in torch. A mask and `is_causal` may be given together, and both hold.

    Args:
        query: `(..., heads, L, E)`, or without heads.
        key: `(..., heads, S, E)`; with `enable_gqa`, of fewer heads.
        value: `(..., heads, S, Ev)`.
        attn_mask: Broadcastable to `(..., heads, L, S)`: True where a key is attended to, or a number to add
            to the score.
        dropout_p: Only 0 is supported.
        is_causal: Whether query i attends to the keys up to i only, counted from the first.
        scale: The factor of scores; None for `1 / sqrt(E)`.
        enable_gqa: Whether neighbouring heads of the query share a head of key and value.
        tile_bytes: The most bytes of the scores of one tile; one query and one key of a group are the least.

    Returns:
        `(..., heads, L, Ev)`, in the query's dtype.

    Raises:
        NotImplementedError: `dropout_p` is not 0.
        ValueError: The shapes do not fit each other.
    """
    if dropout_p:
        raise NotImplementedError(f"it has no dropout, found dropout_p={dropout_p}")
    shape = _Shape.of(query, key, value, enable_gqa=enable_gqa)
    q, k, v = shape.arrange(query, key, value)
    mask = None if attn_mask is None else shape.arrange_mask(attn_mask)
    options = Options(is_causal, query.shape[-1] ** -0.5 if scale is None else scale, tile_bytes)
    differentiable = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    out: Tensor
    if torch.compiler.is_compiling():
        out, _, _ = _operator(q, k, v, mask, *options)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        out = _Attention.apply(q, k, v, mask, options)  # type: ignore[no-untyped-call]
    else:
        out, _, _ = _forward(q, k, v, mask, options)
    return out.reshape(*shape.lead, *query.shape[-2:-1], value.shape[-1])


class _Shape(NamedTuple):  # torch.compile can make a NamedTuple, and no frozen attrs class
    """The leading dimensions of the inputs.

    Attributes:
        lead: The dimensions before the last two, broadcast; with the query's heads.
        batch: The product of the dimensions before the heads.
        heads: Heads of key and value.
        group: Heads of the query that share one of these.
    """

    lead: tuple[int, ...]
    batch: int
    heads: int
    group: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> _Shape:
        """Broadcast the leading dimensions.

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
        """View them as `(batch, heads, group, L, E)`, `(batch, heads, S, E)` and `(batch, heads, S, Ev)`."""
        shared = (*self.lead[:-1], self.heads) if self.lead else ()
        q = query.expand(*self.lead, *query.shape[-2:])
        k, v = (tensor.expand(*shared, *tensor.shape[-2:]) for tensor in (key, value))
        return (
            q.reshape(self.batch, self.heads, self.group, *q.shape[-2:]),
            k.reshape(self.batch, self.heads, *k.shape[-2:]),
            v.reshape(self.batch, self.heads, *v.shape[-2:]),
        )

    def arrange_mask(self, mask: Tensor) -> Tensor:
        """Return a view of a mask with five dimensions, each of the size of the scores' or 1."""
        if mask.dim() < 2:
            raise ValueError(f"attn_mask has the shape {tuple(mask.shape)}; expected (..., L, S)")
        lead = (1,) * (len(self.lead) + 2 - mask.dim()) + tuple(mask.shape[:-2])
        rows = mask.shape[-2:]
        before = lead[:-1]
        if math.prod(before) > 1:  # several dimensions are merged into one, which cannot be broadcast
            mask = mask.expand(*self.lead[:-1], *lead[-1:], *rows)
        batch = self.batch if math.prod(before) > 1 else 1
        grouped = (self.heads, self.group) if lead and lead[-1] > 1 else (1, 1)
        return mask.reshape(batch, *grouped, *rows)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention.

    Args:
        q: `(B, H, G, L, E)`.
        k: `(B, H, S, E)`.
        v: `(B, H, S, Ev)`.
        mask: Five dimensions, each of the size of the scores' or 1.
        options: The options.

    Returns:
        The output `(B, H, G, L, Ev)`; for each row, the shift that is subtracted from its scores and the sum
        of their exponentials, both `(B, H, G, L, 1)`. One logarithm for both would lose the sum where the
        shift is very large, as in a row that a mask lowers as a whole.
    """
    kind = accumulation_dtype(q)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    shifts, totals = (q.new_empty(*q.shape[:-1], 1, dtype=kind) for _ in range(2))
    for rows in blocks_of_rows(q, k, options):
        query = q[rows.of_query].to(kind).mul(options.scale).flatten(2, 3)
        top = query.new_full((*query.shape[:-1], 1), -math.inf)
        total = torch.zeros_like(top)
        mixed = query.new_zeros(*query.shape[:-1], v.shape[-1])
        for keys in rows.tiles():
            scores = _scores(query, k[keys.of_key].to(kind), mask, keys, options)
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


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, tile: Tile, options: Options) -> Tensor:
    """Return the masked scores of one tile, `(B, H, G * L, S)`; `query` is scaled already."""
    scores = query @ key.mT
    grouped = tile.by_head(scores)
    if mask is not None:
        part = mask[tile.within(mask)]
        if part.dtype is torch.bool:
            grouped.masked_fill_(part.logical_not(), -math.inf)
        else:
            grouped.add_(part)
    if options.causal and tile.keys.stop > tile.queries.start + 1:
        rows = torch.arange(tile.queries.start, tile.queries.stop, device=scores.device)
        columns = torch.arange(tile.keys.start, tile.keys.stop, device=scores.device)
        grouped.masked_fill_(columns > rows.unsqueeze(1), -math.inf)
    return scores


class _Attention(torch.autograd.Function):
    """Attention that computes scores anew for the backward pass instead of keeping them."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- torch passes them by position
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options
    ) -> Tensor:
        out, shifts, totals = _forward(q, k, v, mask, options)
        ctx.save_for_backward(q, k, v, mask, out, shifts, totals)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError(
                "chunked attention has no second derivative; use 'math' where gradients are differentiated"
            )
        learned = ctx.needs_input_grad[3]
        return (*_backward(grad, ctx.saved_tensors, ctx.options, mask_is_learned=learned), None)


def _backward(
    grad: Tensor, saved: tuple[Tensor, ...], options: Options, *, mask_is_learned: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `_forward` by query, key, value and, if it is learned, mask.

    Args:
        grad: The gradient of the output, `(B, H, G, L, Ev)`.
        saved: Inputs and outputs of `_forward`: query, key, value, mask, output, shifts, sums.
        options: The options of `_forward`.
        mask_is_learned: Whether the mask needs a gradient.
    """
    q, k, v, mask, out, shifts, totals = saved
    kind = totals.dtype
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(tensor, dtype=kind) for tensor in (k, v))
    grad_mask = torch.zeros_like(mask, dtype=kind) if mask_is_learned else None
    for rows in blocks_of_rows(q, k, options):
        query = q[rows.of_query].to(kind).mul(options.scale).flatten(2, 3)
        given = grad[rows.of_query].to(kind).flatten(2, 3)
        common = (given * out[rows.of_query].to(kind).flatten(2, 3)).sum(dim=-1, keepdim=True)
        shift, total = (tensor[rows.of_query].flatten(2, 3) for tensor in (shifts, totals))
        by_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for tile in rows.tiles():
            key = k[tile.of_key].to(kind)
            weights = _scores(query, key, mask, tile, options).sub_(shift).exp_().div_(total)
            grad_v[tile.of_key] += weights.mT @ given
            by_score = (given @ v[tile.of_key].to(kind).mT).sub_(common).mul_(weights)
            by_query += by_score @ key
            grad_k[tile.of_key] += by_score.mT @ query
            if grad_mask is not None:
                part = grad_mask[tile.within(grad_mask)]
                part += tile.by_head(by_score).sum_to_size(part.shape)
        grad_q[rows.of_query] = rows.by_head(by_query.mul_(options.scale)).to(q.dtype)
    by_mask = None if grad_mask is None else grad_mask.to(mask.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), by_mask


# Operators for torch.compile, which would unroll the loop over tiles


_OPTIONS = "bool causal, float scale, SymInt tile_bytes"


@torch.library.custom_op(
    "hookcore::chunked_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _operator(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(q, k, v, mask, Options(*options))


@_operator.register_fake
def _(
    q: Tensor, _k: Tensor, v: Tensor, _mask: Tensor | None, *_options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shifts, totals = (q.new_empty(*q.shape[:-1], 1, dtype=accumulation_dtype(q)) for _ in range(2))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), shifts, totals


@torch.library.custom_op(
    "hookcore::chunked_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor shifts, "
    f"Tensor totals, {_OPTIONS}, bool mask_is_learned) -> Tensor[]",
)
def _backward_operator(grad: Tensor, *given: Any) -> list[Tensor]:
    *saved, causal, scale, tile_bytes, learned = given
    options = Options(causal, scale, tile_bytes)
    return [it for it in _backward(grad, tuple(saved), options, mask_is_learned=learned) if it is not None]


@_backward_operator.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> list[Tensor]:
    learned = [mask] if mask is not None and rest[-1] else []
    return [torch.empty_like(q), *(it.new_empty(it.shape) for it in (k, v, *learned))]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    learned = ctx.needs_input_grad[3]
    grads = _backward_operator(grad, *ctx.saved_tensors, *ctx.options, learned)
    return (*grads, *([] if learned else [None]), None, None, None)


_operator.register_autograd(_differentiate, setup_context=_keep)
