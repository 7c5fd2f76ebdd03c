"""Models that tell their device tell the one they compute on, wherever their weights lie.

`model.device` of diffusers and transformers is a property that reads the device of the first parameter.
Pipelines make latents, tokens and masks there, and `pipe.device` is the first that a component tells.
diffusers makes an exception for its own offloading, too. Each model answers for itself, so that it holds for
every pipeline that the model is in, or gets into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hookcore.errors import ConflictError
from hookcore.memory.own_class import call_own_to, give_class_back, give_own_class, models_with
from hookcore.memory.reads import only_looking

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from hookcore.target import Component


class ModelDevice:
    """Answers `model.device` of a component and of the models in it, and keeps them from being moved.

    `model.to(device)` has nothing to do if that is the device answered, and is refused if it is another one.
    A dtype given to it is taken. `model.dtype`, for which a parameter is looked at, counts as no read of it:
    pipelines ask for it at each step.

    Args:
        component: The component. Nothing is changed before `attach`.
        device: Where it computes.
    """

    def __init__(self, component: Component, device: torch.device) -> None:
        self._models = [model for _, model in models_with("device", component.modules)]
        self._device = device

    def attach(self) -> None:
        """Has the models answer."""
        device = _with_index(self._device)
        answers: dict[str, Callable[..., Any]] = {
            "device": lambda *_: device,
            "to": _mover(device),
            "dtype": _look,
        }
        for model in self._models:
            give_own_class(model, {name: it for name, it in answers.items() if hasattr(type(model), name)})

    def detach(self) -> None:
        """Has them answer as their classes do."""
        for model in reversed(self._models):
            give_class_back(model)


def _with_index(device: torch.device) -> torch.device:
    """The device as a tensor on it tells it: "cuda" is its current one, "cuda:0"."""
    if device.index is not None or device.type == "cpu":
        return device
    return torch.empty(0, device=device).device


def _look(model: nn.Module, own: Callable[[nn.Module], Any]) -> Any:
    with only_looking():
        return own(model)


def _mover(answered: torch.device) -> Callable[..., nn.Module]:
    def to(self: nn.Module, own: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and _with_index(device) != answered:
            raise ConflictError(
                f"cannot move {type(self).__name__} to {str(device)!r}: it is offloaded, and runs on "
                f"{str(answered)!r}, where its weights come by themselves. Nothing was moved. Call "
                "hookcore.remove() on the model or the pipeline first, or leave the move out"
            )
        return call_own_to(self, own, non_blocking=non_blocking, dtype=dtype, memory_format=memory_format)

    return to
