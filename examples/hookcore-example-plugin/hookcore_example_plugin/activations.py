"""The technique, its hook, and the function that reads what the hooks have seen."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from torch import nn

import hookcore
from hookcore import Binding, Component, Hook, Phase, PlanError, Skipped, Technique


def _patterns(patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


@frozen
class ActivationStatistics(Technique):
    """Records what modules put out: how large it is, and how much of it is no number.

    Nothing is kept but five numbers for each module, which stay on the device of the outputs: a call waits
    for no copy. Outputs pass unchanged. While it computes, it takes a few times the memory of one output.

    Attributes:
        modules: Regular expressions, searched in module FQNs; modules that match are recorded. None records
            every layer, which is a module that has no other modules in it.

    Raises:
        ValueError: A pattern is no regular expression.
    """

    name: ClassVar[str] = "activation_statistics"
    phase: ClassVar[Phase] = Phase.COMPUTE

    modules: tuple[str, ...] | None = field(default=None, converter=_patterns)

    @modules.validator
    def _check_modules(self, _attribute: object, patterns: tuple[str, ...] | None) -> None:
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"modules has {pattern!r}, no regular expression: {error}") from error

    def bind(self, component: Component) -> Iterator[Binding | Skipped]:
        """Lists a hook for each module that is recorded.

        Raises:
            PlanError: No module matches.
        """
        chosen = [fqn for fqn, module in component.modules.items() if self._records(fqn, module)]
        if not chosen:
            raise PlanError(
                f"{self.name} has nothing to record: no module of {component.label('')!r} matches "
                f"modules={self.modules!r}. Give a pattern that is found in an FQN, such as 'blocks'"
            )
        for fqn in chosen:
            if type(component.modules[fqn]).forward is nn.Module.forward:
                yield Skipped(fqn, "it has no forward and is never called")
            else:
                yield Binding(fqn, StatisticsHook())

    def _records(self, fqn: str, module: nn.Module) -> bool:
        if self.modules is None:
            return next(module.children(), None) is None
        return any(re.search(pattern, fqn) for pattern in self.modules)


@frozen
class Statistics:
    """What one module has put out since the technique was applied or reset.

    All figures but `count` and `non_finite` are of the finite elements, and NaN where there is none.

    Attributes:
        calls: How often the module returned.
        count: Elements of its outputs, of all floating-point tensors together.
        non_finite: How many of these are infinite or no number.
        minimum: The least element.
        maximum: The greatest.
        mean_abs: Mean of the absolute values.
        rms: Root of the mean of the squares.
    """

    calls: int = 0
    count: int = 0
    non_finite: int = 0
    minimum: float = math.nan
    maximum: float = math.nan
    mean_abs: float = math.nan
    rms: float = math.nan


class StatisticsTable(dict[str, Statistics]):
    """Module FQN to its statistics, in order of registration; print it."""

    def __str__(self) -> str:
        rows = [["module", "calls", "count", "min", "max", "mean |x|", "rms", "non-finite"]]
        for fqn, it in self.items():
            figures = [f"{figure:.4g}" for figure in (it.minimum, it.maximum, it.mean_abs, it.rms)]
            rows.append([fqn, str(it.calls), str(it.count), *figures, str(it.non_finite)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *rest in rows:
            numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *numbers]))
        return "\n".join(lines)


def statistics(target: Any) -> StatisticsTable:
    """Reads what has been recorded on a model so far; waits for its device.

    Args:
        target: What `hookcore.apply` takes. Modules are named as they are in it, whichever part of it the
            technique was applied to.

    Returns:
        The statistics of each recorded module; empty if the technique is not on the target.
    """
    status = hookcore.status(target)
    hooks = {
        attachment.component.modules[binding.fqn]: binding.hook
        for attachment in status.attachments
        for binding in attachment.bindings
        if isinstance(binding.hook, StatisticsHook)
    }
    return StatisticsTable(
        (component.label(fqn), hooks[module].statistics())
        for component in status.components
        for fqn, module in component.modules.items()
        if module in hooks
    )


class StatisticsHook(Hook):
    """Records the outputs of one module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # this technique forbids nobody to call a model from two threads
        self._calls = 0
        self._count = 0
        self._sums: torch.Tensor | None = None

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """Takes the output's figures; leaves it as it is."""
        found = [(tensor.numel(), _sums(tensor)) for tensor in _floating_point_tensors(output)]
        with self._lock:
            self._calls += 1
            for count, sums in found:
                self._count += count
                self._sums = sums if self._sums is None else _merged(self._sums, sums)

    def reset(self, module: nn.Module) -> None:
        """Begins anew."""
        with self._lock:
            self._calls = 0
            self._count = 0
            self._sums = None

    def statistics(self) -> Statistics:
        """The figures so far."""
        with self._lock:
            calls, count, sums = self._calls, self._count, self._sums
        if sums is None:
            return Statistics(calls=calls)
        lowest, highest_negated, sum_abs, sum_squares, finite = sums.tolist()
        if not finite:
            return Statistics(calls=calls, count=count, non_finite=count)
        return Statistics(
            calls=calls,
            count=count,
            non_finite=count - int(finite),
            minimum=lowest,
            maximum=-highest_negated,
            mean_abs=sum_abs / finite,
            rms=math.sqrt(sum_squares / finite),
        )


@torch.no_grad()
def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """What has to be known of a tensor's finite elements, in a form that can be merged.

    Returns:
        `(5,)` of float64 on the tensor's device: minimum, maximum negated, sum of absolute values, sum of
        squares, number of elements.
    """
    values = tensor.double()
    finite = values.isfinite()
    sizes = values.abs().where(finite, 0)
    return torch.stack(
        [
            values.where(finite, math.inf).min(),
            values.neg().where(finite, math.inf).min(),
            sizes.sum(),
            sizes.square().sum(),
            finite.sum(),
        ]
    )


@torch.no_grad()
def _merged(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """The sums of two sets of elements together, on the device of the later."""
    earlier = earlier.to(later.device)
    return torch.cat([torch.minimum(earlier[:2], later[:2]), earlier[2:] + later[2:]])


def _floating_point_tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in an output that have figures to speak of, also inside lists, tuples and mappings."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel() and not output.is_meta:
            yield output
    elif isinstance(output, Mapping):
        yield from _floating_point_tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _floating_point_tensors(item)
