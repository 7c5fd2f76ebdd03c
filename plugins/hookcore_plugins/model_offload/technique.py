"""What a user asks for, the hooks that it becomes, and having components go off by hand."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from attrs import field, frozen

from hookcore import (
    Binding,
    Claim,
    Hook,
    JointTechnique,
    Phase,
    PlanError,
    Resource,
    Skipped,
    parse_bytes,
    parse_kwarg_names,
    parse_onload_device,
    status,
)
from hookcore.memory import (
    InputMover,
    ModelDevice,
    callable_parts,
    check_movable,
    entries_of,
    has_streams,
    slots_below,
)
from hookcore_plugins.model_offload.coordinator import Coordinator
from hookcore_plugins.model_offload.weights import ComponentWeights, OffloadReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from attrs import Attribute
    from torch import nn

    from hookcore import Component, TensorSlot
    from hookcore.memory import Timeline
    from hookcore_plugins.model_offload.part import Part


def _sequence(value: Iterable[str] | None) -> tuple[str, ...] | None:
    if isinstance(value, str):
        raise TypeError(f"sequence is {value!r}, expected names of components, such as ('unet', 'vae')")
    return None if value is None else tuple(value)


def _budget(value: int | str | None) -> int | None:
    return None if value is None else parse_bytes(value)


@frozen
class ModelOffload(JointTechnique):
    """Keeps components in host memory, and has one at a time on the device: the one that runs.

    A component comes when it is called, by any of its entries, and stays until the next one runs. The next
    one is copied while this one computes, where there is room for both. Nothing is copied back but what was
    changed.

    It acts on all components of one `apply` together, as diffusers' `enable_model_cpu_offload` does. If the
    target tells when a run of it ends, as diffusers' pipelines do, all go off then.

    Attributes:
        device: Where components run; inputs are moved there, and outputs stay there.
        sequence: Names of components in the order in which they run, to be believed until they have run in
            another one. None to take what the target tells of it, as diffusers' pipelines do in
            `model_cpu_offload_seq`, or to have it learned.
        memory_budget: Bytes of the device, or text such as "6GiB", that all weights together may take. The
            next component comes early if it has room for both. None: if what a call needed when it last ran
            leaves room for it.
        offload_last: Whether the last component of the sequence goes off after its own call. Others, and
            without this it too, stay until another one runs.
        exclude_kwargs: Names of keyword inputs that are not moved to the device, such as caches that calls
            fill; None for what the model's library says.
    """

    name: ClassVar[str] = "model_offload"
    phase: ClassVar[Phase] = Phase.PLACE
    replans: ClassVar[bool] = True

    device: torch.device = field(converter=parse_onload_device)
    sequence: tuple[str, ...] | None = field(default=None, converter=_sequence)
    memory_budget: int | None = field(default=None, converter=_budget, kw_only=True)
    offload_last: bool = field(default=False, kw_only=True)
    exclude_kwargs: tuple[str, ...] | None = field(default=None, converter=parse_kwarg_names, kw_only=True)

    @memory_budget.validator
    def _check_budget(self, _attribute: Attribute[int | None], value: int | None) -> None:
        if value is not None and not has_streams(self.device):
            raise ValueError(
                f"memory_budget says how much may be copied ahead, on a stream, and {str(self.device)!r} has "
                "none. Leave it out: one component at a time is there"
            )

    @offload_last.validator
    def _check_last(self, _attribute: Attribute[bool], value: bool) -> None:
        if value and not self.sequence:
            raise ValueError("offload_last=True needs a sequence, whose last component it means")

    @classmethod
    def bind_jointly(cls, places: Sequence[tuple[Self, Component]]) -> Iterable[Iterable[Binding | Skipped]]:
        """List the hooks at the components' entries, and at the calls of their parts.

        Raises:
            PlanError: A tensor has no data, or the sequence names a component that the target lacks.
            UnsupportedModelError: A tensor is of a kind that cannot be moved.
        """
        technique, component = places[0]
        target = component.target
        sequence = target.sequence if technique.sequence is None else technique.sequence
        last = sequence[-1] if technique.offload_last else None
        coordinator = Coordinator(
            technique.device, sequence, technique.memory_budget, last, target.at_run_end
        )
        return [list(it._bind(on, coordinator)) for it, on in places]

    def _bind(self, component: Component, coordinator: Coordinator) -> Iterator[Binding | Skipped]:
        for name in self.sequence or ():
            if name not in component.target.names:
                near = difflib.get_close_matches(name, component.target.names)
                known = ", ".join(map(repr, near or component.target.names))
                raise PlanError(f"sequence names {name!r}, but the target has {known}. Name one of these")
        if not component.slots:
            yield Skipped("", "it has no parameters or buffers")
            return
        check_movable(component, component.slots)
        weights = ComponentWeights(component, self.device, coordinator.link)
        coordinator.plan(weights)
        claims = [Claim(Resource.PLACEMENT, slot.name, shared=True) for slot in component.slots]
        first, *others = entries_of(component)
        told = ModelDevice(component, self.device, torch.device("cpu"))
        move_inputs = InputMover(component, self.device, self.exclude_kwargs)
        whole = _ComponentHook(coordinator, weights, component.slots, move_inputs, told)
        yield Binding("", whole, first, claims)
        for entry in others:
            yield Binding("", _EntryHook(coordinator, weights, component.slots, move_inputs), entry)
        for fqn in callable_parts(component):
            if fqn or "forward" not in (first, *others):
                yield Binding(fqn, _PartHook(coordinator, weights, component, fqn, move_inputs))


class _EntryHook(Hook):
    """Brings the component to the device for a call."""

    swaps_weights: ClassVar[bool] = True
    only_brings_weights: ClassVar[bool] = True

    def __init__(
        self,
        coordinator: Coordinator,
        weights: ComponentWeights,
        slots: Sequence[TensorSlot],
        move_inputs: InputMover,
    ) -> None:
        self._coordinator = coordinator
        self._weights = weights
        self._slots = slots  # what the called module needs
        self._parts: list[Part] | None = None
        self._move_inputs = move_inputs

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bring the component and the inputs."""
        if self._parts is None:
            self._parts = self._weights.parts_of(self._slots)
        self._coordinator.enter(self._weights, self._parts)
        try:
            return self._move_inputs(args, kwargs)
        except BaseException:
            self._coordinator.leave(self._weights)
            raise

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """End the call; the component stays."""
        self._coordinator.leave(self._weights)

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """End the call; the component stays."""
        self._coordinator.leave(self._weights)


class _PartHook(_EntryHook):
    """Brings the component to the device for a call of a part of it by itself."""

    outermost_only: ClassVar[bool] = True

    def __init__(
        self,
        coordinator: Coordinator,
        weights: ComponentWeights,
        component: Component,
        fqn: str,
        move_inputs: InputMover,
    ) -> None:
        super().__init__(coordinator, weights, (), move_inputs)
        self._component = component
        self._fqn = fqn
        self._entered: list[bool] = []  # for each call under way

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Bring the component and the inputs, unless one of its calls is under way."""
        if self._weights.calls:
            self._entered.append(False)
            return None
        if self._parts is None:  # at the first such call: there are as many parts as modules
            self._parts = self._weights.parts_of(slots_below(self._component, [self._fqn]))
        inputs = super().pre_forward(module, args, kwargs)
        self._entered.append(True)
        return inputs

    def post_forward(self, module: nn.Module, output: Any) -> None:
        """End the call; the component stays."""
        if self._entered.pop():
            super().post_forward(module, output)

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """End the call; the component stays."""
        self.post_forward(module, None)


class _ComponentHook(_EntryHook):
    """The one hook, at the component's first entry, that attaches and detaches for all of them."""

    def __init__(
        self,
        coordinator: Coordinator,
        weights: ComponentWeights,
        slots: Sequence[TensorSlot],
        move_inputs: InputMover,
        told: ModelDevice,
    ) -> None:
        super().__init__(coordinator, weights, slots, move_inputs)
        self._told = told

    def attach(self, module: nn.Module) -> None:
        """Put the component into host memory."""
        try:
            self._told.attach()
            self._coordinator.attach(self._weights)
        except BaseException:
            self._told.detach()
            raise

    def detach(self, module: nn.Module) -> None:
        """Put it back where it was."""
        self._coordinator.detach(self._weights)
        self._told.detach()

    def reset(self, module: nn.Module) -> None:
        """Forget the order of components, and what this one counted."""
        self._coordinator.reset(self._weights)

    def offload(self) -> None:
        """Offload the component."""
        self._coordinator.offload(self._weights)

    def needs(self, module: nn.Module) -> Mapping[str, int]:
        """Return what the component takes; what the components share is the first one's."""
        return self._coordinator.needs(self._weights)

    def report(self, module: nn.Module) -> Mapping[str, int]:
        """Return where the component's bytes lie now."""
        return self._weights.report()

    def run_report(self, module: nn.Module) -> OffloadReport:
        """Return what was copied for the component."""
        return self._weights.run_report()

    def recording(self, timeline: Timeline) -> AbstractContextManager[None]:
        """Time what is copied, and call, until the end of the block."""
        return self._weights.recording(timeline)


def offload(target: Any) -> None:
    """Offload all components of a target that `ModelOffload` has brought; they come when called again.

    Does what diffusers' pipelines do with `maybe_free_model_hooks` at the end of a run. Whatever is not
    under `ModelOffload` is left alone.

    Args:
        target: As for `hookcore.apply`.

    Raises:
        ConcurrentCallError: A component is being called.
    """
    for attachment in status(target).attachments:
        for binding in attachment.bindings:
            if isinstance(binding.hook, _ComponentHook):
                binding.hook.offload()
