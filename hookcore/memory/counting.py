"""Count changes of parameters that were made in inference mode, while they are streamed.

Whoever streams weights has to know which ones a call has changed. torch counts that, but not for tensors made
in inference mode, and never will, whatever data they are given. So what is behind such a parameter is
exchanged for a while; the object that modules hold, and all that refers to it, stays the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from attrs import define

from hookcore.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable


@define(eq=False)
class Uncounted:
    """A parameter made in inference mode.

    Attributes:
        tensor: The parameter.
    """

    tensor: torch.Tensor
    _inside: torch.Tensor  # what was behind it, without memory
    _is_inference: bool

    @classmethod
    def begin(cls, tensor: torch.Tensor) -> Self:
        """Start counting changes of a parameter.

        Raises:
            UnsupportedModelError: Gradients are recorded of it.
        """
        if _has_gradients(tensor):
            raise UnsupportedModelError(
                "gradients are recorded of a parameter that was made in inference mode, so that torch cannot "
                "be made to count changes of it. Make the model outside of torch.inference_mode()"
            )
        is_inference = tensor.is_inference()
        counted = _alias(tensor.data, inference=False).requires_grad_(tensor.requires_grad)
        torch._C._swap_tensor_impl(tensor, counted)
        counted.data = _empty_like(counted, inference=is_inference)
        return cls(tensor, counted, is_inference)

    def end(self) -> None:
        """Restore the parameter, with the data that it has now; a second time does nothing."""
        if not is_counted(self.tensor) or _has_gradients(self.tensor):
            return  # of the latter, autograd knows what is behind it by now
        self._inside.data = _alias(self.tensor.data, inference=self._is_inference)
        with torch.inference_mode(self._is_inference):
            self._inside.requires_grad_(self.tensor.requires_grad)
        torch._C._swap_tensor_impl(self.tensor, self._inside)


def count_changes(tensors: Iterable[torch.Tensor]) -> list[Uncounted]:
    """Start counting changes of all of these; return those that have to `end` it.

    Raises:
        UnsupportedModelError: Gradients are recorded of one; nothing was changed.
    """
    begun: list[Uncounted] = []
    try:
        begun.extend(Uncounted.begin(tensor) for tensor in tensors if not is_counted(tensor))
    except BaseException:
        stop_counting(begun)
        raise
    return begun


def stop_counting(begun: Iterable[Uncounted]) -> None:
    """End what `count_changes` began."""
    for one in begun:
        one.end()


def is_counted(tensor: torch.Tensor) -> bool:
    """Return whether torch counts changes of a tensor: of none made in inference mode, whatever it holds."""
    try:
        _ = tensor._version
    except RuntimeError:
        return False
    return not tensor.is_inference()  # given data of such a tensor, it counts, and is called one


def _has_gradients(tensor: torch.Tensor) -> bool:
    """Return whether autograd refers to it, or it has a gradient."""
    return tensor._use_count() > 1 or tensor.grad is not None  # type: ignore[attr-defined]


def _alias(data: torch.Tensor, *, inference: bool) -> torch.Tensor:
    """A tensor on the same memory, made in inference mode or outside of it."""
    alias = _empty_like(data, inference=inference)
    with torch.inference_mode(inference):
        return alias.set_(data.untyped_storage(), data.storage_offset(), data.shape, data.stride())


def _empty_like(data: torch.Tensor, *, inference: bool) -> torch.Tensor:
    with torch.inference_mode(inference):
        return torch.empty(0, dtype=data.dtype, device=data.device)
