"""Says so when a component of a target was replaced, since techniques are on the module, not on its name."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

from hookcore.hook import Hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn


class Names:
    """What an object's attributes were when it was opened: its components, by name. It keeps none alive."""

    def __init__(self, target: Any, modules: Mapping[str, nn.Module]) -> None:
        self._target = weakref.ref(target)
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}

    def replaced(self) -> list[tuple[str, nn.Module]]:
        """The names that are of other modules now, each with the one that it was of; told once.

        A name that is of nothing now was not replaced: its component was let go, to free its memory.
        """
        target = self._target()
        found = []
        for name, reference in list(self._modules.items()):
            module = reference()
            now = getattr(target, name, module)
            if now is not module:
                del self._modules[name]
                if module is not None and now is not None:
                    found.append((name, module))
        return found

    def __str__(self) -> str:
        return type(self._target()).__name__


class ReplacedHook(Hook):
    """Looks, when one component is called, whether others have been replaced that techniques are on.

    Args:
        names: What to look at.
        techniques_on: Names of the techniques on a module.
    """

    def __init__(self, names: Iterable[Names], techniques_on: Callable[[nn.Module], Iterable[str]]) -> None:
        self._names = tuple(names)
        self._techniques_on = techniques_on

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look, and warn."""
        for names in self._names:
            for name, replaced in names.replaced():
                if techniques := ", ".join(self._techniques_on(replaced)):
                    warnings.warn(
                        f"{names}.{name} is another module now than the one with {techniques} on it, and has "
                        "no technique. To have them on it, call remove() on the handle, or hookcore.remove() "
                        "on the model that was there, and then hookcore.apply() again",
                        stacklevel=2,
                    )
