"""One trace: made from a call, and called like it."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import nn

from hookcore import UnsupportedModelError
from hookcore_plugins.trace.inputs import put_together, take_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hookcore_plugins.trace.inputs import Inputs, Structure

_TracerWarning: Any = vars(torch.jit)["TracerWarning"]
_SHOWN = 400  # characters of what torch says


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
        """Calls it with tensors like the example's."""
        return put_together(self.output, self.script(*tensors))


@frozen(eq=False)
class Call:
    """What is traced.

    Attributes:
        model: The model, with its weights on the device.
        entry: The name of one of its methods.
        example: The arguments.
        device: Where it is called.
    """

    model: nn.Module
    entry: str
    example: Inputs
    device: torch.device

    def __str__(self) -> str:
        return f"{type(self.model).__name__}.{self.entry}()"


class _Flat(nn.Module):
    """A call that takes and returns tensors only.

    Args:
        model: What the parameters belong to that the trace is to share.
        call: The call.
        example: The arguments, of which only tensors are replaced.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any], example: Inputs) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        # In one list, which torch.jit does not look into.
        self.outside: list[Any] = [call, example, None]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Calls, and notes the structure of the output."""
        call, example, _ = self.outside
        args, kwargs = example.with_tensors(tensors)
        found: list[torch.Tensor] = []
        self.outside[2] = take_apart(call(*args, **kwargs), found)
        return tuple(found)


def record(call: Call, entry: Callable[..., Any]) -> Recording:
    """Traces a call.

    The model is as before afterwards: what the call changed in buffers is undone.

    Args:
        call: What to trace.
        entry: The entry, without hooks.

    Raises:
        UnsupportedModelError: It cannot be traced, or the trace does not compute the same.
    """
    flat = _Flat(call.model, entry, call.example)
    tensors = tuple(tensor.detach().to(call.device, copy=True) for tensor in call.example.tensors)
    trace: Any = torch.jit.trace
    try:
        with _unchanged(call.model), _random_state(call.device), quiet():
            # torch calls the trace, to compare, and only warns if it computes something else.
            warnings.filterwarnings("error", "Output nr .* does not match", _TracerWarning)
            script = trace(flat, tensors, strict=False)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"cannot trace {call}: {error}") from error
    except Exception as error:  # torch has many, some of which print whole tensors
        text = " ".join(str(error).split())
        said = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
        raise UnsupportedModelError(f"cannot trace {call}: {said}. Leave it out, or use Compile") from error
    return Recording(script, flat.outside[2])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's note that torch.jit is deprecated: the plan says that once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Gives the random state back that tracing used."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Gives buffers the values back that they had; refuses a call that puts other tensors in their place."""
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
