"""The technique and its hook: weights in a small dtype, computed with in the model's own."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import field, frozen
from torch import nn

from hookcore import (
    Binding,
    Claim,
    Hook,
    HookcoreWarning,
    Phase,
    PlanError,
    Resource,
    Skipped,
    Technique,
    parse_dtype,
)
from hookcore.memory import ModelDtypeHook, models_with_dtype, wanted_dtype
from hookcore_plugins.layerwise_casting.cast_weight import CastWeight
from hookcore_plugins.layerwise_casting.discovery import find_units

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hookcore import Component, TensorSlot

DEFAULT_SKIP_MODULES_PATTERN = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
"""What diffusers leaves alone too."""


_OTHER_DTYPE = "Call hookcore.remove() first, and apply with compute_dtype= set to the other dtype"


def _optional_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    return None if dtype is None else parse_dtype(dtype)


def _patterns(patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _classes(classes: Any) -> tuple[type[nn.Module] | str, ...]:
    if classes is None:
        return ()
    return (classes,) if isinstance(classes, type | str) else tuple(classes)


@frozen
class LayerwiseCasting(Technique):
    """Keeps weights in a small dtype, and casts those of one layer at a time for the layer's call.

    Weights of convolutions, linear layers, embeddings and torch's attention are rounded to `storage_dtype`;
    norms and all else stay as they are. What is stored is never cast back from a copy, so many calls
    lose no more than one.

    The technique loses bits: `remove()` gives back the rounded weights, and only with `allow_lossy=True`,
    unless `keep_originals` is set or the weights still lie in a checkpoint.

    A weight that another module's call reads, as in `F.linear(x, self.child.weight)` or
    `x.to(self.child.weight.dtype)`, is cast for that read. Outside of calls it is in `storage_dtype`.

    The idea and the defaults are those of `diffusers.hooks.apply_layerwise_casting`.

    Attributes:
        storage_dtype: What weights lie in between calls: a dtype or its name.
        compute_dtype: What they are cast to for a call; None means each weight's dtype before, and for one
            that lies in `storage_dtype` from the start the dtype of most others.
        skip_modules_pattern: Regular expressions, searched in module FQNs; modules that match are left
            alone with all below them. None means diffusers' defaults and the adapter layers of PEFT. What
            the model itself declares to keep its dtype is always left alone.
        skip_modules_classes: Classes, or names of classes, whose modules are left alone with all below.
        non_blocking: Whether casts may be asynchronous with respect to the host.
        keep_originals: Whether to keep the weights as they were, in host memory, so that removing loses
            nothing. They take as much host memory as before.

    Raises:
        ValueError: A dtype is unknown, or cannot hold weights, or both are the same; a pattern is no
            regular expression.
        TypeError: A dtype, pattern or class is of the wrong type.
    """

    name: ClassVar[str] = "layerwise_casting"
    phase: ClassVar[Phase] = Phase.CAST
    replans: ClassVar[bool] = True

    storage_dtype: torch.dtype = field(default=torch.float8_e4m3fn, converter=parse_dtype)
    compute_dtype: torch.dtype | None = field(default=None, converter=_optional_dtype)
    skip_modules_pattern: tuple[str, ...] | None = field(default=None, converter=_patterns, kw_only=True)
    skip_modules_classes: tuple[type[nn.Module] | str, ...] = field(
        default=None, converter=_classes, kw_only=True
    )
    non_blocking: bool = field(default=False, kw_only=True)
    keep_originals: bool = field(default=False, kw_only=True)

    @storage_dtype.validator
    def _check_storage_dtype(self, _attribute: object, dtype: torch.dtype) -> None:
        _check_holds_weights("storage_dtype", dtype)

    @compute_dtype.validator
    def _check_compute_dtype(self, _attribute: object, dtype: torch.dtype | None) -> None:
        if dtype is None:
            return
        _check_holds_weights("compute_dtype", dtype)
        if dtype is self.storage_dtype:
            raise ValueError(f"storage_dtype and compute_dtype are both {dtype}: nothing would be cast")

    @skip_modules_pattern.validator
    def _check_patterns(self, _attribute: object, patterns: tuple[str, ...] | None) -> None:
        for pattern in patterns or ():
            if not isinstance(pattern, str):
                raise TypeError(f"skip_modules_pattern takes regular expressions as text, not {pattern!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"skip_modules_pattern {pattern!r} is no regular expression: {error}"
                ) from error

    @skip_modules_classes.validator
    def _check_classes(self, _attribute: object, classes: tuple[object, ...]) -> None:
        for item in classes:
            if not isinstance(item, str) and not (isinstance(item, type) and issubclass(item, nn.Module)):
                raise TypeError(f"skip_modules_classes takes module classes or their names, not {item!r}")

    def skip_unless_named(self, component: Component) -> str | None:
        """Leave alone all but the denoisers of a pipeline, as far as these are known.

        Text encoders and autoencoders run once and are easily hurt by rounding.
        """
        denoisers = component.target.denoisers
        if not denoisers or component.name in denoisers:
            return None
        return f"casting is for {' and '.join(map(repr, denoisers))} unless others are named"

    def bind(self, component: Component) -> Iterator[Binding | Skipped]:
        """List one hook for each unit, after one for each model in the tree that tells its dtype.

        Raises:
            PlanError: There is nothing to cast, or no module is of a class named in
                `skip_modules_classes`.
        """
        self._check_class_names(component)
        usual = self._usual_dtype(component)
        found = find_units(
            component,
            keeps=_Keeps(self, component),
            refuses=partial(self._refusal, usual),
            keeps_adapter=self._keeps_adapter,
        )
        if not found.units:
            raise PlanError(_nothing_to_cast(component, found.skipped))
        yield from found.skipped
        owners = {owner for unit in found.units for slot in unit.slots for owner, _ in slot.owners}
        for fqn, model in models_with_dtype(component.modules):
            if not owners.isdisjoint(model.modules()):
                yield Binding(fqn, ModelDtypeHook(self._computed_in(model.dtype, usual), _OTHER_DTYPE))
        cast: dict[TensorSlot, CastWeight] = {}
        for unit in found.units:
            new = [slot for slot in unit.slots if slot not in cast]
            cast.update((slot, self._cast_weight(slot, component, usual)) for slot in new)
            hook = CastHook([cast[slot] for slot in unit.slots], [cast[slot] for slot in new])
            # A weight with several users is claimed by the first of them.
            claims = tuple(Claim(Resource.STORAGE_DTYPE, slot.name, dtype=self.storage_dtype) for slot in new)
            yield Binding(unit.fqn, hook, claims=claims)
            for entry in unit.editing:
                yield Binding(unit.fqn, EditHook(cast[slot] for slot in unit.slots), entry)

    def _cast_weight(self, slot: TensorSlot, component: Component, usual: torch.dtype | None) -> CastWeight:
        return CastWeight(
            slot.tensors,
            owners=slot.owners,
            entries=component.conventions.entries,
            storage_dtype=self.storage_dtype,
            compute_dtype=self._computed_in(wanted_dtype(slot.tensors[0]), usual),
            non_blocking=self.non_blocking,
            keep_originals=self.keep_originals,
        )

    def _usual_dtype(self, component: Component) -> torch.dtype | None:
        """Return what most of the component's parameters are in that are not in the storage dtype already."""
        elements: Counter[torch.dtype] = Counter()
        for parameter in component.module.parameters():
            dtype = wanted_dtype(parameter)
            if dtype.is_floating_point and dtype is not self.storage_dtype:
                elements[dtype] += parameter.numel()
        return max(elements, key=elements.__getitem__, default=None)

    def _computed_in(self, dtype: torch.dtype, usual: torch.dtype | None) -> torch.dtype:
        """Return what to compute in with a weight of a dtype."""
        return self.compute_dtype or (usual if dtype is self.storage_dtype and usual else dtype)

    def _keeps_adapter(self, layer: nn.Module) -> bool:
        """Return whether a layer of an adapter keeps its dtype."""
        if self.skip_modules_pattern is not None:
            return False
        rounded = any(parameter.dtype is self.storage_dtype for parameter in layer.parameters(recurse=False))
        if rounded:
            warnings.warn(
                f"PEFT gave an adapter the dtype of the cast weights, {self.storage_dtype}, and rounded it. "
                f"Load adapters before {self.name} is applied",
                HookcoreWarning,
                stacklevel=2,
            )
        return not rounded

    def _refusal(self, usual: torch.dtype | None, dtype: torch.dtype) -> str | None:
        """Return why weights of a dtype are not cast, or None."""
        if not dtype.is_floating_point:
            return f"is in {dtype}, not in floating point"
        if dtype is self.storage_dtype:
            known = self._computed_in(dtype, usual) is not dtype
            return None if known else f"is in {dtype} already; set compute_dtype to have it cast for calls"
        if dtype.itemsize <= self.storage_dtype.itemsize:
            return f"is in {dtype}, which takes no more memory than {self.storage_dtype}"
        return None

    def _check_class_names(self, component: Component) -> None:
        present = {kind.__name__ for module in component.modules.values() for kind in type(module).__mro__}
        for item in self.skip_modules_classes:
            if isinstance(item, str) and item not in present:
                near = difflib.get_close_matches(item, present)
                raise PlanError(
                    f"skip_modules_classes of {self.name} names {item!r}, but {component.label('')!r} has no "
                    "module of such a class. "
                    + (f"Did you mean {', '.join(map(repr, near))}?" if near else "Leave it out")
                )


class _Keeps:
    """Which modules an application of the technique leaves alone."""

    def __init__(self, technique: LayerwiseCasting, component: Component) -> None:
        patterns = technique.skip_modules_pattern
        self._asked = DEFAULT_SKIP_MODULES_PATTERN if patterns is None else patterns
        self._declared = component.conventions.keep_dtype_patterns
        self._classes = tuple(item for item in technique.skip_modules_classes if isinstance(item, type))
        self._class_names = {item for item in technique.skip_modules_classes if isinstance(item, str)}

    def __call__(self, fqn: str, module: nn.Module) -> str | None:
        for pattern in self._declared:
            if re.search(pattern, fqn):
                return f"the model declares that {pattern!r} keeps its dtype"
        for pattern in self._asked:
            if re.search(pattern, fqn):
                return f"its name matches {pattern!r} of skip_modules_pattern"
        for kind in type(module).__mro__:
            if kind in self._classes or kind.__name__ in self._class_names:
                return f"it is a {kind.__name__}, of skip_modules_classes"
        return None


class _ComputingHook(Hook):
    """Puts weights into the compute dtype for a call."""

    swaps_weights: ClassVar[bool] = True

    def __init__(self, weights: Iterable[CastWeight]) -> None:
        self._weights = tuple(weights)

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Cast up."""
        cast = 0
        try:
            for weight in self._weights:
                _, cast = weight.use(), cast + 1  # type: ignore[func-returns-value]
        except BaseException:  # out of memory, most likely
            for weight in self._weights[:cast]:
                weight.release()
            raise

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """Drop the copies."""
        self._release()

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """Drop the copies."""
        self._release()

    def _release(self) -> None:
        """End the use of all weights, also if an interrupt comes."""
        released = 0
        releasing: tuple[CastWeight, int] | None = None
        try:
            for weight in self._weights:
                releasing = weight, weight.uses
                _, released = weight.release(), released + 1  # type: ignore[func-returns-value]
        except BaseException:
            for weight in self._weights[released:]:
                if releasing is None or weight is not releasing[0] or weight.uses == releasing[1]:
                    weight.release()
            raise


class EditHook(_ComputingHook):
    """Stands at a method that changes weights: it sees what calls compute with, and its edits are stored."""

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """Store the edits, rounded."""
        try:
            for weight in self._weights:
                weight.store_edits()
        finally:
            super().post_forward(module, output)

    def outside(self, module: nn.Module) -> Hook:
        """Return a hook that does nothing: a call that runs the module as one with it edits nothing."""
        return Hook()


class CastHook(_ComputingHook):
    """Casts the weights of one unit for its call.

    Args:
        weights: All weights that the unit uses.
        reported: Those of them whose bytes no other hook reports.
    """

    only_brings_weights: ClassVar[bool] = True

    def __init__(self, weights: Iterable[CastWeight], reported: Iterable[CastWeight]) -> None:
        super().__init__(weights)
        self._reported = tuple(reported)

    def attach(self, module: nn.Module) -> None:
        """Round the weights to the storage dtype, all or none."""
        before = [[tensor.data for tensor in weight.tensors] for weight in self._weights]
        stored = [weight.to_store() for weight in self._weights]
        held = 0
        try:
            for weight, data in zip(self._weights, stored, strict=True):
                _, held = weight.hold(data), held + 1  # type: ignore[func-returns-value]
        except BaseException:
            for weight, data in zip(self._weights[:held], before, strict=False):
                weight.let_go(data)
            raise

    def detach(self, module: nn.Module) -> None:
        """Give the weights their own dtype back, all or none."""
        for weight in self._weights:
            weight.rest()
        before = [[tensor.data for tensor in weight.tensors] for weight in self._weights]
        restored = [weight.to_restore() for weight in self._weights]
        left = 0
        try:
            for weight, data in zip(self._weights, restored, strict=True):
                _, left = weight.let_go(data), left + 1  # type: ignore[func-returns-value]
        except BaseException:
            for weight, data in zip(self._weights[:left], before, strict=False):
                weight.hold(data)
            raise

    def after_removal(self, module: nn.Module) -> None:
        """Drop the originals, which an interrupted `detach` would have needed."""
        for weight in self._weights:
            weight.forget()

    def loss_on_detach(self, module: nn.Module) -> str | None:
        """State so if the weights were rounded and the originals are gone."""
        for weight in self._weights:
            if weight.loses:
                dtype = str(weight.storage_dtype).removeprefix("torch.")
                return f"the weights were rounded to {dtype}; keep_originals=True keeps them"
        return None

    def report(self, module: nn.Module) -> dict[str, int]:
        """Bytes at rest, by dtype."""
        report: dict[str, int] = {}
        for weight in self._reported:
            dtype, nbytes = weight.stored_bytes()
            label = f"stored as {str(dtype).removeprefix('torch.')}"
            report[label] = report.get(label, 0) + nbytes
        return report


def _check_holds_weights(option: str, dtype: torch.dtype) -> None:
    """Refuse dtypes that torch cannot convert plain numbers to and back."""
    numbers = torch.tensor([-1.0, 0.0, 1.0])
    try:
        fits = dtype.is_floating_point and torch.equal(numbers.to(dtype).to(numbers.dtype), numbers)
    except RuntimeError:  # packed dtypes have no conversion
        fits = False
    if not fits:
        raise ValueError(f"{option} cannot be {dtype}: torch cannot convert weights to it and back")


def _nothing_to_cast(component: Component, skipped: tuple[Skipped, ...]) -> str:
    reasons = "; ".join(f"{component.label(item.fqn)!r}: {item.reason}" for item in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return (
        f"layerwise_casting finds no weight to cast in {component.label('')!r}: it casts those of "
        "convolutions, linear layers, embeddings and torch's attention. "
        + (f"It skips {reasons}{more}" if skipped else "There is none; leave this component out")
    )
