"""Toy techniques: each does one thing that real ones do, as plainly as it can be done."""

from collections import Counter
from typing import ClassVar

import torch
from attrs import field, frozen

from hookcore import Binding, Claim, Hook, Phase, Resource, Technique
from hookcore.target import byte_span

ENTRIES = ("forward", "encode", "decode")


def toy(name, bind=lambda component: (), *, phase=Phase.COMPUTE, **attributes):
    """Makes a technique of a class of its own; `bind` is given the component."""
    methods = {"bind": lambda self, component: bind(component), "name": name, "phase": phase, **attributes}
    return frozen(type(name, (Technique,), methods))()


def bind_all(make_hook, component, entries=ENTRIES):
    """One binding for every entry of every module."""
    for fqn, module in component.modules.items():
        for entry in entries:
            if callable(getattr(module, entry, None)):
                yield Binding(fqn, make_hook(fqn, entry), entry)


# Recording


class RecordingHook(Hook):
    """Writes down where calls go through it."""

    def __init__(self, log, name, fqn, entry):
        self.log, self.where = log, (name, fqn, entry)

    def pre_forward(self, module, args, kwargs):
        self.log.append(("pre", *self.where))

    def post_forward(self, module, output):
        self.log.append(("post", *self.where))

    def on_error(self, module, error):
        self.log.append(("error", *self.where))


class RecordingAroundHook(RecordingHook):
    """Likewise, standing in for the call."""

    pre_forward = Hook.pre_forward
    post_forward = Hook.post_forward

    def around_forward(self, module, call, /, *args, **kwargs):
        self.log.append(("pre", *self.where))
        output = call(*args, **kwargs)
        self.log.append(("post", *self.where))
        return output


@frozen
class Recording(Technique):
    """Records the calls of every entry of every module into `log`."""

    name: ClassVar[str] = "recording"
    phase: ClassVar[Phase] = Phase.COMPUTE

    log: list = field(factory=list, eq=False)
    label: str = "recording"
    around: bool = False

    def bind(self, component):
        kind = RecordingAroundHook if self.around else RecordingHook
        return bind_all(lambda fqn, entry: kind(self.log, self.label, fqn, entry), component)


# Moving weights


def reallocate(component, change=lambda memory: None):
    """Gives every tensor new memory of its own, ties kept, after a change to its old bytes.

    Args:
        component: Looked at afresh, since a forward may have replaced buffers.
        change: Given a flat tensor of all elements of a slot; changes it in place.

    Returns:
        Each tensor with the memory that it had, to put back.
    """
    old = []
    for slot in component.afresh().slots:
        spans = [byte_span(tensor) for tensor in slot.tensors]
        start, size = min(first for first, _ in spans), slot.tensors[0].element_size()
        first = min(slot.tensors, key=byte_span)
        memory = first.detach().as_strided((slot.nbytes // size,), (1,)).clone()
        change(memory)
        for tensor, (at, _) in zip(slot.tensors, spans, strict=True):
            old.append((tensor, tensor.data))
            tensor.data = memory.as_strided(tensor.shape, tensor.stride(), (at - start) // size)
    return old


class Held:
    """What the hooks at the entries of one component share: how many of them are inside a call."""

    def __init__(self, component):
        self.component, self.depth, self.attached = component, 0, 0


class MovingHook(Hook):
    """Lends a component's weights other memory for the length of its outermost call."""

    swaps_weights = True

    def __init__(self, held):
        self.held = held
        self.old = []

    def pre_forward(self, module, args, kwargs):
        self.held.depth += 1
        if self.held.depth == 1:
            self.old = reallocate(self.held.component)

    def post_forward(self, module, output):
        self.held.depth -= 1
        if self.held.depth == 0:
            for tensor, memory in self.old:
                lent, tensor.data = tensor.data, memory
                with torch.no_grad():
                    memory.copy_(lent)  # a call may change buffers in place
            self.old = []

    def on_error(self, module, error):
        self.post_forward(module, None)


@frozen
class Moving(Technique):
    """Weights lie elsewhere during a call: the shape of every offload, without a device."""

    name: ClassVar[str] = "moving"
    phase: ClassVar[Phase] = Phase.PLACE

    def bind(self, component):
        held = Held(component)
        claims = [Claim(Resource.PLACEMENT, slot.name) for slot in component.slots]
        for entry in ENTRIES:
            if callable(getattr(component.module, entry, None)):
                yield Binding("", MovingHook(held), entry, claims=claims)


class ScalingHook(Hook):
    """Keeps weights at a power of two times their value; calls see the true one. Exact, as floats are."""

    swaps_weights = True

    def __init__(self, held, factor):
        self.held, self.factor = held, factor

    def scale(self, factor):
        def change(memory):
            if memory.is_floating_point():
                memory.mul_(factor)

        reallocate(self.held.component, change)

    def attach(self, module):
        self.held.attached += 1
        if self.held.attached == 1:
            self.scale(self.factor)

    def detach(self, module):
        self.held.attached -= 1
        if self.held.attached == 0:
            self.scale(1 / self.factor)

    def pre_forward(self, module, args, kwargs):
        self.held.depth += 1
        if self.held.depth == 1:
            self.scale(1 / self.factor)

    def post_forward(self, module, output):
        self.held.depth -= 1
        if self.held.depth == 0:
            self.scale(self.factor)

    def on_error(self, module, error):
        self.post_forward(module, None)


@frozen
class Scaling(Technique):
    """Weights at rest are not what calls compute with, as with a narrower storage dtype; nothing is lost."""

    name: ClassVar[str] = "scaling"
    phase: ClassVar[Phase] = Phase.CAST

    factor: float = 4.0

    def bind(self, component):
        held = Held(component)
        claims = [Claim(Resource.STORAGE_DTYPE, slot.name) for slot in component.slots]
        for entry in ENTRIES:
            if callable(getattr(component.module, entry, None)):
                yield Binding("", ScalingHook(held, self.factor), entry, claims=claims)


# Preparing


class PushingHook(Hook):
    """Lays its name on a pile in the module, and insists on being on top when it is taken off."""

    def __init__(self, name, calls=None):
        self.name, self.calls = name, calls

    def attach(self, module):
        vars(module).setdefault("_pile", []).append(self.name)

    def detach(self, module):
        pile = vars(module)["_pile"]
        if pile[-1] != self.name:
            raise RuntimeError(f"{self.name} is not on top of {pile}")
        pile.pop()
        if not pile:
            del module._pile

    def pre_forward(self, module, args, kwargs):
        if self.calls is not None:
            self.calls[self.name] += 1

    def reset(self, module):
        if self.calls is not None:
            self.calls[self.name] = 0


@frozen
class Pushing(Technique):
    """Prepares every module in a way that can be undone only in reverse."""

    name: ClassVar[str] = "pushing"
    phase: ClassVar[Phase] = Phase.COMPUTE

    calls: Counter = field(factory=Counter, eq=False)

    def bind(self, component):
        for fqn in component.modules:
            yield Binding(fqn, PushingHook(f"{self.name}@{id(self)}", self.calls))


class SwallowsErrors(Hook):
    """Breaks a promise: an error of the call doesn't reach the caller."""

    def around_forward(self, module, call, /, *args, **kwargs):
        try:
            return call(*args, **kwargs)
        except Exception:  # noqa: BLE001
            return args[0]
