"""Group norms with the statistics of a whole image, where they are given only a part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

Moments = tuple["Tensor", "Tensor"]
"""Means and variances of the groups of one norm, `(B, groups)` each, in float32 or more."""


class Recorded(TorchFunctionMode):
    """Notes the statistics of every group norm that is computed while this is active.

    It sees the function, whichever module calls it: norms inside of other norms need no names.

    Attributes:
        moments: The statistics, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[Moments] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:
            x, groups, *_ = _arguments(*args, **(kwargs or {}))
            wide = torch.promote_types(x.dtype, torch.float32)
            grouped = x.detach().to(wide).reshape(x.shape[0], groups, -1)
            variance, mean = torch.var_mean(grouped, dim=2, correction=0)
            self.moments.append((mean, variance))
        return func(*args, **(kwargs or {}))


class Replayed(TorchFunctionMode):
    """Has group norms use given statistics, in the order of the calls, instead of their own.

    Args:
        moments: As `Recorded` has them, of a pass that computes the same norms.
    """

    def __init__(self, moments: Sequence[Moments]) -> None:
        super().__init__()
        self._coming = iter(moments)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:
            return _normalised(next(self._coming), *_arguments(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def averaged(samples: Iterable[Sequence[Moments]]) -> list[Moments]:
    """The statistics of several samples of equal size together."""
    together = []
    for moments in zip(*samples, strict=True):
        means = torch.stack([mean for mean, _ in moments])
        variances = torch.stack([variance for _, variance in moments])
        mean = means.mean(0)
        together.append((mean, (variances + (means - mean).square()).mean(0)))
    return together


def _arguments(
    input: Tensor,  # noqa: A002 -- torch's name
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, int, Tensor | None, Tensor | None, float]:
    return input, num_groups, weight, bias, eps


def _normalised(  # noqa: PLR0917 -- those of the function that it stands in for
    moments: Moments, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm with given statistics: torch's batch norm, whose channels are those of all rows."""
    rows, channels = x.shape[:2]
    mean, variance = (it.repeat_interleave(channels // groups, dim=1).flatten() for it in moments)
    if weight is not None:
        weight = weight.to(mean.dtype).repeat(rows)
    if bias is not None:
        bias = bias.to(mean.dtype).repeat(rows)
    flat = x.reshape(1, rows * channels, *x.shape[2:])
    normal = F.batch_norm(flat, mean, variance, weight, bias, training=False, eps=eps)
    return normal.reshape(x.shape)
