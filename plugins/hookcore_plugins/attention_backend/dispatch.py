"""Computes each attention by the chosen backend, or by the fallback if the backend cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from hookcore import AttentionCall, HookcoreError, Objection
from hookcore_plugins.attention_backend.constant_result import constant_result

if TYPE_CHECKING:
    from torch import Tensor

    from hookcore import AttentionFunction
    from hookcore_plugins.attention_backend.counts import AttentionCounts

    Objections = list[tuple[AttentionFunction, Objection]]


class AttentionError(HookcoreError, RuntimeError):
    """A call exceeds the limits of the chosen attention backend, and of the fallback if there is one."""


@frozen(eq=False)
class AttentionDispatch:
    """The attention functions of one model.

    Attributes:
        backend: The chosen backend.
        fallback: Computes what the backend cannot; None to raise an error.
        unavailable: Why the backend cannot be used in this process; None if it can.
        counts: What the run report shows.
    """

    backend: AttentionFunction
    fallback: AttentionFunction | None
    unavailable: Objection | None
    counts: AttentionCounts

    def attend(self, label: str, /, *args: Any, **kwargs: Any) -> Tensor:
        """Compute one attention; under autocast in the dtype that torch's function would use.

        Args:
            label: The module, for messages.
            *args: The arguments that torch's function was called with.
            **kwargs: Likewise.

        Raises:
            AttentionError: Neither the backend nor the fallback can.
        """
        call = AttentionCall(*args, **kwargs)
        device = call.query.device.type
        if not _autocast_is_on(device):
            return self._attend(label, call)
        # Only the inputs: which dtype the backend computes in is its own decision.
        dtype = torch.get_autocast_dtype(device)
        call = AttentionCall(*(_cast(value, dtype) for value in call))
        with torch.autocast(device, enabled=False):
            return self._attend(label, call)

    def _attend(self, label: str, call: AttentionCall) -> Tensor:
        objections: Objections = []
        for function in (self.backend, self.fallback):
            if function is None:
                continue
            objection = self.unavailable if function is self.backend else None
            objection = objection or function.objection(call)
            if objection is None:
                try:
                    output = call.run(function.function)
                except NotImplementedError as error:  # a limit that the function did not declare
                    said = str(error).strip().partition("\n")[0]
                    objection = Objection(said or "it cannot do this call")
                else:
                    self._count(function, objections)
                    return output
            objections.append((function, objection))
        raise AttentionError(refusal(label, objections))

    def _count(self, function: AttentionFunction, objections: Objections) -> None:
        reason = ""
        if objections:
            (backend, objection), *_ = objections
            reason = f"by {function.name} instead of {backend.name} ({objection.found})"
        self.counts.count("fell_back" if objections else "computed", reason)


def _autocast_is_on(device: str) -> bool:
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@constant_result
def _has_autocast(device: str) -> bool:  # torch.compile cannot trace the question before torch 2.13
    return torch.amp.is_autocast_available(device)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
        return value.to(dtype)
    return value


def refusal(label: str, objections: Objections) -> str:
    """Format why an attention cannot be computed, and the remedy.

    Args:
        label: The module.
        objections: The functions that were tried, the backend first, and why each cannot.
    """
    (backend, objection), *more = objections
    text = f"attention_backend {backend.name!r} cannot compute the attention of {label!r}: {objection}. "
    for fallback, other in more:
        text += f"Nor can the fallback {fallback.name!r}: {other}. "
    remedy = objection.remedy[:1].upper() + objection.remedy[1:]
    other_way = "give another fallback=" if more else "give fallback='math' to have that do what it cannot"
    return f"{text}{remedy}, or {other_way}"
