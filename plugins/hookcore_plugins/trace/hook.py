"""The hook of a traced entry: runs the trace in the place of each call that is like the example."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from hookcore import Hook, bare_entry, status
from hookcore_plugins.trace.inputs import Inputs
from hookcore_plugins.trace.recording import Call, Recording, record
from hookcore_plugins.trace.trace_file import load, save

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn

Setting = tuple[tuple[torch.device, ...], bool, bool]
"""What a trace depends on besides the arguments: their devices, whether gradients are recorded, training."""

_MOST_REASONS = 50  # calls may differ from the example in any number of ways


@frozen
class TraceReport:
    """The numbers of calls of a traced entry.

    Attributes:
        traces: Traces: one for each device, with and without gradients, and in training.
        traced_calls: Calls that ran as a trace.
        untraced_calls: Calls that ran without.
        reasons: The first difference of these calls from the example, and how often.
    """

    traces: int
    traced_calls: int
    untraced_calls: int
    reasons: Mapping[str, int]


class TraceHook(Hook):
    """Traces an entry and calls the trace.

    Args:
        signature: The entry's signature.
        example: The arguments of the traced call.
        entry: The entry's name.
        path: The file of the first trace; None for none.
    """

    def __init__(self, signature: inspect.Signature, example: Inputs, entry: str, path: Path | None) -> None:
        self._signature = signature
        self._example = example
        self._entry = entry
        self._path = path
        self._recordings: dict[Setting, Recording] = {}
        self._traced = 0
        self._untraced: Counter[str] = Counter()  # by the reason

    def attach(self, module: nn.Module) -> None:
        """Trace at once if the model is where the example is, and nothing is on it that may move it."""
        devices = _devices(self._example)
        tensors = (*module.parameters(), *module.buffers())
        if not status(module).attachments and all(it.device == devices[0] for it in tensors):
            with torch.no_grad():
                self._recording(module, bare_entry(module, self._entry), devices)

    def detach(self, module: nn.Module) -> None:
        """Drop all traces."""
        self._recordings.clear()

    def substitute(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """Return the traced entry."""
        return partial(self._call, module, entry)

    def _call(self, module: nn.Module, entry: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
        ):  # by whoever compiles the model as a whole: a trace is compiled code
            alone = torch.compiler.disable(self._call)  # type: ignore[no-untyped-call]
            return alone(module, entry, *args, **kwargs)
        inputs = Inputs.of(self._signature, args, kwargs)
        difference = self._example.difference(inputs)
        if difference is not None:
            self._count_untraced(difference)
            return entry(*args, **kwargs)
        recording = self._recording(module, entry, _devices(inputs))
        self._traced += 1
        return recording(inputs.tensors)

    def _recording(
        self, module: nn.Module, entry: Callable[..., Any], devices: tuple[torch.device, ...]
    ) -> Recording:
        setting = devices, torch.is_grad_enabled(), module.training
        recording = self._recordings.get(setting)
        if recording is None:
            call = Call(module, self._entry, entry, self._example, devices)
            path = None if self._recordings else self._path
            recording = None if path is None else load(path, call)
            if recording is None:
                recording = record(call)
                if path is not None:
                    save(recording, path, call)
            self._recordings[setting] = recording
        return recording

    def _count_untraced(self, difference: str) -> None:
        reason = f"not traced: {difference}"
        if reason not in self._untraced and len(self._untraced) >= _MOST_REASONS:
            reason = "not traced: for other reasons"
        self._untraced[reason] += 1

    def reset(self, module: nn.Module) -> None:
        """Set the counts to zero."""
        self._traced = 0
        self._untraced.clear()

    def run_report(self, module: nn.Module) -> TraceReport:
        """Return the numbers of traces, and of calls by whether they ran as a trace."""
        return TraceReport(
            len(self._recordings), self._traced, self._untraced.total(), reasons=dict(self._untraced)
        )


def _devices(inputs: Inputs) -> tuple[torch.device, ...]:
    return tuple(tensor.device for tensor in inputs.tensors)
