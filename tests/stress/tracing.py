"""Interrupts where Python looks for signals: as a function begins, after a call, and as a loop goes round.

Nowhere else can an interrupt come: not between the last line of a `with` or `try` block and what ends that
block, nor between two plain assignments. To raise there would ask for more than any program can do.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, Self

from attrs import field, frozen

import hookcore
import hookcore_plugins

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import FrameType

_SOURCES = tuple(str(Path(package.__file__).parent) for package in (hookcore, hookcore_plugins))
_NOT_ITS_OWN = str(Path(hookcore.__file__).parent / "testing")  # the simulator stands for torch

Place = tuple[str, int]  # file and line

Block = tuple[int, int]  # the line where a statement begins, and which of its parts


@frozen
class Source:
    """What of a file decides where an interrupt can come.

    Attributes:
        calls: Lines that hold a call, or a part of one.
        blocks: Line to the blocks that it lies in that handle exceptions, from outside in.
    """

    calls: set[int] = field(factory=set)
    blocks: dict[int, tuple[Block, ...]] = field(factory=dict)

    def polls_between(self, last: int | None, line: int) -> bool:
        """Whether an interrupt can come, where both lines are handled alike, after one and before the other.

        Args:
            last: The line that was run last in this frame; None at its start.
            line: The line that is run next.
        """
        if last is None:
            return True
        return self.blocks.get(last) == self.blocks.get(line) and (last in self.calls or line <= last)


@functools.cache
def source_of(file: str) -> Source:
    """Reads a file."""
    found = Source()
    with tokenize.open(file) as lines:
        tree = ast.parse(lines.read())
    _read(tree, (), found)
    return found


def _read(node: ast.AST, blocks: tuple[Block, ...], found: Source) -> None:
    if isinstance(node, ast.Call):
        found.calls.update(_lines(node))
    if isinstance(node, ast.stmt | ast.ExceptHandler):
        found.blocks.update(dict.fromkeys(_lines(node), blocks))
    if isinstance(node, ast.Try | ast.With):
        parts: list[Iterable[ast.AST]] = [node.body]
        if isinstance(node, ast.Try):
            parts += [node.handlers, node.orelse, node.finalbody]
        for number, part in enumerate(parts):
            for child in part:
                _read(child, (*blocks, (node.lineno, number)), found)
        for item in node.items if isinstance(node, ast.With) else ():
            _read(item, blocks, found)
        return
    for child in ast.iter_child_nodes(node):
        _read(child, blocks, found)


def _lines(node: ast.stmt | ast.expr | ast.ExceptHandler) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


class Tracer(contextlib.AbstractContextManager["Tracer"]):
    """Notes where an interrupt can come while hookcore's own lines run in this thread, and raises one there.

    Args:
        at: The number of the place where it comes, among all where it could; None for nowhere.
    """

    def __init__(self, at: int | None = None) -> None:
        self._places: list[Place] = []
        self._at = at

    def __enter__(self) -> Self:
        gc.collect()
        gc.disable()  # what it runs would be counted at random
        sys.settrace(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        gc.enable()

    def _begin(self, frame: FrameType, event: str, arg: object) -> object:
        file = frame.f_code.co_filename
        if not file.startswith(_SOURCES) or file.startswith(_NOT_ITS_OWN):
            return None
        source = source_of(file)
        last: int | None = None

        def line(frame: FrameType, event: str, arg: object) -> object:
            nonlocal last
            if event == "line":
                before, last = last, frame.f_lineno
                if source.polls_between(before, last):
                    self._reach((file, last))
            return line

        return line

    def _reach(self, place: Place) -> None:
        self._places.append(place)
        if len(self._places) - 1 == self._at:
            raise KeyboardInterrupt

    @property
    def where(self) -> str:
        """The file and the line where an interrupt came, or could have come last."""
        file, line = self._places[-1]
        return f"{Path(file).name}:{line}"

    def first_and_last(self) -> list[int]:
        """The numbers of the places where one could have come; of each line the first and the last."""
        first = {place: number for number, place in reversed(list(enumerate(self._places)))}
        last = {place: number for number, place in enumerate(self._places)}
        return sorted({*first.values(), *last.values()})


def interrupted(
    subject: object, verbs: Sequence[str], verb: str, at: int | None
) -> tuple[Tracer, KeyboardInterrupt | None]:
    """Does all that comes before a verb, and interrupts the verb itself.

    Args:
        subject: What has the verbs as methods.
        verbs: All of them, in order.
        verb: The one to interrupt.
        at: As `Tracer` takes it.

    Returns:
        The tracer, and the interrupt if it came out.
    """
    for earlier in verbs[: verbs.index(verb)]:
        getattr(subject, earlier)()
    tracer = Tracer(at)
    try:
        with tracer:
            getattr(subject, verb)()
    except KeyboardInterrupt as error:
        return tracer, error
    return tracer, None
