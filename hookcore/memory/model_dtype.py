"""Models that tell their dtype go on telling the one they compute in.

`model.dtype` of diffusers and transformers is a property that reads the dtype of the first parameter.
Pipelines cast their inputs to it, and must not cast them to what weights only lie in between calls.
diffusers makes the same exception for its own casting hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hookcore.errors import ConflictError
from hookcore.hook import Hook
from hookcore.memory.instance_override import call_own_to, models_with, override_members, restore_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn


def models_with_dtype(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Those modules whose class has a `dtype` property, by FQN."""
    return models_with("dtype", modules)


class ModelDtypeHook(Hook):
    """Answers `model.dtype` while it is attached, and keeps the model from being converted.

    `model.to(dtype)` has nothing to do if that is the dtype answered, and is refused if it is another one: it
    would convert what weights lie in, while calls went on to compute in the old one.

    Args:
        dtype: The answer.
        remedy: How to have calls compute in another dtype, to end a refusal with.
    """

    def __init__(self, dtype: torch.dtype, remedy: str) -> None:
        self._dtype = dtype
        self._remedy = remedy

    def attach(self, module: nn.Module) -> None:
        """Override the module's answers."""
        override_members(module, {"dtype": lambda *_: self._dtype, "to": self._to})

    def detach(self, module: nn.Module) -> None:
        """Restore the answers of its class."""
        restore_class(module)

    def _to(self, model: nn.Module, own: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, self._dtype):
            raise ConflictError(
                f"cannot convert {type(model).__name__} to {dtype}: its weights lie in another dtype between "
                f"calls than calls compute in, which is {self._dtype}. Nothing was converted. "
                f"{self._remedy}"
            )
        return call_own_to(model, own, non_blocking=non_blocking, device=device, memory_format=memory_format)
