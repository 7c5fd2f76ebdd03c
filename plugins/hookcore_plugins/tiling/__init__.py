"""Tiling: an autoencoder encodes or decodes one tile of the image after the other.

`technique` has the options; `discovery` finds the modules to hook; `stage_trace` records what a pass does;
`partial_forward` runs the part of a pass between two stages; `split_point` chooses which part sees the whole
image; `tiler` runs the passes in order, `layer_by_layer` one stage after the other; `crop` calls the model
with part of an image; `grid` places tiles and blends them; `samples` and `norm_statistics` give group norms
the statistics of the whole image; `attention_masks` makes masks over all pixels a few rows at a time.
"""

from __future__ import annotations

from hookcore import hookimpl
from hookcore_plugins.tiling.technique import Tiling

__all__ = ["Tiling", "hookcore_register_techniques"]


@hookimpl
def hookcore_register_techniques() -> list[type[Tiling]]:
    """Brings `Tiling`."""
    return [Tiling]
