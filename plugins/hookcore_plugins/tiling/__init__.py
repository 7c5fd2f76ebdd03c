"""Tiling: an autoencoder encodes or decodes one tile of the image after the other.

`technique` has the options; `discovery` finds the modules to hook; `tiler` runs the passes of a call.

- Before anything is computed: `stage_trace` follows passes through a copy without data, with
  images found by `example_calls`; `pass_record` notes what stages put out, `dependencies` how far they look.
- During a call: `split_point` chooses which stages see the whole image, `partial_forward` runs the part of a
  pass between two stages, `layer_by_layer` one stage after the other for all tiles.
- `grid` places tiles, `crop` calls the model with a part of an image, `blend` puts outputs together.
- `samples` and `norm_statistics` give group norms the statistics of the whole image; `attention_masks` makes
  masks over all pixels a few rows at a time.
"""

from __future__ import annotations

from hookcore import hookimpl
from hookcore_plugins.tiling.technique import Tiling

__all__ = ["Tiling", "hookcore_register_techniques"]


@hookimpl
def hookcore_register_techniques() -> list[type[Tiling]]:
    """Bring `Tiling`."""
    return [Tiling]
