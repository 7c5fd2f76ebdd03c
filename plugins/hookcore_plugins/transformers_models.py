"""transformers: what its models declare, and how a model is built.

transformers is never imported here: a model of its can only exist when somebody else has imported it.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hookcore import CheckpointError, ModelConventions, PlanError, hookimpl

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from torch import nn

_ENTRY = re.compile(r"encode|decode|get_\w+_features")


@hookimpl
def hookcore_describe_model(model: nn.Module, modules: Mapping[str, nn.Module]) -> ModelConventions | None:
    """Read the class attributes that transformers' own loading reads, from all its models in the tree.

    `generate` is no entry: what it calls is `forward`, once for each step.
    """
    base = _pretrained_model()
    if base is None:
        return None
    declaring = [module for module in modules.values() if isinstance(module, base)]
    if not declaring:
        return None
    kept = _collect(declaring, "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return ModelConventions(
        entries=("forward", *_other_entries(model)) if isinstance(model, base) else ("forward",),
        block_classes=_collect(declaring, "_no_split_modules"),
        keep_dtype_patterns=map(_module_pattern, kept),
        checkpoint_names=partial(_checkpoint_names, model) if isinstance(model, base) else None,
    )


@hookimpl
def hookcore_build_model(
    model_class: Any, folder: Path, config_overrides: Mapping[str, Any]
) -> nn.Module | None:
    """Build a `PreTrainedModel` from its config.json as `from_pretrained` does: in evaluation mode.

    The dtype is the checkpoint's, the attention that which transformers chooses, the generation settings
    those in the folder.

    Raises:
        CheckpointError: The folder has no config, or one of a quantized model.
        PlanError: The model's config takes no such option.
    """
    base = _pretrained_model()
    if base is None or not issubclass(model_class, base):
        return None
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, which {model_class.__name__} is built from; name the model's own "
            "folder (of a pipeline: its subfolder)"
        )
    config, unknown = model_class.config_class.from_pretrained(
        folder, return_unused_kwargs=True, local_files_only=True, **config_overrides
    )
    if unknown:
        raise PlanError(
            f"{type(config).__name__} has no option {', '.join(map(repr, sorted(unknown)))}; "
            "take them out of config_overrides"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{folder} holds a quantized model: its tensors do not fit a plain {model_class.__name__}; "
            "load it with from_pretrained and apply techniques to that"
        )
    config.name_or_path = str(folder)
    # `_from_config` is what `AutoModel.from_config` calls: it also sets the dtype that the model is made in.
    model: Any = model_class._from_config(config)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)
    built: nn.Module = model.eval()
    return built


@hookimpl
def hookcore_loading_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype] | None:
    """Read `_keep_in_fp32_modules`, which is about float16 alone; the strict one is about bfloat16 too."""
    base = _pretrained_model()
    if base is None or not isinstance(model, base):
        return None
    attributes = []
    if dtype is torch.float16:
        attributes.append("_keep_in_fp32_modules")
    if dtype in {torch.float16, torch.bfloat16}:
        attributes.append("_keep_in_fp32_modules_strict")
    return {name.replace("*", ".*"): torch.float32 for name in _collect([model], *attributes)}


def _pretrained_model() -> Any:
    """The base of all models of transformers, or None while nobody has imported it."""
    return getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)


def _other_entries(model: nn.Module) -> Iterator[str]:
    """Methods that users call instead of `forward`: of audio codecs, and of models such as CLIP."""
    names = filter(_ENTRY.fullmatch, dir(type(model)))
    return (name for name in names if callable(getattr(type(model), name)))


def _collect(models: list[nn.Module], *attributes: str) -> list[str]:
    """The distinct strings in attributes that hold some or None; sorted, as transformers makes them sets."""
    return sorted(
        {name for model in models for attribute in attributes for name in getattr(model, attribute) or ()}
    )


def _checkpoint_names(model: Any, keys: Collection[str]) -> dict[str, str]:
    """By which names `from_pretrained` loads tensors.

    Raises:
        CheckpointError: It makes a tensor of several, or lays one out in another way.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # before version 5
        return {}
    conversions = get_model_conversion_mapping(model)
    renamings = [it for it in conversions if isinstance(it, WeightRenaming)]
    converters = [it for it in conversions if isinstance(it, WeightConverter)]
    own = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    names: dict[str, str] = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, converted = key, None
        if converted is not None:
            kind = type(model).__name__
            raise CheckpointError(
                f"{kind}.from_pretrained makes {name!r} of {key!r} and others as it loads, so that it lies "
                "nowhere in the checkpoint as the model has it. Convert it once, and give the new folder: "
                f"{kind}.from_pretrained(folder).save_pretrained(new, save_original_format=False)"
            )
        names[key] = name
    return names


def _module_pattern(name: str) -> str:
    """Turn an entry of `_keep_in_fp32_modules` into a regular expression for module FQNs.

    transformers searches it in tensor FQNs as a regular expression in which `*` means any text. A tensor's
    name at the end ("gate.weight") has to match the module that holds it.
    """
    return re.sub(r"\.(weight|bias)$", r"(\\.\1)?$", name.replace("*", ".*"))
