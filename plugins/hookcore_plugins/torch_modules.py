"""Plain torch modules: which of torch's own mechanisms stand in the way of hooks, and how one is built."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hookcore import ForeignMechanism, PlanError, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@hookimpl
def hookcore_find_foreign(modules: Mapping[str, nn.Module]) -> Iterator[ForeignMechanism]:
    """Find compiled, traced, sharded and wrapped modules, and weights made anew before each call."""
    inside_script = set[nn.Module]()
    # Thousands of modules are of few classes, nearly all of which no mechanism has.
    classes = _classes_of_mechanisms()
    suspect = {kind for kind in set(map(type, modules.values())) if issubclass(kind, classes)}
    for fqn, module in modules.items():
        if not (type(module) in suspect or module._forward_pre_hooks or module._compiled_call_impl):
            continue
        if module in inside_script:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            # All modules below are script modules too; the outermost is the one a user made.
            inside_script.update(module.modules())
        for what, remedy in _mechanisms(module, _expression(fqn)):
            yield ForeignMechanism(fqn, what, remedy)


@hookimpl(trylast=True)
def hookcore_build_model(
    model_class: type[nn.Module],
    folder: Path,  # noqa: ARG001 - a plain torch class keeps no config on disk
    config_overrides: Mapping[str, Any],
) -> nn.Module:
    """Call the class with the overrides; comes last because it fits every module class.

    Raises:
        PlanError: The class cannot be called with these arguments.
    """
    try:
        inspect.signature(model_class).bind(**config_overrides)
    except TypeError as error:
        raise PlanError(
            f"{model_class.__qualname__} cannot be made with config_overrides={dict(config_overrides)!r}: "
            f"{error}; give all arguments of its constructor in config_overrides"
        ) from error
    return model_class(**config_overrides)


def _classes_of_mechanisms() -> tuple[type, ...]:
    """Classes whose modules `_mechanisms` has something to say about, for what is imported of them."""
    return (
        torch.jit.ScriptModule,
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        LazyModuleMixin,
        *_imported("torch._dynamo.eval_frame", "OptimizedModule"),
        *_imported("torch.distributed.fsdp", "FullyShardedDataParallel"),
        *_imported("torch.distributed.fsdp", "FSDPModule"),
    )


def _mechanisms(module: nn.Module, here: str) -> Iterator[tuple[str, str]]:
    """What changes calls of this one module, each with its remedy; `here` is an expression for the module."""
    if isinstance(module, torch.jit.ScriptModule):
        yield (
            "a TorchScript module, whose code cannot be hooked",
            "apply to the Python module that it was scripted or traced from",
        )
    elif isinstance(module, _imported("torch._dynamo.eval_frame", "OptimizedModule")):
        yield (
            "a module compiled by torch.compile(model)",
            f"apply to `{here}._orig_mod`, then compile it again",
        )
    elif module._compiled_call_impl is not None:
        yield (
            "a module compiled in place by module.compile()",
            f"set `{here}._compiled_call_impl = None`, apply, then call `{here}.compile()` again",
        )
    if isinstance(module, _imported("torch.distributed.fsdp", "FullyShardedDataParallel")):
        yield (
            "a FullyShardedDataParallel module, which moves its weights itself",
            f"apply to `{here}.module` before wrapping, or use FSDP's own `cpu_offload=CPUOffload(...)`",
        )
    elif isinstance(module, _imported("torch.distributed.fsdp", "FSDPModule")):
        yield (
            "a module sharded by fully_shard(), which moves its weights itself",
            "apply to a model that is not sharded, or use FSDP's own `offload_policy=CPUOffloadPolicy()`",
        )
    elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        yield (
            f"a {type(module).__name__} wrapper, which copies or reduces what is below it",
            f"apply to `{here}.module`",
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        yield "a lazy module whose parameters have no shape yet", "call the model once on an example input"
    yield from _weights_made_before_call(module, here)


def _weights_made_before_call(module: nn.Module, here: str) -> Iterator[tuple[str, str]]:
    """Old-style reparametrizations: a torch pre-hook computes the weight before any hook of `forward` runs.

    So it would read weights that are not onloaded, or not cast, yet. The new ones in
    `torch.nn.utils.parametrizations` compute the weight inside the call and are fine.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield (
                f"torch.nn.utils.weight_norm on {hook.name!r}, which reads the weight before the call",
                f"call `torch.nn.utils.remove_weight_norm({here}, {hook.name!r})`",
            )
        elif isinstance(hook, SpectralNorm):
            yield (
                f"torch.nn.utils.spectral_norm on {hook.name!r}, which reads the weight before the call",
                f"call `torch.nn.utils.remove_spectral_norm({here}, {hook.name!r})`",
            )
        elif isinstance(hook, BasePruningMethod):
            yield (
                f"torch.nn.utils.prune on {hook._tensor_name!r}, which reads the weight before the call",
                f"call `torch.nn.utils.prune.remove({here}, {hook._tensor_name!r})`",
            )


def _imported(defined_in: str, name: str) -> tuple[type, ...]:
    """A class of a torch module that is costly to import; no class while nobody has imported that."""
    loaded = sys.modules.get(defined_in)
    return () if loaded is None else (getattr(loaded, name),)


def _expression(fqn: str) -> str:
    """Python code for a module below `model`."""
    return f"model.get_submodule({fqn!r})" if fqn else "model"
