"""Distributions with plugins that importlib.metadata really finds, in a folder that goes away again."""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import Factory, frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_numbers = itertools.count()

PROLOGUE = """
from attrs import frozen
from hookcore.errors import *
from hookcore import ForeignMechanism, ModelConventions, hookimpl
from hookcore.technique import Phase, Technique

def technique(name, phase=Phase.COMPUTE):
    return frozen(type("Made", (Technique,), {"name": name, "phase": phase, "__module__": __name__}))
"""


@frozen
class FakePlugin:
    """A plugin to install: its entry point and the source of its module, which follows `PROLOGUE`.

    Module names are never used twice, since Python imports each one once.
    """

    name: str
    source: str
    distribution: str = "fake-plugins"
    object_name: str | None = None
    module: str = Factory(lambda: f"fake_plugin_{next(_numbers)}")

    @property
    def value(self) -> str:
        return f"{self.module}:{self.object_name}" if self.object_name else self.module


def write_site(plugins: Iterable[FakePlugin], root: Path, *, version: str = "1.5") -> list[Path]:
    """Writes each distribution into its own folder; returns these in order of their first plugins.

    There always is a distribution named hookcore: it hides the installed one, with all its plugins.
    """
    distributions: dict[str, list[FakePlugin]] = {}
    for plugin in plugins:
        distributions.setdefault(plugin.distribution, []).append(plugin)
    distributions.setdefault("hookcore", [])
    folders = []
    for distribution, brought in distributions.items():
        folder = root / distribution
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"{plugin.name} = {plugin.value}" for plugin in brought]
        (info / "entry_points.txt").write_text("\n".join(["[hookcore]", *lines]))
        for plugin in brought:
            (folder / f"{plugin.module}.py").write_text(PROLOGUE + plugin.source)
        folders.append(folder)
    return folders


@contextlib.contextmanager
def installed(plugins: Sequence[FakePlugin]) -> Iterator[None]:
    """Makes the plugins importable and discoverable in this process, for as long as it is entered."""
    path = sys.path[:]
    with tempfile.TemporaryDirectory() as root:
        sys.path[:0] = map(str, write_site(plugins, Path(root)))
        try:
            yield
        finally:
            sys.path[:] = path
            for plugin in plugins:
                sys.modules.pop(plugin.module, None)
