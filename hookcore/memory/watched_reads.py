"""Watched reads: a module's tensors, with a callback before one is read."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch.compiler import is_compiling

from hookcore.memory.copies import PlacedTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sized

    import torch
    from torch import nn

    from hookcore.memory.grouping import Group

_KINDS = ("_parameters", "_buffers")


class _Looking(threading.local):
    depth = 0


_looking = _Looking()


@contextmanager
def only_looking() -> Iterator[None]:
    """Ignore, on this thread, reads that go through all tensors without using their values."""
    _looking.depth += 1
    try:
        yield
    finally:
        _looking.depth -= 1


class WatchedTensors(PlacedTensors):
    """Stands in for a module's `_parameters` or `_buffers`, and calls back before a tensor is read.

    `nn.Module.__getattr__` reads `_parameters[name]`, so this sees `module.weight` wherever it is
    written: in the module's own forward, or in its parent's. To go through all parameters while a call is
    under way, as many models do in a forward to learn their dtype, is no read: it would bring the whole model
    at once.

    While torch.compile reads a module's code, no read counts either: what a compiled call needs is brought
    for the whole of it, and code that noticed reads would be compiled for each module anew.

    Args:
        original: What it stands in for; up to date again after `give_back`.
        groups: The group of each name that is watched.
        calls: The calls under way.
        before_read: Called before a tensor of a group is handed out that no call holds.
        uses: How many calls hold each group, as far as that is known.
    """

    __slots__ = ("_before_read", "_calls", "_groups", "_uses")

    def __init__(
        self,
        original: dict[str, torch.Tensor | None],
        groups: Mapping[str, Group],
        calls: Sized,
        before_read: Callable[[Group], None],
        uses: Mapping[Group, int],
    ) -> None:
        super().__init__(original)
        self._groups = groups
        self._calls = calls
        self._uses = uses
        self._before_read = before_read

    def __getitem__(self, name: str) -> torch.Tensor | None:
        if not is_compiling() and (group := self._groups.get(name)) is not None and not self._uses.get(group):
            self._before_read(group)
        tensor = dict.__getitem__(self, name)
        return tensor if self._inner is None else self._inner.seen(name, tensor)

    def values(self) -> Any:
        """As `dict.values`."""
        self._before_all()
        return super().values()

    def items(self) -> Any:
        """As `dict.items`."""
        self._before_all()
        return super().items()

    def _before_all(self) -> None:
        if not self._calls and not _looking.depth:
            for group in self._groups.values():
                self._before_read(group)

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`."""
        return self[name] if name in self else default  # noqa: SIM401 - that would be this method again


def watch(
    groups: Iterable[Group],
    calls: Sized,
    before_read: Callable[[Group], None],
    uses: Mapping[Group, int] = MappingProxyType({}),
) -> None:
    """Watch all reads of the groups' tensors through their modules, as `WatchedTensors` says."""
    by_module: dict[nn.Module, dict[str, Group]] = {}
    for group in groups:
        for slot in group.slots:
            for module, name in slot.owners:
                by_module.setdefault(module, {})[name] = group
    for module, group_of in by_module.items():
        for kind in _KINDS:
            original = module.__dict__[kind]
            if isinstance(original, WatchedTensors) and original._before_read == before_read:
                continue  # it does already
            if not group_of.keys().isdisjoint(original):
                module.__dict__[kind] = WatchedTensors(original, group_of, calls, before_read, uses)


def stop_watching(groups: Iterable[Group]) -> None:
    """Give the modules of the groups' tensors their own dicts back."""
    watched = {owner[0] for group in groups for slot in group.slots for owner in slot.owners}
    for module in watched:
        for kind in _KINDS:
            tensors = module.__dict__[kind]
            if isinstance(tensors, WatchedTensors):
                module.__dict__[kind] = tensors.give_back()
