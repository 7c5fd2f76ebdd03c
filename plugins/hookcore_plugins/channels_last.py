"""Channels last: weights and inputs of convolutions laid out so that the channels of a pixel lie together.

torch recommends it for convolutions on CPUs and on GPUs with tensor cores: weights and the model's input are
converted once, and what is between keeps the layout
(https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import define, frozen
from torch import nn

from hookcore import Binding, Claim, Hook, Phase, Resource, Skipped, Technique, hookimpl
from hookcore.memory import entries_of, find_mapping, origin_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hookcore import Component, TensorSlot

_FORMATS: Mapping[int, torch.memory_format] = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Dimensions of a tensor to the format in which its second one lies innermost."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@frozen
class ChannelsLast(Technique):
    """Lays the weights of 2D and 3D convolutions, and the inputs of the model, out with channels last.

    Values stay the same; outputs are those of `model.to(memory_format=torch.channels_last)`, which differ
    from the bare model's by rounding, as other kernels run. `remove()` gives each weight its strides back.

    Offloading and casting keep the layout. Weights that are read from a checkpoint for each call are left as
    they lie there.
    """

    name: ClassVar[str] = "channels_last"
    phase: ClassVar[Phase] = Phase.COMPUTE
    replans: ClassVar[bool] = True

    def bind(self, component: Component) -> Iterator[Binding | Skipped]:
        """List a hook for each of the component's entries; the first sees to all weights."""
        found: dict[TensorSlot, None] = {}
        for fqn, module in component.modules.items():
            if isinstance(module, _CONVOLUTIONS) and module._parameters.get("weight") is not None:
                slot = component.slot_of[f"{fqn}.weight" if fqn else "weight"]
                reason = _refusal(slot)
                if reason is None:
                    found[slot] = None
                else:
                    yield Skipped(fqn, f"its weight {reason}")
        if not found:
            yield Skipped("", "it has no weights of 2D or 3D convolutions to lay out")
            return
        dimensions = frozenset(slot.tensors[0].dim() for slot in found)
        weights = [_Weight(slot.tensors) for slot in found]
        claims = tuple(Claim(Resource.MEMORY_FORMAT, slot.name) for slot in found)
        for number, entry in enumerate(entries_of(component)):
            if number == 0:
                yield Binding("", _WeightsHook(dimensions, weights), entry, claims)
            else:
                yield Binding("", _InputsHook(dimensions), entry)


def _refusal(slot: TensorSlot) -> str | None:
    """Return why a weight is left as it lies, or None."""
    first = slot.tensors[0]
    for tensor in slot.tensors:
        if tensor.layout is not torch.strided or type(tensor.data) is not torch.Tensor:
            return f"is a {type(tensor.data).__name__} of layout {tensor.layout}, not a plain tensor"
        origin = origin_of(tensor)
        if origin is not None and origin.strides is None:
            return "is read from a checkpoint for each call, as it lies there"
        if (tensor.shape, tensor.stride(), tensor.storage_offset()) != (
            first.shape,
            first.stride(),
            first.storage_offset(),
        ):
            return f"shares memory with {slot.fqns[-1]!r}, which lies in it differently"
    return None


@define(eq=False)
class _Weight:
    """A convolution's weight: parameters that hold the same memory, or one alone.

    Attributes:
        tensors: The parameters.
        strides: How they lay; from `lay_out` on.
        given: How they lie now.
        left: What they held, where that is part of memory that others may look at, too.
    """

    tensors: tuple[torch.Tensor, ...]
    strides: tuple[int, ...] = ()
    given: tuple[int, ...] = ()
    left: torch.Tensor | None = None

    def converted(self) -> torch.Tensor:
        """The values, with channels last; the same tensor if they lie so already."""
        data = self.tensors[0].data
        with torch.inference_mode(data.is_inference()):  # `.data =` keeps what a parameter is
            return data.to(memory_format=_FORMATS[data.dim()])

    def lay_out(self, data: torch.Tensor) -> None:
        """Rebind the parameters to what `converted` gave."""
        before = self.tensors[0].data
        self.strides, self.given = before.stride(), data.stride()
        if before.untyped_storage().nbytes() > before.nbytes:
            self.left = before
        self._show(data)

    def restored(self) -> list[torch.Tensor]:
        """The values that each parameter has now, as they lay before."""
        restored: list[torch.Tensor] = []
        for tensor in self.tensors:
            data = tensor.data
            if data.stride() != self.given or data.shape != self.tensors[0].shape:
                restored.append(data)  # somebody gave it other data, and that lies as they wanted
            elif restored and data.data_ptr() == self.tensors[0].data_ptr():
                restored.append(restored[0])
            else:
                restored.append(self._as_it_lay(data))
        return restored

    def give_back(self, restored: Sequence[torch.Tensor]) -> None:
        """Rebind the parameters to what `restored` gave."""
        for tensor, data in zip(self.tensors, restored, strict=True):
            tensor.data = data
        self.left = None

    def _as_it_lay(self, data: torch.Tensor) -> torch.Tensor:
        left = self.left
        with torch.inference_mode(data.is_inference()):
            if left is not None and (left.device, left.dtype) == (data.device, data.dtype):
                if _same_bits(left, data):
                    return left
                if find_mapping(left) is None:  # what is mapped from a checkpoint is not written
                    return left.copy_(data)
            if data.stride() == self.strides:
                return data
            memory = torch.empty_strided(data.shape, self.strides, dtype=data.dtype, device=data.device)
            return memory.copy_(data)

    def _show(self, data: torch.Tensor) -> None:
        for tensor in self.tensors:
            tensor.data = data


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether all values are the same, NaNs and the signs of zeros included."""
    bits = _BITS[first.itemsize]
    return torch.equal(first.view(bits), second.view(bits))


class _InputsHook(Hook):
    """Gives a call inputs with channels last.

    Args:
        dimensions: Of which dimensions there are convolutions.
    """

    def __init__(self, dimensions: frozenset[int]) -> None:
        self._dimensions = dimensions

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Convert tensors among the arguments; what is nested in others stays as it is."""
        converted = tuple(map(self._converted, args))
        return converted, {name: self._converted(value) for name, value in kwargs.items()}

    def _converted(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() in self._dimensions and value.is_floating_point():
            return value.contiguous(memory_format=_FORMATS[value.dim()])
        return value


class _WeightsHook(_InputsHook):
    """The one hook, at the component's first entry, that lays out all weights."""

    def __init__(self, dimensions: frozenset[int], weights: Sequence[_Weight]) -> None:
        super().__init__(dimensions)
        self._weights = weights

    def attach(self, module: nn.Module) -> None:
        """Convert the weights, all or none."""
        converted = [weight.converted() for weight in self._weights]
        for weight, data in zip(self._weights, converted, strict=True):
            weight.lay_out(data)

    def detach(self, module: nn.Module) -> None:
        """Give the weights their strides back, all or none."""
        restored = [weight.restored() for weight in self._weights]
        for weight, data in zip(self._weights, restored, strict=True):
            weight.give_back(data)

    def report(self, module: nn.Module) -> dict[str, int]:
        """Bytes that lie with channels last."""
        return {"with channels last": sum(weight.tensors[0].nbytes for weight in self._weights)}


@hookimpl
def hookcore_register_techniques() -> list[type[Technique]]:
    """Bring `ChannelsLast`."""
    return [ChannelsLast]
