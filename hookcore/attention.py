"""What computes attention: a function with the signature of torch's own, and what it can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from attrs import field, frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from torch import Tensor

MaskKind = Literal["bool", "additive"]


class Objection(NamedTuple):  # of which torch.compile can make one, and not of a frozen attrs class
    """Why an attention function cannot do what is asked.

    Attributes:
        found: What is asked, or wrong, as a phrase for people: `"dtype torch.float64"`.
        expected: What it can do: `"torch.float16 or torch.bfloat16"`; empty where that goes without saying.
        remedy: What the caller can do about it: `"cast the model"`.
    """

    found: str
    expected: str = ""
    remedy: str = "choose another backend"

    def __str__(self) -> str:
        return f"found {self.found}, expected {self.expected}" if self.expected else self.found


def _available() -> None:
    """Says that nothing is missing."""


def _tuple_or_none(values: Iterable[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


@frozen
class AttentionFunction:
    """A way to compute attention that users choose by its name, with what is to be known before it is called.

    What is declared is checked before each call, so that `function` gets only what it can do. It may find
    more that it cannot do, and raise NotImplementedError with the reason.

    Attributes:
        name: What users call it, in snake_case: `"chunked"`.
        function: Takes and returns what `torch.nn.functional.scaled_dot_product_attention` does, by the same
            names: query `(..., heads, L, E)`, key `(..., heads, S, E)`, value `(..., heads, S, Ev)`,
            attn_mask, dropout_p, is_causal, and by keyword scale and enable_gqa.
        unavailable: Returns why it cannot be used here at all, with what to do about it, or None:
            `Objection("xformers is not installed", remedy="run `pip install xformers`")`.
        devices: Types of devices that it runs on; None for all.
        dtypes: Dtypes of query, key and value that it takes; None for all.
        masks: Kinds of `attn_mask` that it takes: `"bool"`, `"additive"`.
        causal: Whether it takes `is_causal`.
        dropout: Whether it takes a `dropout_p` other than 0.
        gqa: Whether it takes `enable_gqa`, with fewer heads of key and value than of the query.
        gradients: Whether gradients flow through it.
        max_head_size: The largest E and Ev; None for any.
        head_size_multiple: What E and Ev have to be multiples of.
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
        """Why it cannot run on a type of device, or None."""
        if self.devices is None or kind in self.devices:
            return None
        return Objection(f"device {kind!r}", _one_of(map(repr, self.devices)), "move the model there")

    def objection_to_dtype(self, dtype: torch.dtype) -> Objection | None:
        """Why it cannot take tensors of a dtype, or None."""
        if self.dtypes is None or dtype in self.dtypes:
            return None
        return Objection(
            f"dtype {dtype}",
            _one_of(map(str, self.dtypes)),
            f"cast the model, as in model.to({self.dtypes[0]})",
        )

    def objection_to_head_size(self, size: int) -> Objection | None:
        """Why it cannot take heads of a size, or None."""
        if self.max_head_size is not None and size > self.max_head_size:
            return Objection(f"heads of size {size}", f"{self.max_head_size} at most")
        if size % self.head_size_multiple:
            return Objection(f"heads of size {size}", f"a multiple of {self.head_size_multiple}")
        return None

    def objection(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *,
        is_causal: bool = False,
        enable_gqa: bool = False,
        needs_gradients: bool = False,
    ) -> Objection | None:
        """Why it cannot do one call, as far as it has declared what it can do, or None.

        Args:
            query: As `function` would get it; so are the next ones.
            key: Likewise.
            value: Likewise.
            attn_mask: Likewise.
            dropout_p: Likewise.
            is_causal: Likewise.
            enable_gqa: Likewise.
            needs_gradients: Whether gradients have to flow through it.
        """
        return (
            self.objection_to_device(query.device.type)
            or self.objection_to_dtype(query.dtype)
            or self.objection_to_head_size(query.shape[-1])
            or self.objection_to_head_size(value.shape[-1])
            or self._objection_to_mask(attn_mask)
            or _objection("is_causal=True", is_causal, self.causal, "give the model a mask")
            or _objection(f"dropout_p={dropout_p}", dropout_p > 0, self.dropout, "call model.eval()")
            or (None if self.gqa or not enable_gqa else _objection_to_heads(query, key))
            or _objection(
                "gradients", needs_gradients, self.gradients, "call the model under torch.no_grad()"
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
