"""Every point at which a plugin can extend hookcore.

Mark an implementation with `hookcore.hookimpl`, in a module or class named by an entry point in group
`hookcore`. All of these serve planning, loading and the command line; none is called during a forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from hookcore.attention import AttentionFunction
    from hookcore.conventions import ForeignMechanism, ModelConventions, OpenedTarget
    from hookcore.plan import Plan
    from hookcore.technique import Technique

PROJECT = "hookcore"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def hookcore_register_techniques() -> Iterable[type[Technique]]:  # type: ignore[empty-body]
    """Return the technique classes that the plugin brings. Names have to be new."""


@hookspec
def hookcore_register_attention_functions() -> Iterable[AttentionFunction]:  # type: ignore[empty-body]
    """Return the ways to compute attention that the plugin brings. Names have to be new."""


@hookspec(firstresult=True)
def hookcore_open_target(target: Any) -> OpenedTarget | Mapping[str, nn.Module] | None:
    """Return the named modules of an object (a pipeline's components), or None if it isn't known here.

    An `OpenedTarget` says more of it than a mapping can.
    """


@hookspec
def hookcore_describe_model(model: nn.Module, modules: Mapping[str, nn.Module]) -> ModelConventions | None:
    """Return what the model's library declares about it, or None. Answers of several plugins are merged.

    `modules` are all in the tree, the model too, by FQN, so that not every plugin has to walk it.
    """


@hookspec
def hookcore_find_foreign(  # type: ignore[empty-body]
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> Iterable[ForeignMechanism]:
    """Return what already changes calls in this tree, such as another library's hooks.

    `modules` are all in the tree, the model too, by FQN.
    """


@hookspec
def hookcore_review_plan(plan: Plan) -> Iterable[str] | None:
    """Look at a finished plan: return notes that are shown with it, or raise PlanError to refuse it."""


@hookspec
def hookcore_observe(event: str, details: Mapping[str, Any]) -> None:
    """Observe `"applied"`, `"removed"`, `"reset"` and `"replanned"`. Errors raised here become warnings."""


@hookspec(firstresult=True)
def hookcore_build_model(
    model_class: type[nn.Module], folder: Path, config_overrides: Mapping[str, Any]
) -> nn.Module | None:
    """Make a model from the config in a folder, without reading weights, or return None if unknown here.

    Called while new parameters are put on the meta device; buffers are real.
    """


@hookspec
def hookcore_loading_dtypes(model: nn.Module, dtype: torch.dtype) -> Mapping[str, torch.dtype] | None:
    """Return what is loaded in another dtype than the one asked for, or None if the model isn't known here.

    Keys are regular expressions, searched in FQNs of parameters and buffers. Called while the model has no
    weights yet.
    """


@hookspec
def hookcore_register_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add commands to the command line: `commands.add_parser(name).set_defaults(run=function)`.

    `run(arguments)` returns the exit status.
    """
