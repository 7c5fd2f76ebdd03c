"""What an autoencoder consists of, as far as tiling has to know, found from its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen
from torch import nn

from hookcore import PlanError

if TYPE_CHECKING:
    from hookcore import Component

CLEAR = "_clear_conv_cache"
"""A method that has modules forget earlier frames, where they keep them themselves."""

CODING = {"encode": "encoder", "decode": "decoder"}
"""The methods that are tiled, each with the name of the module that does the work."""

SPATIAL = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POSITIONS = ("pos_embed", "position_embedding", "positional_embedding")


@frozen
class Parts:
    """What is hooked for `encode` or for `decode`.

    Attributes:
        method: Which of the two.
        point: FQN and entry of what is called once for each tile: outside of loops over frames with their
            caches, inside of what makes a distribution of the latents.
        spine: FQN of the encoder or decoder.
        stages: FQNs of its children and of what blocks among them consist of, elements of lists singly.
    """

    method: str
    point: tuple[str, str]
    spine: str
    stages: tuple[str, ...]


def why_not(component: Component) -> str | None:
    """Return why a component cannot be tiled at all, as a phrase for people; None if it can."""
    module = component.module
    if not all(callable(getattr(module, method, None)) for method in CODING):
        return "it is no autoencoder: it has no encode() and decode()"
    for method, name in CODING.items():
        spine = getattr(module, name, None)
        if not isinstance(spine, nn.Module):
            return f"its {method}() does not go through a module {name!r}, so that tiles of it say nothing"
        if not any(isinstance(part, SPATIAL) for part in spine.modules()):
            return f"its {name} has no convolution over height and width that could be cut into tiles"
        for tensor, _ in (*spine.named_parameters(), *spine.named_buffers()):
            if any(word in tensor for word in _POSITIONS):
                return f"its {name} adds embeddings of positions ({tensor!r}), so a tile passes for the whole"
    return None


def find_parts(component: Component) -> list[Parts]:
    """Find what there is to hook.

    Raises:
        PlanError: The component cannot be tiled, or tiles its images itself.
    """
    label = component.label("")
    if reason := why_not(component):
        raise PlanError(f"{label!r} cannot be tiled: {reason}. Leave it out")
    check_not_tiling(component.module, label)
    return [_parts(component, method, spine) for method, spine in CODING.items()]


def check_not_tiling(module: nn.Module, label: str) -> None:
    """Refuse an autoencoder whose own tiling is on.

    Raises:
        PlanError: It is.
    """
    if getattr(module, "use_tiling", False) is True:
        raise PlanError(
            f"{label!r} tiles its images itself. Call `model.disable_tiling()`, or take this tiling off"
        )


def _parts(component: Component, method: str, name: str) -> Parts:
    spine = component.fqns[getattr(component.module, name)][0]
    inner = f"_{method}"
    if method == "decode" and callable(getattr(component.module, CLEAR, None)):
        inner = method  # only this clears what modules keep of earlier frames
    point = ("", inner) if callable(getattr(component.module, inner, None)) else (spine, "forward")
    return Parts(method, point, spine, tuple(_stages(component, spine)))


def _stages(component: Component, fqn: str) -> list[str]:
    found = []
    for child in component.modules[fqn].children():
        for part in list(child) if isinstance(child, nn.ModuleList) else [child]:
            if part is None:  # a block without attention, say
                continue
            stage = component.fqns[part][0]
            found.append(stage)
            if isinstance(part, nn.Sequential) or any(
                isinstance(it, nn.ModuleList) for it in part.children()
            ):
                found += _stages(component, stage)
    return list(dict.fromkeys(found))
