"""Calls of an autoencoder's methods with images that it takes, to follow them when nothing was called yet."""

from __future__ import annotations

import inspect
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hookcore_plugins.tiling.discovery import SPATIAL
from hookcore_plugins.tiling.stage_trace import NotTileableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from hookcore_plugins.tiling.discovery import Parts
    from hookcore_plugins.tiling.grid import Size

_CHANNELS = {"encode": ("in_channels",), "decode": ("latent_channels", "z_dim", "z_channels", "latent_dim")}
"""Names in a configuration for how many channels the images of a method have."""

_FRAMES = {"encode": (1, 9, 17), "decode": (1, 2, 3)}
_STEPS = ("temb", "timestep")
"""Parameters of a decoder that denoises: the step, one number for each image."""


def example_calls(module: nn.Module, parts: Parts) -> Iterator[Callable[[nn.Module, Size], Any]]:
    """Call of a method, the likeliest to succeed first.

    Args:
        module: The autoencoder.
        parts: What of it is hooked.

    Raises:
        NotTileableError: The method has a parameter without a default of which nothing is known.
    """
    _, *others = inspect.signature(getattr(module, parts.method)).parameters.values()
    known: dict[str, Any] = {}
    for it in others:
        if it.default is it.empty and it.kind not in (it.VAR_POSITIONAL, it.VAR_KEYWORD):
            if it.name != "num_frames":
                raise NotTileableError(f"its {parts.method}() needs {it.name!r}, of which nothing is known")
            known[it.name] = 1
    steps = [{it.name: 0} for it in others if it.name in _STEPS]
    spine = module.get_submodule(parts.spine)
    first = next(it for it in spine.modules() if isinstance(it, SPATIAL))
    is_video = len(first.kernel_size) == 3
    frames = [(it,) for it in _FRAMES[parts.method]] if is_video else [()]
    channels = _channels(module, first.in_channels, parts.method)
    for step, own, count in itertools.product([{}, *steps], frames, channels):
        yield partial(_call, method=parts.method, lead=(1, count, *own), known=known, steps=step)


def _channels(module: nn.Module, first: int, method: str) -> list[int]:
    """Return how many channels images may have, the likeliest first.

    Args:
        module: The autoencoder.
        first: How many the first convolution of its encoder or decoder takes.
        method: "encode" or "decode".
    """
    config: Any = getattr(module, "config", None)
    named = [config.get(name) for name in _CHANNELS[method]] if hasattr(config, "get") else []
    before = [
        it.in_channels
        for name, child in module.named_children()
        if "post_quant" in name and method == "decode"
        for it in child.modules()
        if isinstance(it, SPATIAL)
    ]
    likely = [*before, *named, *([3] if method == "encode" else []), first]
    return list(dict.fromkeys(it for it in likely if isinstance(it, int)))


def _call(
    model: nn.Module,
    size: Size,
    *,
    method: str,
    lead: tuple[int, ...],
    known: dict[str, Any],
    steps: dict[str, Any],
) -> Any:
    given = {name: torch.zeros(lead[0]) for name in steps}
    return getattr(model, method)(torch.empty(*lead, *size), **known, **given)
