"""What a user asks for, and what it becomes: techniques, bindings, claims."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from attrs import field, frozen

from hookcore.overriding import check_overrides
from hookcore.units import is_snake_case

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    import torch

    from hookcore.hook import Hook
    from hookcore.target import Component


class Phase(enum.IntEnum):
    """Where a technique's hooks stand around a call, from outside in."""

    SPLIT = 0
    """Divides the work of one call into several: slicing, tiling."""
    PLACE = 1
    """Brings weights and inputs to where they are used: offloading, device maps."""
    CAST = 2
    """Changes the dtype of weights that are already in place."""
    COMPUTE = 3
    """Changes how the call itself computes: attention, memory format, tracing, statistics."""


class Resource(enum.StrEnum):
    """The things that techniques most often claim. A plugin may claim any other, by any name of its own."""

    PLACEMENT = "placement"
    """Where a tensor lies, and when it moves."""
    STORAGE_DTYPE = "storage dtype"
    """The dtype of a tensor between calls."""
    BATCH_SPLIT = "batch split"
    """The division of an entry's call along the batch."""
    SPATIAL_SPLIT = "spatial split"
    """The division of an entry's call along height, width or time."""
    ATTENTION = "attention"
    """How an entry's call computes attention."""
    MEMORY_FORMAT = "memory format"
    """The order of a tensor's dimensions in memory."""
    CODE = "code"
    """What runs in the place of an entry's own code."""


@frozen(slots=False)  # with a dict, making thousands of them takes half the time
class Claim:
    """A thing that a binding needs to own alone.

    Attributes:
        resource: What is owned: a `Resource`, or a name of the plugin's own.
        tensor: FQN, in the component, of the parameter or buffer of which it is owned. Tensors that share
            memory are one. None means: of the entry that the binding hooks.
        dtype: Of a claim on its storage dtype: what it will be stored in, so that a plan can count it.
        shared: Whether a component that is bound jointly with this one may claim it as well.
    """

    resource: str
    tensor: str | None = None
    dtype: torch.dtype | None = field(default=None, kw_only=True, eq=False)
    shared: bool = field(default=False, kw_only=True, eq=False)


def _claims(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    if isinstance(claims, Claim):
        raise TypeError(f"claims of a Binding is {claims!r}, expected a list of Claims: write [{claims!r}]")
    return tuple(claims)


@frozen(slots=False)
class Binding:
    """One hook at one entry of one module.

    Attributes:
        fqn: The module's FQN in its component; `""` is the component itself.
        hook: The hook; an object of its own for each binding.
        entry: The method that is hooked: `"forward"`, or any other, such as `"decode"`.
        claims: What the binding needs to own alone.
        forbids_below: Resources that no other technique may hold in modules below this one, because its
            call hides theirs (a traced module does not call its children). `"*"` forbids any hook.
        encloses: Whether the call runs the modules below as one with it (a compiled block), so that nothing
            can stand between. Hooks there that only bring weights do so around this call; others are refused.
    """

    fqn: str
    hook: Hook
    entry: str = "forward"
    claims: tuple[Claim, ...] = field(default=(), converter=_claims)
    forbids_below: tuple[str, ...] = ()
    encloses: bool = False


@frozen
class Skipped:
    """A module that a technique leaves alone although a user may expect otherwise.

    Attributes:
        fqn: The module's FQN in its component.
        reason: Why, as a phrase for people.
    """

    fqn: str
    reason: str


@frozen
class Technique:
    """Base of all techniques: a frozen attrs class of options that holds no state of a run.

    A plugin subclasses it with `@attrs.frozen`, gives it a `name` and a `phase`, and writes `bind`.
    Options are validated when the technique is made, so that a bad one fails at once.

    Attributes:
        name: The registered name, in snake_case, the same for all users: `"layerwise_casting"`.
        phase: Where its hooks stand around a call.
        before: Names of techniques whose hooks have to stand inside this one's, if they are used.
        after: Names of techniques whose hooks have to stand outside this one's.
        incompatible_with: Names of techniques that may not share a module with this one.
        replans: Whether to bind anew when parameters or submodules were added, replaced or removed
            (a LoRA was loaded) since the last call.
        encloses: Whether its bindings may have calls run the modules below as one with them.
        materializes: Whether it brings weights from a checkpoint, so that a model without data (on the
            meta device) can be run with it.
    """

    name: ClassVar[str]
    phase: ClassVar[Phase]
    before: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    incompatible_with: ClassVar[tuple[str, ...]] = ()
    replans: ClassVar[bool] = False
    materializes: ClassVar[bool] = False
    encloses: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_overrides(cls, Technique)
        if hasattr(cls, "name") or hasattr(cls, "phase"):  # or else it is a base for others
            _check_declared(cls)

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Make a technique, of a class that is complete."""
        check_complete(cls)
        return super().__new__(cls)

    def skip_unless_named(self, component: Component) -> str | None:
        """Return why this technique leaves a component alone that nobody named, as a phrase for people.

        Asked of each component when a plain list of techniques is put on a target of several. A component is
        named by `components=`, or by a mapping from components to techniques. Touches nothing.

        Args:
            component: The component; what it was opened with is in `component.target`.

        Returns:
            The reason; None to take the component as if it was named.
        """
        return None

    def bind(self, component: Component) -> Iterable[Binding | Skipped]:
        """List the hooks that this technique needs on a component. Touches nothing.

        Args:
            component: The module tree with its tensors, ties and conventions.

        Raises:
            PlanError: The options do not fit this component.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define bind()")


@frozen
class JointTechnique(Technique):
    """A technique whose components share something, such as one memory budget or weights.

    It is bound once for all components of an `apply` on which it is put with an equal `joint_key`, and again
    for all of them when one has to be bound anew, so that nothing they share outlives its plan. A plugin
    writes `bind_jointly` instead of `bind`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_overrides(cls, JointTechnique)

    @property
    def joint_key(self) -> Hashable:
        """A value that is equal for techniques whose components are bound together."""
        return self

    @classmethod
    def bind_jointly(cls, places: Sequence[tuple[Self, Component]]) -> Iterable[Iterable[Binding | Skipped]]:
        """List the hooks on several components. Touches nothing.

        Args:
            places: Each component with the technique that is put on it, in the order of the target.

        Returns:
            For each place the hooks on its component, in the same order.

        Raises:
            PlanError: The options do not fit a component.
        """
        raise NotImplementedError(f"{cls.__name__} has to define bind_jointly()")

    def bind(self, component: Component) -> Iterable[Binding | Skipped]:
        """List the hooks on a component that is bound alone."""
        (bound,) = self.bind_jointly([(self, component)])
        return bound


def check_complete(kind: type[Technique]) -> None:
    """Refuse a class of which no techniques can be made.

    Raises:
        TypeError: It lacks a name or a phase, or attrs has not made its options a value.
    """
    _check_declared(kind)
    if "__attrs_attrs__" not in vars(kind):
        raise TypeError(
            f"{_where(kind)} is not decorated. Write @attrs.frozen above the class, so that its options are "
            "compared, shown and cannot be changed"
        )


def _check_declared(kind: type[Technique]) -> None:
    name, phase = getattr(kind, "name", None), getattr(kind, "phase", None)
    if not is_snake_case(name):
        raise TypeError(
            f"{_where(kind)} has the name {name!r}, expected snake_case. Write name: ClassVar[str] = "
            "'group_offload' or the like"
        )
    if not isinstance(phase, Phase):
        raise TypeError(
            f"{_where(kind)} has the phase {phase!r}, expected one of {', '.join(Phase.__members__)}. Write "
            "phase: ClassVar[Phase] = Phase.COMPUTE or the like"
        )
    for attribute in ("before", "after", "incompatible_with"):
        names = getattr(kind, attribute)
        if isinstance(names, str) or not all(isinstance(it, str) for it in names):
            raise TypeError(
                f"{_where(kind)} has {attribute} = {names!r}, expected names of techniques, such as "
                "('tiling',)"
            )


def _where(kind: type[Technique]) -> str:
    return f"technique {kind.__module__}.{kind.__qualname__}"
