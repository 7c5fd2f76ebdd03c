"""Models that tell their dtype go on telling the one they compute in.

`model.dtype` of diffusers and transformers is a property that reads the dtype of the first parameter.
Pipelines cast their inputs to it, and must not cast them to what weights only lie in between calls.
diffusers makes the same exception for its own casting hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookcore.hook import Hook
from hookcore.memory.own_class import give_class_back, give_own_class, models_with

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn


def models_with_dtype(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Those modules whose class has a `dtype` property, by FQN."""
    return models_with("dtype", modules)


class ModelDtypeHook(Hook):
    """Answers `model.dtype` while it is attached.

    Args:
        dtype: The answer.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def attach(self, module: nn.Module) -> None:
        """Has the module answer."""
        give_own_class(module, {"dtype": lambda *_: self._dtype})

    def detach(self, module: nn.Module) -> None:
        """Has it answer as its class does."""
        give_class_back(module)
