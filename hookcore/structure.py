"""Notices when parameters or modules are added or replaced, at no cost to a call that meets none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.modules import module as torch_module

from hookcore.hook import Hook
from hookcore.target import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


class _Changes:
    """Counts registrations of parameters and modules in this process, while anybody asks."""

    def __init__(self) -> None:
        self.count = 0
        self._listening = False

    def listen(self) -> None:
        """Starts to count. torch calls back at every registration, which is rare and cheap to note."""
        if not self._listening:
            torch_module.register_module_parameter_registration_hook(self._note)
            torch_module.register_module_module_registration_hook(self._note)
            self._listening = True

    def _note(self, *_: object) -> None:
        self.count += 1


CHANGES = _Changes()


class Structure:
    """What the tree below a module consists of when this is made: every module and parameter, by FQN."""

    def __init__(self, module: nn.Module) -> None:
        CHANGES.listen()
        self._module = module
        self._seen = CHANGES.count
        self._known = _parts(module)

    def has_changed(self) -> bool:
        """Whether the tree is another one now. Looks only if anything was registered in this process."""
        count = CHANGES.count
        if self._seen == count:
            return False
        now = _parts(self._module)
        if len(now) != len(self._known) or any(
            name != known_name or found is not known
            for (name, found), (known_name, known) in zip(now, self._known, strict=True)
        ):
            return True
        self._seen = count
        return False


def _parts(module: nn.Module) -> list[tuple[str, object]]:
    parts: list[tuple[str, object]] = []
    for place in walk(module):
        parts.append(place)
        parts += place[1]._parameters.items()
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
        """Calls on, through new hooks if there had to be new ones."""
        for structure in self._structures:
            # While an outer call is under way, nothing is planned: then at the next call.
            if structure.has_changed() and self._replan():
                return getattr(module, self._entry)(*args, **kwargs)
        return call(*args, **kwargs)
