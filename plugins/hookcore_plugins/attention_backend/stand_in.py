"""Has a library's attention call torch's function during hooked calls, whatever it was told to use."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    from torch import nn


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


class StandingIn:
    """Puts a stand-in into a module for its calls, as often as calls overlap."""

    def __init__(self, what: StandIn) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._calls = 0
        self._original: Any = None

    def begin(self, module: nn.Module) -> None:
        """Puts it there, at the first of overlapping calls."""
        with self._lock:
            if not self._calls:
                held = self._held(module)
                self._original = held[self._what.part]
                changed = copy.copy(self._original)
                # Not setattr: transformers' setter changes what the config shares with its parts.
                vars(changed)[self._what.attribute] = self._what.value
                held[self._what.part] = changed
            self._calls += 1

    def end(self, module: nn.Module) -> None:
        """Takes it away, at the end of the last."""
        with self._lock:
            self._calls -= 1
            if not self._calls:
                self._held(module)[self._what.part] = self._original
                self._original = None

    def _held(self, module: nn.Module) -> dict[str, Any]:
        return module._modules if self._what.part in module._modules else vars(module)
