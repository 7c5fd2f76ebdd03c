"""The hook: runs the trace in the place of the call, where the call is like the example."""

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

Setting = tuple[torch.device, bool, bool]
"""What a trace depends on beside the inputs: device, whether gradients are recorded, training or not."""


@frozen
class TraceReport:
    """What became of the calls of a traced entry.

    Attributes:
        traces: How many traces there are: one for each device, with and without gradients, and in training.
        traced_calls: How many calls ran as a trace.
        untraced_calls: How many ran as ever.
        reasons: How these differ from the example, and how often.
    """

    traces: int
    traced_calls: int
    untraced_calls: int
    reasons: Mapping[str, int]


class TraceHook(Hook):
    """Traces an entry, and calls the trace.

    Args:
        signature: The entry's.
        example: The call that is traced.
        entry: The entry's name.
        path: Where the first trace is kept.
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
        """Traces at once if the model is where the example is, and nothing is on it that may move it."""
        place = _device_of(self._example)
        tensors = (*module.parameters(), *module.buffers())
        if not status(module).attachments and all(it.device == place for it in tensors):
            with torch.no_grad():
                self._recording(module, bare_entry(module, self._entry), place)

    def detach(self, module: nn.Module) -> None:
        """Drops all traces."""
        self._recordings.clear()

    def substitute(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """The traced entry."""
        return partial(self._call, module, entry)

    def _call(self, module: nn.Module, entry: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        inputs = Inputs.of(self._signature, args, kwargs)
        difference = self._example.difference(inputs)
        if difference is not None:
            self._untraced[f"not traced: {difference}"] += 1
            return entry(*args, **kwargs)
        recording = self._recording(module, entry, _device_of(inputs))
        self._traced += 1
        return recording(inputs.tensors)

    def _recording(self, module: nn.Module, entry: Callable[..., Any], device: torch.device) -> Recording:
        setting = device, torch.is_grad_enabled(), module.training
        recording = self._recordings.get(setting)
        if recording is None:
            call = Call(module, self._entry, self._example, device)
            path = None if self._recordings else self._path
            if path is not None and path.exists():
                recording = load(path, call)
            else:
                recording = record(call, entry)
                if path is not None:
                    save(recording, path, call)
            self._recordings[setting] = recording
        return recording

    def reset(self, module: nn.Module) -> None:
        """Forgets the counts."""
        self._traced = 0
        self._untraced.clear()

    def run_report(self, module: nn.Module) -> TraceReport:
        """Traces there are, and calls by whether they ran as a trace."""
        return TraceReport(
            len(self._recordings), self._traced, self._untraced.total(), reasons=dict(self._untraced)
        )


def _device_of(inputs: Inputs) -> torch.device:
    return inputs.tensors[0].device
