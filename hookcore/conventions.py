"""What plugins say of models and of objects that hold several: records of names and patterns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torch import nn


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@frozen
class ModelConventions:
    """What a model's library declares about it, in one vocabulary.

    Attributes:
        entries: Methods through which users call the model: `("forward",)`; a VAE has `encode`, `decode`.
        block_classes: Names of the classes whose modules are the model's repeated blocks, not to be split.
        keep_dtype_patterns: Regular expressions, searched in module FQNs, of modules whose weights must
            keep their dtype.
        group_modules: FQNs of modules that hold the blocks; empty where the library doesn't say.
        unmoved_kwargs: Names of keyword inputs that stay the objects that they are, since calls change them;
            no technique moves them to another device.
        repeated_classes: Names of the classes of those blocks that are worth compiling once for all; empty
            where the library doesn't say.
        checkpoint_names: Given the keys of a checkpoint that does not fit as it is, tells by which names the
            library loads those that it renames. Raises CheckpointError where it makes other tensors of them.
    """

    entries: tuple[str, ...] = field(default=("forward",), converter=_strings)
    block_classes: tuple[str, ...] = field(default=(), converter=_strings)
    keep_dtype_patterns: tuple[str, ...] = field(default=(), converter=_strings)
    group_modules: tuple[str, ...] = field(default=(), converter=_strings)
    repeated_classes: tuple[str, ...] = field(default=(), converter=_strings)
    unmoved_kwargs: tuple[str, ...] = field(default=(), converter=_strings)
    checkpoint_names: Callable[[Collection[str]], Mapping[str, str]] | None = None

    @keep_dtype_patterns.validator
    def _check_patterns(self, _attribute: object, patterns: tuple[str, ...]) -> None:
        for pattern in patterns:
            re.compile(pattern)

    def merged(self, other: ModelConventions) -> ModelConventions:
        """Both together, without repeats."""
        return ModelConventions(
            entries=dict.fromkeys(self.entries + other.entries),
            block_classes=dict.fromkeys(self.block_classes + other.block_classes),
            keep_dtype_patterns=dict.fromkeys(self.keep_dtype_patterns + other.keep_dtype_patterns),
            group_modules=dict.fromkeys(self.group_modules + other.group_modules),
            repeated_classes=dict.fromkeys(self.repeated_classes + other.repeated_classes),
            unmoved_kwargs=dict.fromkeys(self.unmoved_kwargs + other.unmoved_kwargs),
            checkpoint_names=self.checkpoint_names or other.checkpoint_names,
        )


@frozen(eq=False)
class OpenedTarget:
    """What a plugin found in an object that holds several models, such as a pipeline.

    Attributes:
        components: The models by name, each once.
        absent: What a user may take for a component, by name, and why it is none, as a phrase that follows
            the name: `"is None"`.
        sequence: Names of components in the order in which a run of the object calls them; empty if unknown.
        denoisers: Names of the components that a run calls once for each step; empty if unknown.
        run_end: Name of the method of the object that a run calls last; None if there is none.
    """

    components: Mapping[str, nn.Module]
    absent: Mapping[str, str] = field(factory=dict)
    sequence: tuple[str, ...] = field(default=(), converter=_strings)
    denoisers: tuple[str, ...] = field(default=(), converter=_strings)
    run_end: str | None = None


@frozen
class ForeignMechanism:
    """Something else that already changes what a module's call does.

    Attributes:
        fqn: The module's FQN below the module asked about.
        what: What it is, as a phrase for people: `"an accelerate hook (AlignDevicesHook)"`.
        remedy: The exact call that removes it, or what to do instead.
    """

    fqn: str
    what: str
    remedy: str
