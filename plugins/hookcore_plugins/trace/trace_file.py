"""Reads and writes trace files: TorchScript without weights, which are the model's."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import secrets
import stat
from typing import TYPE_CHECKING, Any

import torch

from hookcore import PlanError
from hookcore_plugins.trace.recording import Recording, TensorCall, quiet, shortened

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from hookcore_plugins.trace.outputs import Structure
    from hookcore_plugins.trace.recording import Call

_FACTS = "hookcore.json"
_MODEL = "model."  # the prefix of a model's FQNs in a trace


def save(recording: Recording, path: Path, call: Call) -> None:
    """Write a trace, with the facts of the call that it fits.

    Raises:
        PlanError: The file cannot be written.
    """
    facts = _facts(call) | {"output": _described(recording.output)}
    buffer = io.BytesIO()
    with _without_weights(recording.script), quiet():
        torch.jit.save(recording.script, buffer, _extra_files={_FACTS: json.dumps(facts)})
    try:
        _replace(path, buffer.getvalue())
    except OSError as error:
        raise PlanError(f"cannot write the trace to '{path}': {error}. Give another path, or none") from error


def load(path: Path, call: Call) -> Recording | None:
    """Read a trace and give it the model's tensors; None if there is no file.

    Nothing that the file names is looked up or made: the output's structure is that of the call itself, which
    is run once and compared with the trace. The trace is TorchScript, which torch runs.

    Raises:
        PlanError: The file is not a trace of such a call of such a model.
        UnsupportedModelError: The call's output cannot be put together again.
    """
    data = _read(path)
    if data is None:
        return None
    expected = _facts(call)
    try:
        reader: Any = torch._C.PyTorchFileReader(io.BytesIO(data))
        found = json.loads(reader.get_record(f"extra/{_FACTS}"))
        if not isinstance(found, dict):
            raise TypeError(f"{_FACTS} is a {type(found).__name__}, expected an object")  # noqa: TRY301
    except Exception as error:
        raise _no_trace(path, error) from error
    # Before anything in the file is run: loading TorchScript may run some of it.
    for what, value in expected.items():
        _compare(path, what, found.get(what), value)
    flat = TensorCall(call)
    with call.without_effect():
        results = flat(*call.inputs())
        _compare(path, "output", found.get("output"), _described(flat.output))
        script = _script(data, path, call)
        _check(script, results, path, call)
    return Recording(script, flat.output)


def _script(data: bytes, path: Path, call: Call) -> torch.jit.ScriptModule:
    """Load the TorchScript of a trace, with the model's tensors in it."""
    tensors = dict(_tensors(call.model))
    read: Any = torch.jit.load
    try:
        script: torch.jit.ScriptModule = read(io.BytesIO(data), map_location=call.devices[0])
        for holder, name, fqn in _places(script):
            setattr(holder, name, tensors[fqn])
    except Exception as error:  # of torch's reader, compiler and unpickler
        raise _no_trace(path, error) from error
    return script


def _check(script: Any, results: tuple[torch.Tensor, ...], path: Path, call: Call) -> None:
    """Compare a trace with the call itself, as torch.jit.trace does."""
    try:
        outputs = script(*call.inputs())
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        torch.testing.assert_close(outputs, results, rtol=1e-5, atol=1e-5, equal_nan=True)
    except Exception as error:
        raise PlanError(
            f"the trace in '{path}' does not compute what {call} does ({shortened(error)}). Its code has "
            "changed since, or the file is damaged: delete the file to trace again"
        ) from error


def _no_trace(path: Path, error: Exception) -> PlanError:
    return PlanError(
        f"'{path}' is no trace that was saved here ({shortened(error)}). Give another path, or delete the "
        "file"
    )


def _compare(path: Path, what: str, found: Any, expected: Any) -> None:
    if json.dumps(found) != json.dumps(expected):
        raise PlanError(
            f"the trace in '{path}' does not fit: its {what} is {_short(found)}, expected "
            f"{_short(expected)}. Give another path, or delete the file to trace again"
        )


# Facts


def _facts(call: Call) -> dict[str, Any]:
    """Return all that has to be the same for a trace to fit, as JSON has it."""
    return {
        "model": _name_of(type(call.model)),
        "entry": call.entry,
        "device": [device.type for device in call.devices],
        "gradients": torch.is_grad_enabled(),
        "training": call.model.training,
        "inputs": call.example.describe(),
        "tensors": [[fqn, list(it.shape), str(it.dtype)] for fqn, it in _tensors(call.model)],
    }


def _described(structure: Structure) -> list[Any]:
    """Return a structure as text, to be compared and never to be looked up."""
    how, what, children = structure
    shown = _name_of(what) if isinstance(what, type) else repr(what)
    return [how, shown, [[repr(key), _described(child)] for key, child in children]]


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


# Tensors


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _places(script: torch.jit.ScriptModule) -> Iterator[tuple[Any, str, str]]:
    """Yield the module and attribute of each tensor in a trace, with its FQN in the model."""
    for fqn, _ in list(_tensors(script)):
        *holders, name = fqn.split(".")
        yield functools.reduce(getattr, holders, script), name, fqn.removeprefix(_MODEL)


@contextlib.contextmanager
def _without_weights(script: torch.jit.ScriptModule) -> Iterator[None]:
    """Take the tensors out of a trace within a `with` block."""
    places = list(_places(script))
    tensors = [getattr(holder, name) for holder, name, _ in places]
    try:
        for (holder, name, _), tensor in zip(places, tensors, strict=True):
            setattr(holder, name, torch.empty(0, dtype=tensor.dtype))
        yield
    finally:
        for (holder, name, _), tensor in zip(places, tensors, strict=True):
            setattr(holder, name, tensor)


# Files


def _read(path: Path) -> bytes | None:
    """Return the content of a regular file; None if there is no file.

    Raises:
        PlanError: It is not a regular file, or cannot be read.
    """
    try:
        # Without waiting for the writer of a pipe.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PlanError(f"the path of a trace, '{path}', is not a regular file. Give another path")
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlanError(f"cannot read the trace in '{path}': {error}. Give another path") from error


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and replaces a link instead of following it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(temporary, "xb", opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink()
            raise
