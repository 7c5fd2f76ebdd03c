"""Notices when parameters or modules are added or replaced, at no cost to a call that meets none."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch.nn.modules import module as torch_module

from hookcore.hook import Hook
from hookcore.target import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


class Structure:
    """What the tree below a module consists of when this is made: every module and parameter, by FQN."""

    def __init__(self, module: nn.Module) -> None:
        _listen()
        self._module = module
        self._known = _parts(module)
        self._modules = {id(part) for _, part in self._known}
        self._touched = False
        with _LOCK:
            _STRUCTURES.add(self)

    def note(self, module: nn.Module) -> None:
        """Note that a parameter or a module was registered in a module of any tree."""
        self._touched |= id(module) in self._modules

    def mark_changed(self) -> None:
        """Make the next look find a change."""
        self._known = []
        self._touched = True

    def has_changed(self) -> bool:
        """Return whether the tree is another one now. Looks only if anything was registered in it."""
        if not self._touched:
            return False
        now = _parts(self._module)
        if len(now) != len(self._known) or any(
            name != known_name or found is not known
            for (name, found), (known_name, known) in zip(now, self._known, strict=True)
        ):
            return True
        self._touched = False
        return False


_STRUCTURES: weakref.WeakSet[Structure] = weakref.WeakSet()
_LOCK = threading.Lock()
_is_listening = False


def _listen() -> None:
    """Register torch's callback for registrations, which are rare and cheap to note."""
    global _is_listening  # noqa: PLW0603 -- torch's hooks are of the process, too
    if not _is_listening:
        torch_module.register_module_parameter_registration_hook(_note)
        torch_module.register_module_module_registration_hook(_note)
        _is_listening = True


def _note(module: nn.Module, *_: object) -> None:
    with _LOCK:
        for structure in _STRUCTURES:
            structure.note(module)


def _parts(module: nn.Module) -> list[tuple[str, object]]:
    parts: list[tuple[str, object]] = []
    for place in walk(module):
        parts.append(place)
        own: dict[str, Any] = place[1]._parameters
        parts += dict.items(own)  # through dict, so that it doesn't count as a read
    return parts


class ReplanHook(Hook):
    """Stands outermost at a component's entries and has it planned anew when its structure has changed.

    LoRA loading, `load_state_dict(assign=True)` and assigning a parameter or module are such changes.
    """

    def __init__(self, entry: str, structures: Sequence[Structure], replan: Callable[[], bool]) -> None:
        self._entry = entry
        self._structures = structures
        self._replan = replan

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call on, through new hooks if there had to be new ones."""
        for structure in self._structures:
            # While an outer call is under way, nothing is planned: then at the next call.
            if structure.has_changed() and self._replan():
                return getattr(module, self._entry)(*args, **kwargs)
        return call(*args, **kwargs)
