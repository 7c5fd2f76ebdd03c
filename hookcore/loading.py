"""Makes a model from a checkpoint without ever holding it whole."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from hookcore.apply import apply, as_techniques
from hookcore.errors import UnsupportedModelError
from hookcore.memory.files.checkpoint import Checkpoint
from hookcore.memory.files.checkpoint_names import find_entries
from hookcore.memory.files.mapped_file import map_checkpoint
from hookcore.memory.files.origin import Origin, set_origin
from hookcore.plugins import plugins
from hookcore.target import Component
from hookcore.units import parse_dtype

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from hookcore.technique import Technique

ModelT = TypeVar("ModelT", bound=nn.Module)


def load(
    model_class: type[ModelT],
    path: str | os.PathLike[str],
    techniques: Iterable[Technique | str] = (),
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **config_overrides: Any,
) -> ModelT:
    """Make a model from its config and bind its weights to the checkpoint's files, with techniques on it.

    Weights are mapped, not read: a technique that streams them (`DiskOffload`) reads them as they are used,
    and without one the system does. The model is in eval mode. `hookcore.remove(model)` takes off what was
    put on it.

    Args:
        model_class: A diffusers or transformers model class, or any `nn.Module` class.
        path: A folder as `save_pretrained` writes it, or a safetensors file or index.
        techniques: What to put on the model. Those that read from a checkpoint and name none are given this.
        subfolder: The model's folder inside `path`, e.g. `"transformer"` of a pipeline.
        torch_dtype: Dtype to compute in; floating-point weights are converted, save those that the model's
            library keeps in another. None keeps what is stored.
        **config_overrides: Replace values in the model's config.

    Raises:
        CheckpointError: The checkpoint is damaged, or is not one of this model: missing and unexpected keys
            are listed.
        UnsupportedModelError: No plugin knows how to make such a model from a config.
        PlanError: The techniques do not fit the model.
    """
    dtype = None if torch_dtype is None else parse_dtype(torch_dtype)
    chosen = as_techniques(techniques)
    checkpoint = Checkpoint.open(path, subfolder=subfolder)
    with _parameters_without_memory():
        model = plugins().build_model(model_class, checkpoint.root, config_overrides)
    if not isinstance(model, model_class):
        raise UnsupportedModelError(
            f"no plugin can make a {model_class.__qualname__} from the config in '{checkpoint.root}' "
            "(`hookcore plugins` lists them). Make the model yourself and use hookcore.apply"
        )
    with torch.inference_mode(False):  # parameters outlive the mode
        _bind(model, checkpoint, dtype, streamed=any(technique.materializes for technique in chosen))
    model.eval()
    given = Path(path, subfolder or "")
    apply(model, [_with_checkpoint(technique, given) for technique in chosen])
    return model


def _with_checkpoint(technique: Technique, path: Path) -> Technique:
    """The same technique, told where the weights are if it reads them and nobody told it."""
    if technique.materializes and getattr(technique, "checkpoint", None) is None:
        return attrs.evolve(technique, checkpoint=path)  # type: ignore[call-arg]
    return technique


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Put parameters that this thread registers on the meta device, each as it is registered.

    Buffers stay real: models compute them when they are made, and nobody stores all of them.
    """
    thread = threading.get_ident()
    made = WeakTensorKeyDictionary()  # a parameter that is registered twice is tied, and stays so

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return parameter
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        return made[parameter]

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _bind(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None, *, streamed: bool) -> None:
    """Give a model made without memory the checkpoint's tensors."""
    entries = find_entries(Component("", model, plugins().describe), checkpoint)
    mappings = map_checkpoint(checkpoint)
    exceptions = {} if dtype is None else plugins().loading_dtypes(model, dtype)
    for slot, entry in entries.items():
        wanted = entry.dtype
        if dtype is not None and entry.dtype.is_floating_point:
            kept = (
                it for pattern, it in exceptions.items() if any(re.search(pattern, fqn) for fqn in slot.fqns)
            )
            wanted = next(kept, dtype)
        origin = Origin.of_entry(checkpoint, entry, mappings[entry.path], wanted)
        if slot.is_buffer:
            buffer = origin.raw.to(wanted, copy=True)
            for module, name in slot.owners:
                module._buffers[name] = buffer
            continue
        data = origin.raw if streamed else origin.raw.to(wanted)
        parameter = nn.Parameter(data, requires_grad=slot.tensors[0].requires_grad)
        for module, name in slot.owners:
            module._parameters[name] = parameter
        if streamed:
            set_origin(parameter, origin)
