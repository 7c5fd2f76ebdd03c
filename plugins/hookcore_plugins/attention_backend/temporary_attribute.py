"""Replaces an attribute of a module during its calls."""

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
class ChangedPart:
    """A copy of an object that a module holds, with one attribute changed.

    A copy, because others may share the object: a config of a whole model, a processor of several modules.

    Attributes:
        part: Name of the module's attribute that holds the object.
        attribute: Name of the object's attribute.
        value: The changed value.
    """

    part: str
    attribute: str
    value: Any

    def make(self, module: nn.Module) -> Any:
        """Return the changed copy of the object that a module holds."""
        changed = copy.copy(_holder(module, self.part)[self.part])
        # Not setattr: transformers' setter changes what the config shares with its parts.
        vars(changed)[self.attribute] = self.value
        return changed


class TemporaryAttribute:
    """Replaces an attribute of a module from the first of overlapping calls to the end of the last.

    Args:
        name: Name of the attribute; it may be absent before.
        make: Makes the temporary value from the module.
    """

    def __init__(self, name: str, make: Callable[[nn.Module], Any]) -> None:
        self._name = name
        self._make = make
        self._lock = threading.Lock()
        self._calls = set[object]()
        self._before: tuple[Any] | None = None  # the value to put back, while it is replaced

    def begin(self, module: nn.Module, call: object) -> None:
        """Replace the attribute unless it is replaced already.

        Args:
            module: The module.
            call: An object of the call's own, which `end` is given too.
        """
        with self._lock:
            if self._before is None:
                made = self._make(module)
                holder = _holder(module, self._name)
                self._before = (holder.get(self._name, _ABSENT),)
                holder[self._name] = made
            self._calls.add(call)

    def end(self, module: nn.Module, call: object) -> None:
        """Put the attribute back when no other call is under way; right also if `begin` was interrupted."""
        with self._lock:
            self._calls.discard(call)
            if self._before is None or self._calls:
                return
            holder = _holder(module, self._name)
            (before,) = self._before
            if before is _ABSENT:
                holder.pop(self._name, None)
            else:
                holder[self._name] = before
            self._before = None


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    return module._modules if name in module._modules else vars(module)
