"""Asks the methods of techniques and hooks. Their errors say whose they are, and answers are checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import attrs

from hookcore.errors import PluginError, note_origin
from hookcore.hook import Hook
from hookcore.technique import Binding, Claim, Skipped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hookcore.target import Component
    from hookcore.technique import JointTechnique, Technique


@contextmanager
def noting_origin(technique: Technique, method: str, label: str) -> Iterator[None]:
    """Add a note to errors in the block: technique, method and module."""
    try:
        yield
    except Exception as error:
        note_origin(error, f"{method}() of {technique.name} at {label!r}")
        raise


def ask_jointly(kind: type[JointTechnique], places: Sequence[tuple[Technique, Component]]) -> list[object]:
    """Ask a technique for its bindings on several components: an answer for each of them.

    Raises:
        PlanError: From the technique: its options do not fit.
        PluginError: It gave answers for more components, or for fewer.
    """
    technique = places[0][0]
    with noting_origin(technique, "bind_jointly", ", ".join(component.label("") for _, component in places)):
        answer: object = kind.bind_jointly(cast("Any", places))
        answers = list(answer) if isinstance(answer, Iterable) else []
    if len(answers) != len(places):
        raise PluginError(
            f"{technique.name}.bind_jointly() gave hooks for {len(answers)} components, "
            f"expected {len(places)}"
        )
    return answers


def read_bindings(
    technique: Technique, component: Component, answer: object, method: str = "bind"
) -> tuple[tuple[Binding, ...], tuple[Skipped, ...]]:
    """Read what a technique's `bind` gave for a component, and check that it fits.

    Args:
        technique: The technique.
        component: The component.
        answer: Bindings and Skippeds, in a list or yielded one by one.
        method: The method that gave it.

    Raises:
        PlanError: From the technique: its options do not fit.
        PluginError: There is something else among them, or a binding names something the component lacks.
    """
    if isinstance(answer, str) or not isinstance(answer, Iterable):
        raise _unexpected(technique, method, answer, "Bindings and Skippeds, in a list or yielded")
    with noting_origin(technique, method, component.label("")):
        items = list(answer)
    skipped = tuple(item for item in items if isinstance(item, Skipped))
    bindings = tuple(item for item in items if not isinstance(item, Skipped))
    for item in bindings:
        _check(item, technique, component)
    if len({id(binding.hook) for binding in bindings}) < len(bindings):
        raise PluginError(
            f"{technique.name} binds one hook object twice; each binding needs a hook of its own"
        )
    return bindings, skipped


def ask_reason(technique: Technique, component: Component) -> str | None:
    """Ask why a technique leaves a component alone that nobody named.

    Raises:
        PluginError: The technique gave no text for a reason.
    """
    with noting_origin(technique, "skip_unless_named", component.label("")):
        reason: object = technique.skip_unless_named(component)
    if reason is None or isinstance(reason, str):
        return reason
    raise _unexpected(technique, "skip_unless_named", reason, "a reason as text, or None")


def ask_loss(technique: Technique, binding: Binding, component: Component) -> str | None:
    """Ask a hook what detaching could not give back exactly.

    Raises:
        PluginError: The hook gave something else than text or None.
    """
    loss = _ask(technique, binding, component, "loss_on_detach")
    if loss is None or isinstance(loss, str):
        return loss
    raise _unexpected(technique, "loss_on_detach", loss, "what is lost as text, or None")


def ask_sizes(technique: Technique, binding: Binding, component: Component, method: str) -> Mapping[str, int]:
    """Ask a hook for bytes, by `report` or `needs`.

    Raises:
        PluginError: The hook gave something else than a mapping from text to numbers of bytes.
    """
    sizes = _ask(technique, binding, component, method)
    if isinstance(sizes, Mapping) and all(
        isinstance(label, str) and isinstance(size, int) for label, size in sizes.items()
    ):
        return sizes
    raise _unexpected(technique, method, sizes, "a mapping from text to bytes, such as {'cpu': 1024}")


def ask_figures(technique: Technique, binding: Binding, component: Component) -> Any:
    """Ask a hook for its run report; None for nothing.

    Raises:
        PluginError: The hook gave something else than an attrs object or None.
    """
    figures = _ask(technique, binding, component, "run_report")
    if figures is None or attrs.has(type(figures)):
        return figures
    raise _unexpected(technique, "run_report", figures, "an object of an attrs class, or None")


def _ask(technique: Technique, binding: Binding, component: Component, method: str) -> Any:
    where = f"{type(binding.hook).__qualname__}.{method}"
    with noting_origin(technique, where, component.label(binding.fqn)):
        return getattr(binding.hook, method)(component.modules[binding.fqn])


def _unexpected(technique: Technique, method: str, found: object, expected: str) -> PluginError:
    return PluginError(f"{technique.name}.{method}() gave {found!r}; expected {expected}")


def _check(binding: object, technique: Technique, component: Component) -> None:
    name = technique.name
    if not isinstance(binding, Binding) or not isinstance(binding.hook, Hook):
        raise _unexpected(technique, "bind", binding, "a Binding of a Hook, or a Skipped")
    module = component.modules.get(binding.fqn) if isinstance(binding.fqn, str) else None
    if module is None:
        raise PluginError(f"{name}.bind() names a module {binding.fqn!r} that {component.label('')} lacks")
    if not isinstance(binding.entry, str) or not callable(getattr(module, binding.entry, None)):
        raise PluginError(
            f"{name}.bind() names an entry {binding.entry!r} that {component.label(binding.fqn)!r} "
            f"({type(module).__name__}) lacks"
        )
    for claim in binding.claims:
        if not isinstance(claim, Claim):
            raise _unexpected(technique, "bind", binding, f"Claims as its claims, not {claim!r}")
        if claim.tensor is not None and claim.tensor not in component.slot_of:
            raise PluginError(
                f"{name}.bind() claims a tensor {claim.tensor!r} that {component.label('')} lacks"
            )
    if isinstance(binding.forbids_below, str):
        raise _unexpected(technique, "bind", binding, "a tuple of resources as forbids_below")
