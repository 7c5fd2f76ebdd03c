"""Models that tell their device tell the one they compute on, and moves leave their weights where they lie.

`model.device` of diffusers and transformers is a property that reads the device of the first parameter.
Pipelines make latents, tokens and masks there, and `pipe.device` is the first that a component tells.
diffusers makes an exception for its own offloading, too. Each model answers for itself, so that it holds for
every pipeline that the model is in, or gets into.

All of torch's moves (`to`, `cpu`, `cuda`, `half`, also those of a module around the model) go through the
`_apply` of each module, where a guard stands.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hookcore.errors import ConflictError
from hookcore.memory.instance_override import models_with, override_members, restore_class
from hookcore.memory.watched_reads import only_looking
from hookcore.stack import LeftOutOfCopies, PlainReduction

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from hookcore.target import Component

_APPLY = "_apply"
_PROBE_SHAPE = (2, 3, 2, 2)
"""Shape of tensors on which a function shows what it does; a memory format shows in four dimensions only."""
_PROBE_DTYPES = (torch.float32, torch.float16)
"""Two, of which a conversion changes one at least."""


class ModelDevice:
    """Answers `model.device` of a component and of the models in it, and keeps its weights from being moved.

    A move to the device that is answered, or to the one where weights lie between calls, has nothing to do.
    A move to any other is refused; so is `model.to(...)` of a model that tells its device, to any but that
    one: diffusers' own offloading begins with it. A dtype or memory format given with a move is taken.
    `model.dtype`, for which a parameter is looked at, counts as no read of it: pipelines ask for it at each
    step.

    Args:
        component: The component. Nothing is changed before `attach`.
        device: The device that it computes on.
        offload_device: The device where its weights lie between calls.
    """

    def __init__(self, component: Component, device: torch.device, offload_device: torch.device) -> None:
        self._models = [model for _, model in models_with("device", component.modules)]
        owners = {owner: None for slot in component.slots for owner, _ in slot.owners}
        self._guarded = list(dict.fromkeys([component.module, *owners]))
        self._device = device
        self._offload_device = offload_device
        self._answering: list[nn.Module] = []
        self._refusing: list[nn.Module] = []

    # Both go on where an exception, or an interrupt, has left the other.

    def attach(self) -> None:
        """Override the models' answers, and refuse moves of the modules, where that is not done yet."""
        device = _with_index(self._device)
        answers: dict[str, Callable[..., Any]] = {
            "device": lambda *_: device,
            "to": _refusing_other_devices(device),
            "dtype": _look,
        }
        for model in self._models[len(self._answering) :]:
            self._answering.append(model)
            override_members(model, {name: it for name, it in answers.items() if hasattr(type(model), name)})
        stays_on = (device, _with_index(self._offload_device))
        for module in self._guarded[len(self._refusing) :]:
            guard = module.__dict__.get(_APPLY)
            self._refusing.append(module)
            if isinstance(guard, _MoveGuard):
                guard.count += 1
            else:
                module.__dict__[_APPLY] = _MoveGuard(module, stays_on, guard)
                PlainReduction.begin(module, _APPLY)

    def detach(self) -> None:
        """Restore the answers and the moves of their classes, where that is not done yet."""
        while self._refusing:
            guard = self._refusing[-1].__dict__.get(_APPLY)
            if isinstance(guard, _MoveGuard):
                guard.count -= 1
                if not guard.count:
                    guard.give_back()
            self._refusing.pop()
        while self._answering:
            restore_class(self._answering[-1])
            self._answering.pop()


class _MoveGuard(LeftOutOfCopies):
    """Stands in for the `_apply` of one module.

    Attributes:
        count: How many techniques want it there.
    """

    __slots__ = ("_module", "_replaced", "_stays_on", "count")

    def __init__(self, module: nn.Module, stays_on: tuple[torch.device, torch.device], replaced: Any) -> None:
        self._module = module
        self._stays_on = stays_on
        self._replaced = replaced
        self.count = 1

    def give_back(self) -> None:
        """Make the module's `_apply` be what it was."""
        if self._replaced is None:
            del self._module.__dict__[_APPLY]
        else:
            self._module.__dict__[_APPLY] = self._replaced
        PlainReduction.end(self._module, _APPLY)

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Apply a function to the module's tensors, which stay where they are.

        Raises:
            ConflictError: It would move them to a device where they have no place.
        """
        probes = [
            torch.zeros(_PROBE_SHAPE, dtype=dtype, device=device)
            for dtype, device in zip(_PROBE_DTYPES, self._stays_on, strict=True)
        ]
        results = [fn(probe) for probe in probes]
        both = list(zip(results, probes, strict=True))
        apply: Any = self._replaced or partial(type(self._module)._apply, self._module)
        if all(result.device == probe.device for result, probe in both):
            return apply(fn, recurse)  # type: ignore[no-any-return]
        if results[0].device not in self._stays_on:
            raise _refusal(self._module, results[0].device, self._stays_on[0])
        if all(result.dtype == it.dtype and result.stride() == it.stride() for result, it in both):
            return self._module
        return apply(lambda it: fn(it).to(it.device), recurse)  # type: ignore[no-any-return]


def _with_index(device: torch.device) -> torch.device:
    """The device as a tensor on it tells it: "cuda" is its current one, "cuda:0"."""
    if device.index is not None or device.type == "cpu":
        return device
    return torch.empty(0, device=device).device


def _refusing_other_devices(answered: torch.device) -> Callable[..., nn.Module]:
    def to(self: nn.Module, own: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        device, _, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and _with_index(device) != answered:
            raise _refusal(self, device, answered)
        return own(self, *args, **kwargs)

    return to


def _refusal(module: nn.Module, device: torch.device, answered: torch.device) -> ConflictError:
    return ConflictError(
        f"cannot move {type(module).__name__} to {str(device)!r}: it is offloaded, and runs on "
        f"{str(answered)!r}, where its weights come by themselves. Nothing was moved. Call "
        "hookcore.remove() on the model or the pipeline first, or leave the move out"
    )


def _look(model: nn.Module, own: Callable[[nn.Module], Any]) -> Any:
    with only_looking():
        return own(model)
