"""Every exception and warning that hookcore raises.

An error says what failed, at which module (its fully qualified name, FQN), what was found and what was
expected, then the remedy. It is raised before the model is touched wherever that is possible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hookcore.technique import Binding


class HookcoreError(Exception):
    """Base of all errors of hookcore."""


class PlanError(HookcoreError, ValueError):
    """Techniques cannot be put on a target as asked; nothing was touched."""


class ConflictError(PlanError):
    """Two bindings need the same thing of the same tensor or entry.

    Attributes:
        first: The binding that holds it: of an earlier technique, or already on the model. None where
            it is held by something that is no binding (a foreign hook).
        second: The binding that wanted it too. None where a whole technique was refused.
    """

    def __init__(self, message: str, *, first: Binding | None = None, second: Binding | None = None) -> None:
        super().__init__(message)
        self.first = first
        self.second = second


class OrderError(PlanError):
    """The order asked for by phases, `before` and `after` contradicts itself."""


class UnsupportedModelError(HookcoreError, TypeError):
    """The target, or a module in it, is of a kind that cannot be hooked."""


class PluginError(HookcoreError):
    """A plugin is unknown, blocked, broken, or does not keep to a hookspec."""


class LossyRemovalError(HookcoreError):
    """Removing would leave weights other than the original ones; nothing was removed."""


class CheckpointError(HookcoreError):
    """A checkpoint on disk is missing, damaged, changed, or does not fit the model."""


class BudgetError(HookcoreError, ValueError):
    """A memory budget is too small for the least that has to be in memory at once."""


class ConcurrentCallError(HookcoreError, RuntimeError):
    """Two threads called one component at once while a technique moves or casts its weights."""


class HookcoreWarning(UserWarning):
    """Something works, but otherwise than a user may expect."""
