"""Traces in files: without weights, which are the model's."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import TYPE_CHECKING, Any

import torch

from hookcore import PlanError
from hookcore_plugins.trace.inputs import class_named, name_of, with_classes
from hookcore_plugins.trace.recording import Recording, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from hookcore_plugins.trace.recording import Call

_FILE = "hookcore.json"
_MODEL = "model."  # what stands before the FQNs of a model's tensors in a trace


def save(recording: Recording, path: Path, call: Call) -> None:
    """Writes a trace, with what it fits.

    Raises:
        OSError: The file cannot be written.
    """
    facts = _facts(call) | {"output": with_classes(recording.output, name_of)}
    temporary = path.with_name(f"{path.name}.part")
    with _without_weights(recording.script), quiet():
        torch.jit.save(recording.script, temporary, _extra_files={_FILE: json.dumps(facts)})
    temporary.replace(path)  # whole, or not at all


def load(path: Path, call: Call) -> Recording:
    """Reads a trace, and gives it the model's tensors.

    Raises:
        PlanError: It is no trace of such a call of such a model.
    """
    files = {_FILE: ""}
    try:
        with quiet():
            read: Any = torch.jit.load
            script = read(path, map_location=call.device, _extra_files=files)
        facts = json.loads(files[_FILE])
    except (RuntimeError, ValueError) as error:
        raise PlanError(
            f"'{path}' is no trace that was saved here ({error}). Give another path, or delete the file"
        ) from error
    for what, value in _facts(call).items():
        if facts.get(what) != value:
            raise PlanError(
                f"the trace in '{path}' does not fit: its {what} is {_short(facts.get(what))}, expected "
                f"{_short(value)}. Give another path, or delete the file to trace again"
            )
    try:
        output = with_classes(facts["output"], class_named)
    except LookupError as error:
        raise PlanError(
            f"the trace in '{path}' returns a {error}, which is not imported. Import it first"
        ) from error
    tensors = dict(_tensors(call.model))
    for holder, name, fqn in _places(script):
        setattr(holder, name, tensors[fqn])
    return Recording(script, output)


def _facts(call: Call) -> dict[str, Any]:
    """What has to be the same for a trace to fit."""
    return {
        "model": name_of(type(call.model)),
        "entry": call.entry,
        "device": call.device.type,
        "gradients": torch.is_grad_enabled(),
        "training": call.model.training,
        "inputs": call.example.describe(),
        "tensors": [[fqn, list(it.shape), str(it.dtype)] for fqn, it in _tensors(call.model)],
    }


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _places(script: torch.jit.ScriptModule) -> Iterator[tuple[Any, str, str]]:
    """Where a trace holds tensors of the model: module and attribute, and the FQN in the model."""
    for fqn, _ in list(_tensors(script)):
        *holders, name = fqn.split(".")
        yield functools.reduce(getattr, holders, script), name, fqn.removeprefix(_MODEL)


@contextlib.contextmanager
def _without_weights(script: torch.jit.ScriptModule) -> Iterator[None]:
    """Takes the tensors out of a trace for a while."""
    places = list(_places(script))
    tensors = [getattr(holder, name) for holder, name, _ in places]
    try:
        for (holder, name, _), tensor in zip(places, tensors, strict=True):
            setattr(holder, name, torch.empty(0, dtype=tensor.dtype))
        yield
    finally:
        for (holder, name, _), tensor in zip(places, tensors, strict=True):
            setattr(holder, name, tensor)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 200 else f"{text[:200]}..."
