"""Has a library's attention call torch's function during hooked calls, whatever it was told to use."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_ABSENT: Any = object()


@frozen
class StandIn:
    """What is to be different in a part of a module while it is called.

    A copy of the part takes its place with one attribute changed, so that whoever shares the part (a config
    of a whole model, a processor of several) sees nothing of it.

    Attributes:
        part: Name of the module's attribute that holds the part.
        attribute: Name of the part's attribute.
        value: What it is during calls.
    """

    part: str
    attribute: str
    value: Any

    def of(self, module: nn.Module) -> Any:
        """The changed copy for a module."""
        changed = copy.copy(_holder(module, self.part)[self.part])
        # Not setattr: transformers' setter changes what the config shares with its parts.
        vars(changed)[self.attribute] = self.value
        return changed


class StandingIn:
    """Puts something in the place of a module's part for its calls, as often as calls overlap.

    Args:
        part: Name of the attribute; it need not be there before.
        make: What takes its place, made from the module.
    """

    def __init__(self, part: str, make: Callable[[nn.Module], Any]) -> None:
        self._part = part
        self._make = make
        self._lock = threading.Lock()
        self._calls = 0
        self._original: Any = _ABSENT

    def begin(self, module: nn.Module) -> None:
        """Puts it there, at the first of overlapping calls."""
        with self._lock:
            if not self._calls:
                made = self._make(module)
                holder = _holder(module, self._part)
                self._original = holder.get(self._part, _ABSENT)
                holder[self._part] = made
            self._calls += 1

    def end(self, module: nn.Module) -> None:
        """Takes it away, at the end of the last."""
        with self._lock:
            self._calls -= 1
            if not self._calls:
                holder = _holder(module, self._part)
                if self._original is _ABSENT:
                    del holder[self._part]
                else:
                    holder[self._part] = self._original
                self._original = _ABSENT


def _holder(module: nn.Module, part: str) -> dict[str, Any]:
    return module._modules if part in module._modules else vars(module)
