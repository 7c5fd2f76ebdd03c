"""Breaks the code on purpose, one line at a time, and sees that the tests notice.

    python tests/mutants/run.py                    # all mutants
    python tests/mutants/run.py simulator guard    # those whose file or description has one of the words
    python tests/mutants/run.py --changed          # those in functions that differ from the last commit
    python tests/mutants/run.py --changed main~3   # or from another one

A mutant is a table in one of the .toml files beside this one: the function or class that it changes, the
exact text there and what to put in its place, what that breaks, and the tests that have to fail. The function
is found by its name wherever it lies; where two have the name, or the text is outside of all functions, the
module is named too: `hookcore.registry:_move`, `hookcore.memory.gradients:`. To add one, write another.

The exit status is 1 when a mutant survives, or cannot be tried.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_COPIED = ("hookcore", "plugins", "tests", "pyproject.toml")
_SOURCES = ("hookcore", "plugins/hookcore_plugins")
_SECONDS = 300


@frozen
class Place:
    """A function, a class or a module.

    Attributes:
        file: The file, from the root of the repository.
        start: Its first character there.
        stop: The one after its last.
        lines: Numbers of its first and its last line.
    """

    file: str
    start: int
    stop: int
    lines: tuple[int, int]


@cache
def places() -> dict[str, list[Place]]:
    """Every module, function and class: by its name, and by its module's name and its own."""
    found: dict[str, list[Place]] = {}
    for source in _SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            parts = path.relative_to(ROOT / source).with_suffix("").parts
            module = ".".join((Path(source).name, *parts)).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            lines = text.splitlines(keepends=True)
            starts = [0, *accumulate(map(len, lines))]
            file = str(path.relative_to(ROOT))
            found[f"{module}:"] = [Place(file, 0, len(text), (1, len(lines)))]
            for name, first, last in _definitions(ast.parse(text)):
                place = Place(file, starts[first - 1], starts[last], (first, last))
                found.setdefault(name, []).append(place)
                found.setdefault(f"{module}:{name}", []).append(place)
    return found


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, first and last line of functions and classes, also of those in others."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = prefix + child.name
            first = min([child.lineno, *(it.lineno for it in child.decorator_list)])
            yield name, first, child.end_lineno or first
            yield from _definitions(child, f"{name}.")
        else:
            yield from _definitions(child, prefix)


@frozen
class Mutant:
    """One change that tests have to notice.

    Attributes:
        breaks: What is wrong then, in one sentence.
        at: The function or class, or the module, that has the text.
        old: The text that is replaced. It occurs exactly once there.
        new: What stands there instead.
        tests: Files or node ids, the quickest to fail first.
    """

    breaks: str
    at: str
    old: str
    new: str
    tests: list[str]

    @property
    def place(self) -> Place:
        """Where it is.

        Raises:
            ValueError: There is no such function, or more than one.
        """
        found = places().get(self.at, [])
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} functions or classes are called {self.at!r}, expected one, for the mutant "
                f"{self.breaks!r}. Name it, with its module before it if need be: "
                "'hookcore.registry:Attachment.take'"
            )
        return found[0]

    @property
    def file(self) -> str:
        """The file, from the root of the repository."""
        return self.place.file

    def apply(self, root: Path) -> None:
        """Changes the file below a folder.

        Raises:
            ValueError: The text doesn't occur exactly once.
        """
        place = self.place
        path = root / place.file
        text = path.read_text(encoding="utf-8")
        before, inside, after = text[: place.start], text[place.start : place.stop], text[place.stop :]
        # A text may begin and end with the line breaks around it.
        inside, after = inside + after[:1], after[1:]
        count = inside.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.at} has the text of the mutant {self.breaks!r} {count} times, expected once. "
                f"Write it as it is now: {self.old!r}"
            )
        path.write_text(before + inside.replace(self.old, self.new) + after, encoding="utf-8")


def all_mutants() -> list[Mutant]:
    """Reads all lists."""
    tables = (tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.toml")))
    return [Mutant(**mutant) for table in tables for mutant in table["mutant"]]


def _pytest(root: Path, tests: list[str]) -> tuple[int, str]:
    """Runs tests of a copy until one fails; the exit status and the last lines."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'plugins'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        result = subprocess.run(
            [*command, *tests],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer after {_SECONDS} seconds"
    return result.returncode, "\n".join((result.stdout + result.stderr).splitlines()[-15:])


def _try(mutant: Mutant, root: Path) -> tuple[str, str]:
    """Says what became of a mutant, with what pytest said to it."""
    original = (ROOT / mutant.file).read_text(encoding="utf-8")
    try:
        mutant.apply(root)
        status, said = _pytest(root, mutant.tests)
    finally:
        (root / mutant.file).write_text(original, encoding="utf-8")
    if status == 1 or status < 0:  # the latter is a crash
        return "killed", next(
            (line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))), said
        )
    return ("SURVIVED", "") if status == 0 else (f"NOT TRIED (pytest exits with {status})", said)


def changed_lines(commit: str) -> dict[str, list[tuple[int, int]]]:
    """First and last line, as they are now, of each change since a commit, by file."""
    command = ["git", "diff", "-U0", "--no-color", commit, "--", *_SOURCES]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[tuple[int, int]]] = {}
    file = ""
    for line in diff.splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ b/")
        elif match := re.match(r"@@ .* \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            found.setdefault(file, []).append((first, first + max(count, 1) - 1))
    return found


def _touches(place: Place, changes: list[tuple[int, int]]) -> bool:
    return any(first <= place.lines[1] and last >= place.lines[0] for first, last in changes)


def main() -> int:
    """Tries the mutants, and prints what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="try only mutants whose file or description has one")
    parser.add_argument("--changed", nargs="?", const="HEAD", metavar="COMMIT", help="only in what changed")
    arguments = parser.parse_args()
    words = arguments.words
    chosen = [
        it for it in all_mutants() if not words or any(word in f"{it.file} {it.breaks}" for word in words)
    ]
    if arguments.changed is not None:
        changed = changed_lines(arguments.changed)
        chosen = [it for it in chosen if _touches(it.place, changed.get(it.file, []))]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder)
        for name in _COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        print(f"without a mutant: {len(tests)} test files", flush=True)
        status, said = _pytest(root, tests)
        if status:
            print(f"the tests fail without any mutant:\n{said}")
            return 1
        killed = 0
        with tqdm(chosen, unit="mutant") as progress:
            for mutant in progress:
                outcome, said = _try(mutant, root)
                killed += outcome == "killed"
                progress.write(f"{outcome:9} {mutant.file}: {mutant.breaks}", file=sys.stdout)
                if said:
                    progress.write(f"    {said}", file=sys.stdout)
    print(f"{killed} of {len(chosen)} mutants killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
