"""Group norms with the statistics of a whole image, where they are given only a part of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

Moments = tuple["Tensor", "Tensor"]
"""Means and variances of the groups of one norm, `(B, groups)` each, in float32 or more."""


class Recorded(TorchFunctionMode):
    """Notes the statistics of every group norm that is computed while this is active, and has it use them.

    It sees the function, whichever module calls it: norms inside of other norms need no names.

    Args:
        core: Takes the part out of what is normalized that is to be measured; None: all of it.

    Attributes:
        moments: The statistics, in the order of the calls.
    """

    def __init__(self, core: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.moments: list[Moments] = []
        self._core = core

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:
            given = _arguments(*args, **(kwargs or {}))
            x, groups, *_ = given
            self.moments.append(_moments(x if self._core is None else self._core(x), groups))
            return _normalised(self.moments[-1], *given)
        return func(*args, **(kwargs or {}))


class Replayed(TorchFunctionMode):
    """Use given statistics in group norms, in the order of the calls, instead of their own.

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


class Measured(Exception):  # noqa: N818 -- no error: it ends a pass
    """Leaves a pass after the norm that was to be measured.

    Attributes:
        moments: What was measured.
        pixels: On how many pixels.
    """

    def __init__(self, moments: Moments, pixels: int) -> None:
        super().__init__()
        self.moments = moments
        self.pixels = pixels


class Measuring(Replayed):
    """Gives the first norms of a pass statistics, and ends it at the next one with that one's own.

    Args:
        moments: Those of the first norms.
        core: Takes the part out of what is normalized that is to be measured.
    """

    def __init__(self, moments: Sequence[Moments], core: Callable[[Tensor], Tensor]) -> None:
        super().__init__(moments)
        self._left = len(moments)
        self._core = core

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.group_norm:
            if not self._left:
                x, groups, *_ = _arguments(*args, **(kwargs or {}))
                core = self._core(x)
                raise Measured(_moments(core, groups), core.shape[2:].numel())
            self._left -= 1
        return super().__torch_function__(func, types, args, kwargs)


def averaged(samples: Sequence[Moments], weights: Sequence[float] | None = None) -> Moments:
    """The statistics of one norm over several samples together.

    Args:
        samples: The statistics on each.
        weights: How large each is; None: alike.
    """
    means, variances = (torch.stack(it) for it in zip(*samples, strict=True))
    shares = means.new_tensor([1.0] * len(samples) if weights is None else weights)
    shares = (shares / shares.sum())[:, None, None]
    mean = (means * shares).sum(0)
    return mean, ((variances + (means - mean).square()) * shares).sum(0)


def _moments(x: Tensor, groups: int) -> Moments:
    """Those of torch's own kernel, which is many times as fast as `var_mean` on a CPU."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    rows, channels, *size = wide.shape
    _, mean, deviation = torch.native_group_norm(
        wide, None, None, rows, channels, math.prod(size), groups, 0.0
    )
    return mean, deviation.reciprocal().square()


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
    weight, bias = (
        it if it is None or (rows == 1 and it.dtype == mean.dtype) else it.to(mean.dtype).repeat(rows)
        for it in (weight, bias)
    )
    flat = x.reshape(1, rows * channels, *x.shape[2:])
    normal = F.batch_norm(flat, mean, variance, weight, bias, training=False, eps=eps)
    return normal.reshape(x.shape)
