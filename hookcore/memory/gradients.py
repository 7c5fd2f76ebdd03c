"""Gradients lie where their parameters lie, so that an optimizer can step between two calls.

A backward pass computes the gradients of parameters that were on the accelerator for a call and are back in
host memory by then. torch keeps such a gradient on the accelerator, where no optimizer can use it. Before a
gradient is accumulated its sum so far moves to it; afterwards the sum moves to the parameter.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from hookcore.memory.tensor_memory import current_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from hookcore.target import TensorSlot


class Gradients:
    """Moves the gradients of parameters after each backward pass.

    An optimizer makes its state where it finds a parameter at its first step. From then on a parameter that
    is trained has to lie on one device between calls.

    Args:
        slots: The parameters, and buffers, which have no gradients.
        trained: A method that is called for each gradient before it moves, so that the parameter can be put
            where it stays. Its object is not kept alive: a model that goes away has to free memory at once.
    """

    def __init__(self, slots: Iterable[TensorSlot], trained: Callable[[], object]) -> None:
        self._slots = tuple(slots)
        self._trained = weakref.WeakMethod(trained)
        self._handles: dict[int, tuple[weakref.ref[torch.Tensor], Any, Any]] = {}

    def watch(self) -> None:
        """Begin to move the gradients of all parameters that require one by now."""
        handles = self._handles
        accumulated = partial(_accumulated, self._trained)
        for slot in self._slots:
            for tensor in slot.tensors:
                if tensor.requires_grad and tensor.is_leaf and id(tensor) not in handles:
                    reference = weakref.ref(tensor)
                    before = tensor.register_hook(_joining(reference))  # type: ignore[no-untyped-call]
                    after = tensor.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
                    handles[id(tensor)] = reference, before, after

    def stop(self) -> None:
        """End this, with all gradients where the parameters are."""
        while self._handles:
            _, (reference, before, after) = self._handles.popitem()
            before.remove()
            after.remove()
            tensor: Any = reference()
            if tensor is not None:
                if not tensor._backward_hooks:
                    tensor._backward_hooks = None
                if not tensor._post_accumulate_grad_hooks:
                    tensor._post_accumulate_grad_hooks = None
        for slot in self._slots:
            for tensor in current_tensors(slot):
                move_gradient(tensor)


def move_gradient(tensor: torch.Tensor) -> None:
    """Move a parameter's gradient, if it has one, to where the parameter is."""
    if tensor.is_leaf and tensor.grad is not None:
        _move(tensor.grad, tensor.device)


def _accumulated(trained: weakref.WeakMethod[Callable[[], object]], tensor: torch.Tensor) -> None:
    method = trained()
    if method is not None:
        method()
    move_gradient(tensor)


def _joining(reference: weakref.ref[torch.Tensor]) -> Callable[[torch.Tensor], None]:
    def before_accumulation(gradient: torch.Tensor) -> None:
        tensor = reference()
        if tensor is not None and tensor.grad is not None:
            _move(tensor.grad, gradient.device)

    return before_accumulation


def _move(gradient: torch.Tensor, device: torch.device) -> None:
    if gradient.device != device:
        gradient.data = gradient.data.to(device)
