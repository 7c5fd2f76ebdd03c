"""Tiling: an autoencoder encodes or decodes one tile of the image after the other.

`technique` has the options, `parts` finds what there is to hook, `passes` has the hooks that take a pass
apart in its middle, `course` knows what a pass does, `cuts` chooses where to take it apart, `tiler` runs the
passes in order, `steps` one stage after the other, `calls` makes them with parts of an image, `grid` says
where tiles lie and blends them, `samples` and `statistics` have group norms use the whole image's statistics.
"""

from __future__ import annotations

from hookcore import hookimpl
from hookcore_plugins.tiling.technique import Tiling

__all__ = ["Tiling", "hookcore_register_techniques"]


@hookimpl
def hookcore_register_techniques() -> list[type[Tiling]]:
    """Brings `Tiling`."""
    return [Tiling]
