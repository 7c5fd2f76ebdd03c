"""What computes a model's attention: the backend, or the fallback where that cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from hookcore import Objection
from hookcore_plugins.attention_backend.constant_result import untraced
from hookcore_plugins.attention_backend.errors import AttentionError

if TYPE_CHECKING:
    from torch import Tensor

    from hookcore import AttentionFunction
    from hookcore_plugins.attention_backend.counts import Tally

_Objections = list[tuple["AttentionFunction", Objection]]


@frozen(eq=False)
class Choice:
    """What the user chose.

    Attributes:
        chosen: The backend.
        fallback: What does what that cannot; None to raise.
        unavailable: Why the backend cannot be used here at all, or None.
        tally: Counts.
    """

    chosen: AttentionFunction
    fallback: AttentionFunction | None
    unavailable: Objection | None
    tally: Tally

    def attend(self, label: str, /, *args: Any, **kwargs: Any) -> Tensor:
        """Computes attention, under autocast in the dtype in which torch's function would.

        Args:
            label: Whose, for messages.
            *args: What torch's function would be called with.
            **kwargs: Likewise.

        Raises:
            AttentionError: Neither the backend nor the fallback can.
        """
        query: Tensor = args[0] if args else kwargs["query"]
        device = query.device.type
        if not _casts_automatically(device):
            return self._attend(label, *args, **kwargs)
        # As torch's function does; what the backend computes with is its own business.
        dtype = torch.get_autocast_dtype(device)
        args = tuple(_cast(value, dtype) for value in args)
        kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return self._attend(label, *args, **kwargs)

    def _attend(  # noqa: PLR0917 -- torch's own signature
        self,
        label: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        given = [query, key, value, *([] if attn_mask is None else [attn_mask])]
        needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        objections: list[tuple[AttentionFunction, Objection]] = []
        for function in (self.chosen, self.fallback):
            if function is None:
                continue
            objection = self.unavailable if function is self.chosen else None
            objection = objection or function.objection(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal=is_causal,
                enable_gqa=enable_gqa,
                needs_gradients=needs_gradients,
            )
            if objection is None:
                try:
                    output = function.function(
                        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                    )
                except NotImplementedError as error:  # what it had not declared
                    said = str(error).strip().partition("\n")[0]
                    objection = Objection(said or "it cannot do this call")
                else:
                    self._count(function, objections)
                    return output
            objections.append((function, objection))
        raise AttentionError(refusal(label, objections))

    def _count(
        self, function: AttentionFunction, objections: list[tuple[AttentionFunction, Objection]]
    ) -> None:
        reason = ""
        if objections:
            (chosen, objection), *_ = objections
            reason = f"by {function.name} instead of {chosen.name} ({objection.found})"
        self.tally.count("fell_back" if objections else "computed", reason)


def _casts_automatically(device: str) -> bool:
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@untraced
def _has_autocast(device: str) -> bool:  # which torch.compile cannot ask before torch 2.13
    return torch.amp.is_autocast_available(device)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
        return value.to(dtype)
    return value


def refusal(label: str, objections: list[tuple[AttentionFunction, Objection]]) -> str:
    """Says why an attention cannot be computed, and what to do.

    Args:
        label: The module.
        objections: What was tried, and why it cannot.
    """
    (chosen, objection), *more = objections
    text = f"attention_backend {chosen.name!r} cannot compute the attention of {label!r}: {objection}. "
    for fallback, other in more:
        text += f"Nor can the fallback {fallback.name!r}: {other}. "
    remedy = objection.remedy[:1].upper() + objection.remedy[1:]
    other_way = "give another fallback=" if more else "give fallback='math' to have that do what it cannot"
    return f"{text}{remedy}, or {other_way}"
