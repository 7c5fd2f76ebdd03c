"""Which modules are cast as one unit, and which of their weights."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from attrs import field, frozen
from torch import nn

from hookcore import Skipped
from hookcore.memory import wanted_dtype
from hookcore_plugins.layerwise_casting.cast_weight import is_cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hookcore import Component, TensorSlot

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
    nn.MultiheadAttention,
)
"""Layers whose weights are cast: those of `diffusers.hooks`, and torch's attention, which has weights too.
Norms are not among them: they are small and precision matters there."""

_MERGING = ("merge", "unmerge")
"""Methods of PEFT's adapted layers, through which adapters are fused."""

_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)

_READ_WEIGHTS_BELOW = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules that read the weights of layers below them without calling these."""


@frozen(eq=False)
class Unit:
    """A module during whose call its weights are in the compute dtype.

    Attributes:
        fqn: The module's FQN.
        slots: The weights that it uses, its own and those of the modules below it.
        editing: Its methods that change them, besides calls.
    """

    fqn: str
    slots: tuple[TensorSlot, ...]
    editing: tuple[str, ...] = ()


@frozen
class Units:
    """What there is to cast in a component.

    Attributes:
        units: The units, in order of registration.
        skipped: What stays as it is, and why.
    """

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]


def find_units(
    component: Component,
    *,
    keeps: Callable[[str, nn.Module], str | None],
    refuses: Callable[[torch.dtype], str | None],
    keeps_adapter: Callable[[nn.Module], bool],
) -> Units:
    """Find all units of a component.

    Args:
        component: The component.
        keeps: Why a module and all below it has to be left alone, or None; called with its FQN and it.
        refuses: Why weights of a dtype are not to be cast, or None.
        keeps_adapter: Whether a layer of a PEFT adapter has to be left alone.
    """
    walk = _Walk(keeps, keeps_adapter)
    walk.visit(component.module, "")
    for module in walk.kept:
        walk.units_of.pop(module, None)
    slots_of: dict[nn.Module, list[TensorSlot]] = {}
    quantized = _quantized(component.slots)
    for slot in component.slots:
        inside = [(owner, name) for owner, name in slot.owners if owner in walk.units_of]
        if not inside:
            continue
        reason = _tie_outside(slot, walk, component) or _refusal(slot, refuses)
        if reason is None and quantized:
            reason = next((quantized[owner] for owner, _ in inside if owner in quantized), None)
        if reason is None:
            for unit in dict.fromkeys(unit for owner, _ in inside for unit in walk.units_of[owner]):
                slots_of.setdefault(unit, []).append(slot)
        else:
            owner, name = inside[0]
            walk.skipped.append(Skipped(component.fqns[owner][0], f"its {name} {reason}"))
    return Units(
        tuple(
            Unit(fqn, tuple(slots_of[module]), _MERGING if _is_adapted(module) else ())
            for fqn, module in component.modules.items()
            if module in slots_of
        ),
        tuple(walk.skipped),
    )


@frozen
class _Walk:
    """One pass over the module tree.

    Attributes:
        keeps: See `find_units`.
        keeps_adapter: See `find_units`.
        units_of: Module that owns weights to cast, to the units that use these.
        kept: Modules left alone; one that stands at another place too is left alone there as well.
        skipped: The topmost of these that would have had something to cast.
    """

    keeps: Callable[[str, nn.Module], str | None]
    keeps_adapter: Callable[[nn.Module], bool]
    units_of: dict[nn.Module, list[nn.Module]] = field(factory=dict)
    kept: set[nn.Module] = field(factory=set)
    skipped: list[Skipped] = field(factory=list)

    def visit(
        self,
        module: nn.Module,
        fqn: str,
        unit: nn.Module | None = None,
        *,
        cast: bool = False,
        adapter: bool = False,
    ) -> None:
        """Go through a module and all below it.

        Args:
            module: The module.
            fqn: Its FQN.
            unit: The unit that it is below.
            cast: Whether it is below one of `LAYERS`.
            adapter: Whether it belongs to a PEFT adapter.
        """
        reason = self.keeps(fqn, module)
        if reason is not None:
            self.kept.update(module.modules())
            if any(isinstance(below, LAYERS) for below in module.modules()):
                self.skipped.append(Skipped(fqn, reason))
            return
        adapters: tuple[str, ...] = ()
        if _is_adapted(module):
            # It reads the dtypes of the weights below it, and some kinds (DoRA) the weights, without a call.
            unit = unit or module
            adapters = tuple(module.adapter_layer_names)  # type: ignore[arg-type]
        elif isinstance(module, _READ_WEIGHTS_BELOW):
            unit = unit or module
        elif isinstance(module, LAYERS):
            unit = unit or module
            cast = True
        if cast and unit is not None and not (adapter and self.keeps_adapter(module)):
            self.units_of.setdefault(module, []).append(unit)
        for name, child in module.named_children():
            self.visit(
                child,
                f"{fqn}.{name}" if fqn else name,
                unit,
                cast=cast,
                adapter=adapter or name in adapters,
            )


def _is_adapted(module: nn.Module) -> bool:
    """Return whether PEFT has put adapters on a layer."""
    tuners_utils = sys.modules.get("peft.tuners.tuners_utils")
    return tuners_utils is not None and isinstance(module, tuners_utils.BaseTunerLayer)


def _tie_outside(slot: TensorSlot, walk: _Walk, component: Component) -> str | None:
    """Return why a weight cannot be cast that is also used outside of all units, or None."""
    for owner, name in slot.owners:
        if owner not in walk.units_of:
            return (
                f"is tied to {'.'.join(filter(None, (component.fqns[owner][0], name)))!r}, which is not cast"
            )
    return None


def _quantized(slots: Iterable[TensorSlot]) -> dict[nn.Module, str]:
    """Modules that hold a weight which is no plain floating-point one, and why their others stay as they are.

    Biases and scales of a quantized layer belong to its own arithmetic. A buffer counts if it can be a
    weight: if it is a tensor of another kind, or a matrix of integers.
    """
    found = {}
    for slot in slots:
        for tensor in slot.tensors:
            plain = type(tensor) in _PLAIN and type(tensor.data) is torch.Tensor
            if plain and (tensor.dtype.is_floating_point or (slot.is_buffer and tensor.dim() < 2)):
                continue
            for owner, name in slot.owners:
                what = (
                    tensor.dtype
                    if plain
                    else type(tensor.data if type(tensor) in _PLAIN else tensor).__name__
                )
                found[owner] = f"is beside {name}, which is quantized ({what})"
    return found


def _refusal(slot: TensorSlot, refuses: Callable[[torch.dtype], str | None]) -> str | None:
    """Return why a weight cannot be cast, or None."""
    for tensor in slot.tensors:
        if not isinstance(tensor, nn.Parameter):
            return "shares memory with a buffer"
        if type(tensor) is not nn.Parameter or type(tensor.data) is not torch.Tensor:
            return f"is a {type(tensor).__name__} of {type(tensor.data).__name__}, not a plain tensor"
        if tensor.layout is not torch.strided:
            return f"has the layout {tensor.layout}"
        if tensor.dtype is not slot.tensors[0].dtype:
            return f"shares memory with one in {tensor.dtype}"
    if is_cast(slot.tensors[0]):
        return None  # by another application, which this one must collide with and not step round
    return refuses(wanted_dtype(slot.tensors[0]))
