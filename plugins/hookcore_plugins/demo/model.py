"""Builds the model that the demo runs: a real diffusers transformer with seeded random weights."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen

from hookcore import format_bytes, parse_dtype
from hookcore_plugins.demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import nn

_SEED = 0
_LAYOUT = 1
"""Version of what the seed leads to: a change of it has cached models built anew."""

_SMALLEST = 8 * 1024**2
_SHARDS = 6
_HEAD = 128  # width of an attention head
_ROPE = (16, 56, 56)  # how Flux divides it between image index, row and column
_POOLED = 256
_IMAGE_SIDE = {"cpu": 12}
_ACCELERATOR_IMAGE_SIDE = 64
_TEXT_TOKENS_PER_SIDE = 4

SMALLER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float8_e4m3fn}
"""In which dtype of half the bytes weights of a dtype are stored."""


@frozen
class DemoModel:
    """What is to be built.

    Attributes:
        family: "flux" or "sd3".
        nbytes: About how many bytes of weights.
        dtype: Name of the dtype to compute in.
    """

    family: str
    nbytes: int
    dtype: str

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of the second checkpoint, of half the bytes."""
        return SMALLER[parse_dtype(self.dtype)]

    @property
    def model_class(self) -> Any:
        """The diffusers class; imports diffusers."""
        name = {"flux": "FluxTransformer2DModel", "sd3": "SD3Transformer2DModel"}[self.family]
        return getattr(import_module("diffusers"), name)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the class. Width and depth grow together, so that no layer is a large part of it.

        Raises:
            DemoError: So small a model cannot be built.
        """
        if self.nbytes < _SMALLEST:
            raise DemoError(
                f"--size is {format_bytes(self.nbytes)}; the smallest model is {format_bytes(_SMALLEST)}"
            )
        parameters = self.nbytes / parse_dtype(self.dtype).itemsize
        heads = max(1, round(math.sqrt(parameters / 231) / _HEAD))
        width = heads * _HEAD
        common = {
            "attention_head_dim": _HEAD,
            "num_attention_heads": heads,
            "joint_attention_dim": width,
            "pooled_projection_dim": _POOLED,
        }
        # In units of width^2: a double block has 36, a single one 15, all that is outside of blocks 5.
        units = parameters / width**2 - 5
        if self.family == "flux":
            double = max(1, round(units / 66))
            single = max(1, round((units - 36 * double) / 15))
            layers = {"num_layers": double, "num_single_layers": single, "axes_dims_rope": _ROPE}
            return common | layers | {"in_channels": 64, "guidance_embeds": False}
        # The last block of SD3 lacks 13 of the 36.
        return common | {
            "num_layers": max(2, round((units + 13) / 36)),
            "caption_projection_dim": width,
            "in_channels": 16,
            "patch_size": 2,
            "sample_size": 2 * _ACCELERATOR_IMAGE_SIDE,
            "pos_embed_max_size": _ACCELERATOR_IMAGE_SIDE,
        }

    @property
    def smallest(self) -> DemoModel:
        """The smallest model of the same family and dtype."""
        return evolve(self, nbytes=_SMALLEST)

    @property
    def key(self) -> str:
        """Name of the folder: differs whenever a byte of the weights would."""
        described = json.dumps([_LAYOUT, _SEED, _SHARDS, self.config], sort_keys=True)
        return f"demo-{self.family}-{self.dtype}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"

    def start(self, device: torch.device) -> torch.Tensor:
        """Noise to begin with, the same on every device, in float32."""
        side = self._side(device)
        shape = (1, side * side, 64) if self.family == "flux" else (1, 16, 2 * side, 2 * side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED)).to(device)

    def conditions(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return what the model is given besides the latents and the time: a random text, and positions."""
        dtype = parse_dtype(self.dtype)
        generator = torch.Generator().manual_seed(_SEED + 1)
        side = self._side(device)
        text = _TEXT_TOKENS_PER_SIDE * side
        width = self.config["joint_attention_dim"]
        made = {
            "encoder_hidden_states": torch.randn(1, text, width, generator=generator).to(dtype),
            "pooled_projections": torch.randn(1, _POOLED, generator=generator).to(dtype),
        }
        if self.family == "flux":
            made["txt_ids"] = torch.zeros(text, 3)
            made["img_ids"] = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(side))] * 2)
        return {name: tensor.to(device) for name, tensor in made.items()}

    def _side(self, device: torch.device) -> int:
        """Tokens along an edge of the image: as many as make a step take about 3 s for 2 GiB on 2 cores."""
        return _IMAGE_SIDE.get(device.type, _ACCELERATOR_IMAGE_SIDE)


@frozen
class DemoCheckpoints:
    """Where the built model lies.

    Attributes:
        full: Folder of the weights in the dtype to compute in.
        small: Folder of the same weights, rounded to the storage dtype.
    """

    full: Path
    small: Path


def disk_needed(model: DemoModel) -> int:
    """About how many bytes both checkpoints will take together."""
    return model.nbytes * 3 // 2


def disk_taken(checkpoints: DemoCheckpoints) -> int:
    """Bytes that both checkpoints take together."""
    folders = (checkpoints.full, checkpoints.small)
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


def require_free(folder: Path, nbytes: int, what: str) -> None:
    """Check the free space on a folder's disk.

    Raises:
        DemoError: There is less.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes * 1.05:
        raise DemoError(
            f"{what} takes {format_bytes(nbytes)} in '{folder}', where {format_bytes(free)} are free. "
            "Name another folder with --cache, or a smaller --size"
        )


def build(model: DemoModel, cache: Path, progress: Callable[[int], object]) -> DemoCheckpoints:
    """Build and saves the model unless the cache has it.

    It is made shard by shard, so that it takes the memory of one; and under another name until it is whole,
    so that a run that was aborted leaves nothing that looks finished.

    Args:
        model: What to build.
        cache: The folder in which it is kept.
        progress: Is told each number of bytes that were written.

    Raises:
        DemoError: The disk is too small.
    """
    folder = cache / model.key
    checkpoints = DemoCheckpoints(folder / "full", folder / "small")
    if folder.exists():
        return checkpoints
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f"{model.key}.part"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    require_free(cache, disk_needed(model), "the model")
    try:
        _save(model, unfinished / "full", unfinished / "small", progress)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return checkpoints


def _save(model: DemoModel, full: Path, small: Path, progress: Callable[[int], object]) -> None:
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    for folder in (full, small):
        folder.mkdir(parents=True)
    with init_empty_weights(include_buffers=False):
        empty: nn.Module = model.model_class(**model.config)
    saved: Any = empty
    dtype = parse_dtype(model.dtype)
    shards = list(_shards(empty.state_dict(), dtype.itemsize))
    generator = torch.Generator().manual_seed(_SEED)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        tensors = {name: _values(name, tensor, dtype, generator) for name, tensor in shard.items()}
        save_file(tensors, full / file, metadata={"format": "pt"})
        rounded = {name: tensor.to(model.storage_dtype) for name, tensor in tensors.items()}
        save_file(rounded, small / file, metadata={"format": "pt"})
        progress(sum(tensor.nbytes for tensor in [*tensors.values(), *rounded.values()]))
    for folder in (full, small):
        saved.save_config(folder)
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(state: Mapping[str, torch.Tensor], itemsize: int) -> Iterator[dict[str, torch.Tensor]]:
    """Split a state dict, in its order, into shards of about equal size."""
    quota = sum(tensor.numel() for tensor in state.values()) * itemsize / _SHARDS
    shard: dict[str, torch.Tensor] = {}
    filled = 0
    for name, tensor in state.items():
        shard[name] = tensor
        filled += tensor.numel() * itemsize
        if filled >= quota:
            yield shard
            shard, filled = {}, 0
    if shard:
        yield shard


def _values(name: str, tensor: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random weights whose outputs keep the scale of the inputs, as those of a trained model do."""
    if not tensor.is_meta:  # a buffer, which the model has computed
        return tensor.to(dtype)
    values = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim < 2:
        values *= 0.02
        if name.endswith("weight"):  # of a norm
            values += 1
    else:
        # Norms with a layer of their own compute gates. Small gates let a deep model pass its input on;
        # large ones would make it chaotic, and blow up the least rounding.
        gain = 0.3 if "norm" in name else 1.0
        values *= gain / math.sqrt(math.prod(tensor.shape[1:]))
    return values.to(dtype)
