"""Which modules are compiled, and which of them can share compiled code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookcore import Skipped
from hookcore.memory import find_blocks

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from torch import nn

    from hookcore import Component


def repeated_blocks(component: Component) -> tuple[list[str], list[Skipped]]:
    """Find a model's repeated blocks: those that its library declares, else those that its structure shows.

    Of nested ones the outermost are taken.

    Returns:
        Their FQNs, and what cannot be compiled by itself, with the reason.
    """
    conventions = component.conventions
    found = _of_classes(component, conventions.repeated_classes) or _of_classes(
        component, conventions.block_classes
    )
    if not found:
        found = [fqn for run in find_blocks(component) for fqn in run]
    blocks: list[str] = []
    skipped: list[Skipped] = []
    for fqn in _outermost(component, found):
        outside = _shared_with(component, fqn)
        if outside is None:
            blocks.append(fqn)
        else:
            skipped.append(Skipped(fqn, f"a module in it also stands at {outside!r}, which is not compiled"))
    return blocks, skipped


def code_key(module: nn.Module) -> Hashable:
    """Return what modules have in common that can run the same compiled code.

    torch.compile takes the shapes of weights as given. Blocks of one class in other sizes would count as
    recompiles of one code, of which torch allows a few and then silently compiles no more.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return type(module), tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)


def _of_classes(component: Component, names: Iterable[str]) -> list[str]:
    """The modules of these classes."""
    wanted = set(names)
    return [fqn for fqn, module in component.modules.items() if fqn and type(module).__name__ in wanted]


def _outermost(component: Component, fqns: Iterable[str]) -> list[str]:
    """Those that are in no other of them."""
    chosen = {component.modules[fqn]: fqn for fqn in fqns}
    inside = {below for module in chosen for below in module.modules() if below is not module}
    return [fqn for module, fqn in chosen.items() if module not in inside]


def _shared_with(component: Component, fqn: str) -> str | None:
    """Return where else a module stands that is in a block, or None if all stand in it alone."""
    block = component.modules[fqn]
    places = tuple(f"{name}." for name in component.fqns[block])
    for module in block.modules():
        if module is not block:
            for name in component.fqns[module]:
                if not name.startswith(places):
                    return name
    return None
