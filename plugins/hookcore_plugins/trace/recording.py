"""Records a trace of one call, and runs it."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import nn

from hookcore import UnsupportedModelError
from hookcore_plugins.trace.outputs import put_together, take_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hookcore_plugins.trace.inputs import Inputs
    from hookcore_plugins.trace.outputs import Structure

_TracerWarning: Any = vars(torch.jit)["TracerWarning"]
_SHOWN = 400  # characters of torch's message


@frozen(eq=False)
class Recording:
    """A trace.

    Attributes:
        script: Takes tensors and returns a tuple of tensors. It holds the model's own parameters.
        output: The structure of the output around these.
    """

    script: torch.jit.ScriptModule
    output: Structure

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the trace with tensors like the example's."""
        return put_together(self.output, self.script(*tensors))


@frozen(eq=False)
class Call:
    """The call to trace.

    Attributes:
        model: The model, with its weights in place.
        entry: The name of one of its methods.
        method: That method, without hooks.
        example: The arguments.
        devices: The device of each tensor among them.
    """

    model: nn.Module
    entry: str
    method: Callable[..., Any]
    example: Inputs
    devices: tuple[torch.device, ...]

    def __str__(self) -> str:
        return f"{type(self.model).__name__}.{self.entry}()"

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Return copies of the example's tensors, on their devices."""
        pairs = zip(self.example.tensors, self.devices, strict=True)
        return tuple(tensor.detach().to(device, copy=True) for tensor, device in pairs)

    @contextlib.contextmanager
    def without_effect(self) -> Iterator[None]:
        """Undo at the end of a `with` block what calls changed in buffers and the random state.

        Raises:
            UnsupportedModelError: A call put another tensor in the place of a buffer or parameter.
        """
        device = self.devices[0]
        devices = [] if device.type == "cpu" else [device]
        kind = "cuda" if device.type == "cpu" else device.type
        with _tensors_unchanged(self.model), torch.random.fork_rng(devices, device_type=kind), quiet():
            yield


class TensorCall(nn.Module):
    """A call that takes and returns tensors only.

    Args:
        call: The call. Its model is a submodule, so that a trace shares its parameters.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.model = call.model
        self.train(call.model.training)
        self._hidden: list[Any] = [call, None]  # in a list, which torch.jit does not look into

    @property
    def output(self) -> Structure:
        """The structure of the last call's output."""
        structure: Structure = self._hidden[1]
        return structure

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the method, and keep the structure of its output."""
        call: Call = self._hidden[0]
        args, kwargs = call.example.with_tensors(tensors)
        found: list[torch.Tensor] = []
        self._hidden[1] = take_apart(call.method(*args, **kwargs), found)
        return tuple(found)


def record(call: Call) -> Recording:
    """Trace a call, and leave the model as it was.

    Raises:
        UnsupportedModelError: It cannot be traced, or the trace does not compute the same.
    """
    flat = TensorCall(call)
    trace: Any = torch.jit.trace
    try:
        with call.without_effect():
            # torch calls the trace, to compare, and only warns if it computes something else.
            warnings.filterwarnings("error", "Output nr .* does not match", _TracerWarning)
            script = trace(flat, call.inputs(), strict=False, _store_inputs=False)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"cannot trace {call}: {error}") from error
    except Exception as error:  # torch has many, some of which print whole tensors
        raise UnsupportedModelError(
            f"cannot trace {call}: {shortened(error)}. Leave it out, or use Compile"
        ) from error
    return Recording(script, flat.output)


def shortened(error: BaseException) -> str:
    """Return an error's message in one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's note that torch.jit is deprecated: the plan has it once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


@contextlib.contextmanager
def _tensors_unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the values of buffers; refuse a call that puts other tensors in their place."""
    places: list[tuple[nn.Module, Any, str]] = [
        (module, registered, name)
        for module in model.modules()
        for registered in (module._parameters, module._buffers)
        for name in registered
    ]
    before = [dict.get(registered, name) for _, registered, name in places]
    values = [None if it is None or isinstance(it, nn.Parameter) else it.detach().clone() for it in before]
    replaced = []
    try:
        yield
    finally:
        for (module, registered, name), tensor, value in zip(places, before, values, strict=True):
            if dict.get(registered, name) is not tensor:
                replaced.append(f"{type(module).__name__}.{name}")
                dict.__setitem__(registered, name, tensor)
            if tensor is not None and value is not None:
                with torch.no_grad():
                    tensor.copy_(value)
    if replaced:
        raise UnsupportedModelError(
            f"the call puts another tensor in the place of {replaced[0]!r}, which a trace would not do"
        )
