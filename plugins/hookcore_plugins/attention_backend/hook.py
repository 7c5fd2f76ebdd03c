"""The hook of one module that computes attention: checks each call of the backend, and falls back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hookcore import Hook, Objection
from hookcore_plugins.attention_backend.errors import AttentionError
from hookcore_plugins.attention_backend.redirect import redirected
from hookcore_plugins.attention_backend.stand_in import StandIn, StandingIn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from hookcore import AttentionFunction
    from hookcore_plugins.attention_backend.tally import AttentionReport, Tally


class AttentionHook(Hook):
    """Has the backend compute what one module would have torch compute.

    Args:
        label: The module, for messages.
        chosen: The backend.
        fallback: What does what that cannot; None to raise.
        unavailable: Why the backend cannot be used here at all, or None.
        computes: Whether the module itself is expected to compute attention.
        stand_in: What has to stand in during its calls.
        tally: Counts for all hooks of the technique.
        reports: Whether this hook tells what was counted.
    """

    def __init__(
        self,
        label: str,
        chosen: AttentionFunction,
        fallback: AttentionFunction | None,
        unavailable: Objection | None,
        *,
        computes: bool,
        stand_in: StandIn | None,
        tally: Tally,
        reports: bool,
    ) -> None:
        self._label = label
        self._chosen = chosen
        self._fallback = fallback
        self._unavailable = unavailable
        self._computes = computes
        self._standing_in = None if stand_in is None else StandingIn(stand_in)
        self._tally = tally
        self._reports = reports

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls on, with the backend in the place of torch's function."""
        attends = _Attends(self)
        if self._standing_in is not None:
            self._standing_in.begin(module)
        try:
            output = redirected(attends, call, *args, **kwargs)
        finally:
            if self._standing_in is not None:
                self._standing_in.end(module)
        if self._computes and not attends.count:
            self._tally.count("otherwise", f"{self._label} did not call torch's attention function")
        return output

    def attend(  # noqa: PLR0917 -- torch's own signature
        self,
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
        """Computes attention.

        Raises:
            AttentionError: Neither the backend nor the fallback can.
        """
        given = [query, key, value, *([] if attn_mask is None else [attn_mask])]
        needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        objections: list[tuple[AttentionFunction, Objection]] = []
        for function in (self._chosen, self._fallback):
            if function is None:
                continue
            objection = self._unavailable if function is self._chosen else None
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
        raise AttentionError(refusal(self._label, objections))

    def _count(
        self, function: AttentionFunction, objections: list[tuple[AttentionFunction, Objection]]
    ) -> None:
        if objections:
            (chosen, objection), *_ = objections
            self._tally.count("fell_back", f"by {function.name} instead of {chosen.name} ({objection.found})")
        else:
            self._tally.count("computed")

    def run_report(self, module: nn.Module) -> AttentionReport | None:
        """What computed the model's attention."""
        return self._tally.report() if self._reports else None

    def reset(self, module: nn.Module) -> None:
        """Begins to count anew."""
        self._tally.clear()


class _Attends:
    """What attention goes to in one call of a module.

    Attributes:
        count: How often it did so far.
    """

    __slots__ = ("_hook", "count")

    def __init__(self, hook: AttentionHook) -> None:
        self._hook = hook
        self.count = 0

    def __call__(self, /, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        query: Tensor = args[0] if args else kwargs["query"]
        device = query.device.type
        if not _casts_automatically(device):
            return self._hook.attend(*args, **kwargs)
        # As torch's function does; what the backend computes with is its own business.
        dtype = torch.get_autocast_dtype(device)
        args = tuple(_cast(value, dtype) for value in args)
        kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return self._hook.attend(*args, **kwargs)


def _casts_automatically(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


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
