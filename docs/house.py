"""Draws the house, read off the code itself: a file imports only files of floors below its own.

Files that name each other in type annotations stand on one floor.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLORS = {
    "hookcore.memory.planning": "#d9ead3",
    "hookcore.memory.device": "#cfe2f3",
    "hookcore.memory.files": "#fce5cd",
    "hookcore.memory": "#d0e0e3",
    "hookcore": "#eeeeee",
}
PER_ROW = 6


def draw(path: Path) -> None:
    """Writes the picture in the format that the path's suffix names."""
    from matplotlib.figure import Figure

    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in (ROOT / "hookcore").rglob("*.py")
        if file.stem not in ("__init__", "__main__") and "testing" not in file.parts
    }

    uses = {module: _imports(file) & modules.keys() for module, file in modules.items()}

    @cache
    def below(module: str) -> frozenset[str]:
        reached, left = set(), list(uses[module])
        while left:
            if (it := left.pop()) not in reached:
                reached.add(it)
                left += uses[it]
        return frozenset(reached)

    @cache
    def floor(module: str) -> int:
        lower = (it for it in below(module) if module not in below(it))
        return 1 + max(map(floor, lower), default=-1)

    floors: dict[int, list[str]] = {}
    for module in sorted(modules, key=lambda it: (_room(it), it)):
        floors.setdefault(floor(module), []).append(module)
    rows = [(number, row) for number in sorted(floors) for row in _rows(floors[number])]
    figure = Figure(figsize=(15, 0.36 * len(rows) + 0.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5, PER_ROW), ylim=(-0.2, len(rows) + 1))
    axes.axis("off")
    last = -1
    for height, (number, row) in enumerate(rows):
        if number != last:
            axes.text(-0.3, height + 0.4, str(number), fontsize=9, va="center", color="#888888")
            last = number
        for column, module in enumerate(row):
            box = {"boxstyle": "round,pad=0.3", "facecolor": COLORS[_room(module)], "edgecolor": "#999999"}
            text = module.removeprefix("hookcore.").replace(".", "/")
            axes.text(column, height + 0.4, text, fontsize=8, va="center", bbox=box)
    for column, (room, color) in enumerate(COLORS.items()):
        axes.text(column, len(rows) + 0.5, room, fontsize=9, va="center", bbox={"facecolor": color})
    figure.savefig(path)


def _rows(modules: list[str]) -> list[list[str]]:
    return [modules[start : start + PER_ROW] for start in range(0, len(modules), PER_ROW)]


def _room(module: str) -> str:
    return next(room for room in COLORS if module.startswith(f"{room}."))


def _imports(file: Path) -> set[str]:
    """Names of all modules that a file imports at its top, types too."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in [*tree.body, *(it for block in tree.body if isinstance(block, ast.If) for it in block.body)]:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{it.name}" for it in node.names)}
    return found
