"""Models that tell their dtype go on telling the one they compute in.

`model.dtype` of diffusers and transformers is a property that reads the dtype of the first parameter.
Pipelines cast their inputs to it, and must not cast them to what weights only lie in between calls.
diffusers makes the same exception for its own casting hooks.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

from hookcore.hook import Hook

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn


def models_with_dtype(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Those modules whose class has a `dtype` property, by FQN."""
    for fqn, module in modules.items():
        if isinstance(inspect.getattr_static(type(module), "dtype", None), property):
            yield fqn, module


class ModelDtypeHook(Hook):
    """Answers `model.dtype` while it is attached.

    A property can be answered for one instance only by its class, so the instance gets a subclass of its
    class for that time, under the same name.

    Args:
        dtype: The answer.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def attach(self, module: nn.Module) -> None:
        """Gives the module the subclass."""
        object.__setattr__(module, "__class__", _answering(module, self._dtype))

    def detach(self, module: nn.Module) -> None:
        """Gives it its own class back."""
        object.__setattr__(module, "__class__", type(module).__bases__[0])


def _answering(model: nn.Module, dtype: torch.dtype) -> type[nn.Module]:
    own_class: Any = type(model)
    reference = weakref.ref(model)

    def answer(self: nn.Module) -> Any:
        # Other instances come from `type(model)(...)` or `model.from_config(...)`.
        return dtype if self is reference() else own_class.dtype.fget(self)

    def reduce(self: nn.Module, protocol: int) -> Any:
        # A copy or a pickle of the model is of its own class. From protocol 2 on, pickle insists that what
        # it makes is of the present one.
        reduced = own_class.__reduce_ex__(self, min(protocol, 1))
        if not isinstance(reduced, tuple):
            return reduced
        make, arguments, *rest = reduced
        return make, tuple(own_class if item is answering else item for item in arguments), *rest

    answering: type[nn.Module] = type(
        own_class.__name__,
        (own_class,),
        {
            "__module__": own_class.__module__,
            "__qualname__": own_class.__qualname__,
            "__doc__": own_class.__doc__,
            "__reduce_ex__": reduce,
            "dtype": property(answer),
        },
    )
    return answering
