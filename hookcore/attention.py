"""Attention functions: one call, what a function declares that it can do, and why it cannot do a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from attrs import field, frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

MaskKind = Literal["bool", "additive"]
Result = TypeVar("Result")


class AttentionCall(NamedTuple):  # torch.compile can make a NamedTuple, and no frozen attrs class
    """The arguments of one call of `torch.nn.functional.scaled_dot_product_attention`.

    Attributes:
        query: `(..., heads, L, E)`.
        key: `(..., heads, S, E)`; fewer heads with `enable_gqa`.
        value: `(..., heads, S, Ev)`.
        attn_mask: Broadcastable to `(..., heads, L, S)`: True where a key is attended to, or a number to add
            to the score. None for no mask.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether query i attends to the keys up to i only.
        scale: The factor of scores; None for `1 / sqrt(E)`.
        enable_gqa: Whether neighbouring heads of the query share a head of key and value.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients have to flow through the call."""
        tensors = self.query, self.key, self.value, self.attn_mask
        return torch.is_grad_enabled() and any(it is not None and it.requires_grad for it in tensors)

    def run(self, function: Callable[..., Result]) -> Result:
        """Call a function that has the signature of torch's own."""
        return function(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


class Objection(NamedTuple):
    """Why an attention function cannot do a call.

    Attributes:
        found: What the function cannot take, as a phrase: `"dtype torch.float64"`.
        expected: What it takes instead: `"torch.float16 or torch.bfloat16"`; empty where `found` says enough.
        remedy: What the caller can do about it: `"cast the model"`.
    """

    found: str
    expected: str = ""
    remedy: str = "choose another backend"

    def __str__(self) -> str:
        return f"found {self.found}, expected {self.expected}" if self.expected else self.found


def _available() -> None:
    """Declare that nothing is missing."""


def _tuple_or_none(values: Iterable[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


@frozen
class AttentionFunction:
    """A function that computes attention, which users choose by its name, and the limits that it declares.

    hookcore checks the declared limits before each call. For any other limit, `function` raises
    NotImplementedError with the reason; both lead to the fallback, or to an error with the module's name.

    Attributes:
        name: What users call it, in snake_case: `"chunked"`.
        function: Takes and returns what `torch.nn.functional.scaled_dot_product_attention` does, by the same
            names: query `(..., heads, L, E)`, key `(..., heads, S, E)`, value `(..., heads, S, Ev)`,
            attn_mask, dropout_p, is_causal, and by keyword scale and enable_gqa.
        unavailable: Returns an objection if the function cannot be used in this process at all, else None:
            `Objection("xformers is not installed", remedy="run `pip install xformers`")`.
        devices: Supported types of devices; None for all.
        dtypes: Supported dtypes of query, key and value; None for all.
        masks: Supported kinds of `attn_mask`: `"bool"`, `"additive"`.
        causal: Whether `is_causal` is supported.
        dropout: Whether a `dropout_p` other than 0 is supported.
        gqa: Whether `enable_gqa` is supported, with fewer heads of key and value than of the query.
        gradients: Whether gradients flow through the function.
        max_head_size: The largest supported E and Ev; None for any.
        head_size_multiple: A number by which E and Ev have to be divisible.
    """

    name: str
    function: Callable[..., Tensor]
    unavailable: Callable[[], Objection | None] = _available
    devices: tuple[str, ...] | None = field(default=None, converter=_tuple_or_none, kw_only=True)
    dtypes: tuple[torch.dtype, ...] | None = field(default=None, converter=_tuple_or_none, kw_only=True)
    masks: tuple[MaskKind, ...] = field(default=("bool", "additive"), converter=tuple, kw_only=True)
    causal: bool = field(default=True, kw_only=True)
    dropout: bool = field(default=True, kw_only=True)
    gqa: bool = field(default=True, kw_only=True)
    gradients: bool = field(default=True, kw_only=True)
    max_head_size: int | None = field(default=None, kw_only=True)
    head_size_multiple: int = field(default=1, kw_only=True)

    @masks.validator
    def _check_masks(self, _attribute: object, masks: tuple[str, ...]) -> None:
        if unknown := [kind for kind in masks if kind not in ("bool", "additive")]:
            raise ValueError(
                f"masks of attention function {self.name!r} has {unknown[0]!r}; expected 'bool' or 'additive'"
            )

    def objection_to_device(self, kind: str) -> Objection | None:
        """Return why the function cannot run on a type of device; None if it can."""
        if self.devices is None or kind in self.devices:
            return None
        return Objection(f"device {kind!r}", _one_of(map(repr, self.devices)), "move the model there")

    def objection_to_dtype(self, dtype: torch.dtype) -> Objection | None:
        """Return why the function cannot take tensors of a dtype; None if it can."""
        if self.dtypes is None or dtype in self.dtypes:
            return None
        return Objection(
            f"dtype {dtype}",
            _one_of(map(str, self.dtypes)),
            f"cast the model, as in model.to({self.dtypes[0]})",
        )

    def objection_to_head_size(self, size: int) -> Objection | None:
        """Return why the function cannot take heads of a size; None if it can."""
        if self.max_head_size is not None and size > self.max_head_size:
            return Objection(f"heads of size {size}", f"{self.max_head_size} at most")
        if size % self.head_size_multiple:
            return Objection(f"heads of size {size}", f"a multiple of {self.head_size_multiple}")
        return None

    def objection(self, call: AttentionCall) -> Objection | None:
        """Return which declared limit a call exceeds; None if it exceeds none."""
        return (
            self.objection_to_device(call.query.device.type)
            or self.objection_to_dtype(call.query.dtype)
            or self.objection_to_head_size(call.query.shape[-1])
            or self.objection_to_head_size(call.value.shape[-1])
            or self._objection_to_mask(call.attn_mask)
            or _objection("is_causal=True", call.is_causal, self.causal, "give the model a mask")
            or _objection(
                f"dropout_p={call.dropout_p}", call.dropout_p > 0, self.dropout, "call model.eval()"
            )
            or (None if self.gqa or not call.enable_gqa else _objection_to_heads(call.query, call.key))
            or _objection(
                "gradients", call.needs_gradients, self.gradients, "call the model under torch.no_grad()"
            )
        )

    def _objection_to_mask(self, mask: Tensor | None) -> Objection | None:
        if mask is None:
            return None
        kind: MaskKind = "additive" if mask.is_floating_point() else "bool"
        if kind in self.masks:
            return None
        expected = f"one that is {self.masks[0]}, or none" if self.masks else "none"
        return Objection(f"a mask that is {kind}", expected, "call the model without a mask")


def _objection(
    what: str, asked: bool, able: bool, remedy: str = "choose another backend"
) -> Objection | None:
    return Objection(what, "none", remedy) if asked and not able else None


def _objection_to_heads(query: Tensor, key: Tensor) -> Objection | None:
    of_query, of_key = (tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in (query, key))
    if of_query == of_key:
        return None
    return Objection(f"{of_query} heads of the query and {of_key} of the key", "as many of both")


def _one_of(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
