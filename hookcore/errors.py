"""Every exception and warning that hookcore raises.

An error says what failed, at which module (its fully qualified name, FQN), what was found and what was
expected, then the remedy. It is raised before the model is touched wherever that is possible.
"""

from __future__ import annotations

from attrs import frozen


@frozen
class HookSite:
    """A technique's hook and where it stands, for errors.

    Attributes:
        technique: The technique's name.
        component: The component's name.
        fqn: The module's FQN in the component.
        entry: The method that is hooked.
    """

    technique: str
    component: str
    fqn: str
    entry: str


class HookcoreError(Exception):
    """Base of all errors of hookcore."""


class PlanError(HookcoreError, ValueError):
    """Techniques cannot be put on a target as asked; nothing was touched."""


class ConflictError(PlanError):
    """Two hooks need the same thing of the same tensor or entry.

    Attributes:
        first: The hook that holds it: of an earlier technique, or already on the model. None where
            something else holds it (a foreign hook).
        second: The hook that wanted it too. None where a whole technique was refused.
    """

    def __init__(
        self, message: str, *, first: HookSite | None = None, second: HookSite | None = None
    ) -> None:
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


_ORIGIN = "hookcore: raised in "


def note_origin(error: BaseException, origin: str | None) -> None:
    """Add a note to an error that came out of a plugin, which says whose it is.

    The first note stands: an error that goes on through other methods is not theirs. What a plugin refuses
    with an error of hookcore's says all by itself, and an interrupt is nobody's.

    Args:
        error: The error.
        origin: Method, technique and module: `"CastHook.attach() of casting at 'blocks.0'"`; None where that
            is not known.
    """
    is_refusal = isinstance(error, HookcoreError) and not isinstance(error, PluginError)
    if origin is not None and isinstance(error, Exception) and not is_refusal and not has_origin(error):
        error.add_note(_ORIGIN + origin)


def has_origin(error: BaseException) -> bool:
    """Return whether `note_origin` has said of an error whose it is."""
    return _origin_in(error) is not None


def describe_error(error: BaseException) -> str:
    """An error in one line, with whose it is, for a note on another one."""
    origin = _origin_in(error)
    return repr(error) if origin is None else f"{error!r}, {origin.removeprefix('hookcore: ')}"


def _origin_in(error: BaseException) -> str | None:
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(_ORIGIN)), None)
