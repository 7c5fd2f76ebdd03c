"""Every point at which a plugin can extend hookcore.

Mark an implementation with `hookcore.hookimpl`, in a module or class named by an entry point in group
`hookcore`. All of these serve planning, loading and the command line; none is called during a forward.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pluggy
from attrs import field, frozen

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from hookcore.attention import AttentionFunction
    from hookcore.plan import Plan
    from hookcore.technique import Technique

PROJECT = "hookcore"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


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
    """

    entries: tuple[str, ...] = field(default=("forward",), converter=_strings)
    block_classes: tuple[str, ...] = field(default=(), converter=_strings)
    keep_dtype_patterns: tuple[str, ...] = field(default=(), converter=_strings)
    group_modules: tuple[str, ...] = field(default=(), converter=_strings)
    repeated_classes: tuple[str, ...] = field(default=(), converter=_strings)
    unmoved_kwargs: tuple[str, ...] = field(default=(), converter=_strings)

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


@hookspec
def hookcore_register_techniques() -> Iterable[type[Technique]]:  # type: ignore[empty-body]
    """Returns the technique classes that the plugin brings. Names have to be new."""


@hookspec
def hookcore_register_attention_functions() -> Iterable[AttentionFunction]:  # type: ignore[empty-body]
    """Returns the ways to compute attention that the plugin brings. Names have to be new."""


@hookspec(firstresult=True)
def hookcore_open_target(target: Any) -> OpenedTarget | Mapping[str, nn.Module] | None:
    """Returns the named modules of an object (a pipeline's components), or None if it isn't known here.

    An `OpenedTarget` says more of it than a mapping can.
    """


@hookspec
def hookcore_describe_model(model: nn.Module, modules: Mapping[str, nn.Module]) -> ModelConventions | None:
    """Returns what the model's library declares about it, or None. Answers of several plugins are merged.

    `modules` are all in the tree, the model too, by FQN, so that not every plugin has to walk it.
    """


@hookspec
def hookcore_find_foreign(  # type: ignore[empty-body]
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> Iterable[ForeignMechanism]:
    """Returns what already changes calls in this tree, such as another library's hooks.

    `modules` are all in the tree, the model too, by FQN.
    """


@hookspec
def hookcore_review_plan(plan: Plan) -> Iterable[str] | None:
    """Looks at a finished plan: returns notes that are shown with it, or raises PlanError to refuse it."""


@hookspec
def hookcore_observe(event: str, details: Mapping[str, Any]) -> None:
    """Is told what happens: `"applied"`, `"removed"`, `"reset"`, `"replanned"`. Errors in it are warnings."""


@hookspec(firstresult=True)
def hookcore_build_model(
    model_class: type[nn.Module], folder: Path, config_overrides: Mapping[str, Any]
) -> nn.Module | None:
    """Makes a model from the config in a folder, without reading weights, or returns None if unknown here.

    Called while new parameters are put on the meta device; buffers are real.
    """


@hookspec
def hookcore_loading_dtypes(model: nn.Module, dtype: torch.dtype) -> Mapping[str, torch.dtype] | None:
    """Returns what is loaded in another dtype than the one asked for, or None if the model isn't known here.

    Keys are regular expressions, searched in FQNs of parameters and buffers. Called while the model has no
    weights yet.
    """


@hookspec
def hookcore_register_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds commands to the command line: `commands.add_parser(name).set_defaults(run=function)`.

    `run(arguments)` returns the exit status.
    """
