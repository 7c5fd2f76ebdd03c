"""diffusers: what its models declare, the hooks that it leaves on modules, and how a model is built.

diffusers is never imported here: a model of its can only exist when somebody else has imported it.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hookcore import (
    CheckpointError,
    ForeignMechanism,
    ModelConventions,
    PlanError,
    hookimpl,
    refuse_meanwhile,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from torch import nn


_MOVE_OR_CAST = ("group_offloading", "layerwise_casting")
"""Names of the hooks of diffusers that cannot stand around those of hookcore."""


@hookimpl
def hookcore_describe_model(model: nn.Module, modules: Mapping[str, nn.Module]) -> ModelConventions | None:
    """Read the class attributes that diffusers' own techniques read.

    Block classes and kept dtypes are collected from all diffusers models in the tree (a MultiControlNet
    holds several); entries and block holders are the model's own.
    """
    model_mixin = _model_mixin()
    if model_mixin is None:
        return None
    declaring = [module for module in modules.values() if isinstance(module, model_mixin)]
    if not declaring:
        return None
    return ModelConventions(
        entries=("forward", *_coding_methods(model)) if isinstance(model, model_mixin) else ("forward",),
        block_classes=_collect(declaring, "_no_split_modules", "_repeated_blocks"),
        # `enable_layerwise_casting` searches both as regular expressions in FQNs. `from_pretrained` compares
        # `_keep_in_fp32_modules` with whole components of an FQN, which keeps no module that this does not.
        keep_dtype_patterns=[
            *_collect(declaring, "_skip_layerwise_casting_patterns", "_keep_in_fp32_modules"),
            *_read_for_their_dtype(modules),
        ],
        group_modules=_group_modules(model),
        unmoved_kwargs=_collect([model], "_skip_keys"),
        repeated_classes=_collect(declaring, "_repeated_blocks"),
        checkpoint_names=partial(_checkpoint_names, model) if isinstance(model, model_mixin) else None,
    )


def _checkpoint_names(model: Any, keys: Collection[str]) -> dict[str, str]:
    """By which names `from_pretrained` loads tensors: attention of old models had others."""
    names = {key: key for key in keys}
    model._fix_state_dict_keys_on_load(names)
    return {key: name for name, key in names.items()}


@hookimpl
def hookcore_find_foreign(modules: Mapping[str, nn.Module]) -> Iterator[ForeignMechanism]:
    """Find the hooks of `diffusers.hooks`: offloading, casting, caching, parallelism.

    A registry without hooks is none: every pipeline leaves one on its denoiser (`cache_context`).
    """
    registries: dict[str, Any] = {
        fqn: module._diffusers_hook
        for fqn, module in modules.items()
        if module.__dict__.get("_diffusers_hook") is not None
    }
    if not registries:
        return
    caching = [fqn for fqn, module in modules.items() if vars(module).get("_cache_config") is not None]
    for fqn, registry in registries.items():
        for name, hook in registry.hooks.items():
            yield ForeignMechanism(
                fqn, f"a diffusers hook {name!r} ({type(hook).__name__})", _remedy(fqn, name, hook, caching)
            )


@hookimpl
def hookcore_observe(event: str) -> None:  # noqa: ARG001 -- whatever it is, it may have been the first or last
    """Make diffusers refuse to offload or cast what hookcore has hooked."""
    registry = getattr(sys.modules.get("diffusers.hooks.hooks"), "HookRegistry", None)
    if registry is not None:
        refuse_meanwhile(registry, "register_hook", _about_to_hook)


def _about_to_hook(registry: Any, hook: Any, name: str) -> tuple[nn.Module, str] | None:
    if name not in _MOVE_OR_CAST:
        return None
    return registry._module_ref, f"a diffusers hook {name!r} ({type(hook).__name__})"


@hookimpl
def hookcore_build_model(
    model_class: Any, folder: Path, config_overrides: Mapping[str, Any]
) -> nn.Module | None:
    """Build a `ModelMixin` from its config.json as `from_pretrained` does: in evaluation mode.

    Raises:
        CheckpointError: The folder has no config, or one of a quantized model.
        PlanError: The model takes no such option.
    """
    model_mixin = _model_mixin()
    if model_mixin is None or not issubclass(model_class, model_mixin):
        return None
    if not (folder / model_class.config_name).is_file():
        raise CheckpointError(
            f"{folder} has no {model_class.config_name}, which {model_class.__name__} is built from; "
            "name the model's own folder (of a pipeline: its subfolder)"
        )
    # diffusers drops what a constructor does not know without a word.
    known = set(inspect.signature(model_class).parameters)
    if unknown := sorted(set(config_overrides) - known):
        raise PlanError(
            f"{model_class.__name__} has no option {', '.join(map(repr, unknown))}; "
            f"config_overrides may name {', '.join(sorted(known))}"
        )
    config = model_class.load_config(folder)
    if "quantization_config" in config:
        raise CheckpointError(
            f"{folder} holds a quantized model: its tensors do not fit a plain {model_class.__name__}; "
            "load it with from_pretrained and apply techniques to that"
        )
    model = model_class.from_config(config, **config_overrides)
    model.register_to_config(_name_or_path=str(folder))
    built: nn.Module = model.eval()
    return built


@hookimpl
def hookcore_loading_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype] | None:  # noqa: ARG001
    """Read `_keep_in_fp32_modules`: `from_pretrained` compares them with whole components of an FQN."""
    model_mixin = _model_mixin()
    if model_mixin is None or not isinstance(model, model_mixin):
        return None
    kept = _collect([model], "_keep_in_fp32_modules")
    return {rf"(^|\.){re.escape(name)}(\.|$)": torch.float32 for name in kept}


def _model_mixin() -> Any:
    """The base of all models of diffusers, or None while nobody has imported it."""
    return getattr(sys.modules.get("diffusers.models.modeling_utils"), "ModelMixin", None)


def _coding_methods(model: nn.Module) -> Iterator[str]:
    """The entries of an autoencoder: pipelines call these and never `forward`."""
    return (name for name in ("encode", "decode") if callable(getattr(type(model), name, None)))


def _collect(models: list[nn.Module], *attributes: str) -> list[str]:
    """The distinct strings in class attributes that hold one, several or None."""
    found: dict[str, None] = {}
    for model in models:
        for attribute in attributes:
            declared = getattr(model, attribute, None) or ()
            found.update(dict.fromkeys((declared,) if isinstance(declared, str) else declared))
    return list(found)


def _read_for_their_dtype(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The layers, as patterns, to whose weight's dtype a model converts what it then gives them.

    Outside of the layer's call that would be the dtype in which the weight is stored. Kandinsky's UNets and
    IP adapters have them.
    """
    for fqn, module in modules.items():
        if type(module).__name__ == "ImageProjection":
            yield rf"^{re.escape(fqn)}\.image_embeds$"


def _group_modules(model: nn.Module) -> list[str]:
    """The children that hold the blocks; a config may leave some of those that a class names out."""
    children = dict(model.named_children())
    return [name for name in getattr(model, "_group_offload_block_modules", None) or () if name in children]


def _remedy(fqn: str, name: str, hook: Any, caching: list[str]) -> str:
    """Return how to get rid of one hook; `caching` are the FQNs of models on which a cache was enabled."""
    if name == "layerwise_casting":
        return (
            "load the model again without enable_layerwise_casting(): diffusers cannot take it off or give "
            "back the weights it has rounded"
        )
    if name == "group_offloading" and hook.config.offload_to_disk_path:
        return (
            "load the model again without enable_group_offload(): its weights are only in the files in "
            f"{hook.config.offload_to_disk_path}, and removing the hook would leave memory without data"
        )
    if type(hook).__module__.endswith(("_cache", "pyramid_attention_broadcast")):
        for root in caching:
            if not root or fqn == root or fqn.startswith(f"{root}."):
                return f"call `{f'model.get_submodule({root!r})' if root else 'model'}.disable_cache()`"
    registry = "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)"
    return f"call `{registry}.remove_hook({name!r}, recurse=True)`"
