"""Breaks the code on purpose, one line at a time, and sees that the tests notice.

    python tests/mutants/run.py                    # all mutants
    python tests/mutants/run.py simulator guard    # those whose file or description has one of the words

A mutant is a table in one of the .toml files beside this one: the file that it changes, the exact text there
and what to put in its place, what that breaks, and the tests that have to fail. To add one, write another.

The exit status is 1 when a mutant survives, or cannot be tried.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from attrs import frozen
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_COPIED = ("hookcore", "plugins", "tests", "pyproject.toml")
_SECONDS = 300


@frozen
class Mutant:
    """One change that tests have to notice.

    Attributes:
        breaks: What is wrong then, in one sentence.
        file: The file, from the root of the repository.
        old: The text that is replaced. It occurs exactly once.
        new: What stands there instead.
        tests: Files or node ids, the quickest to fail first.
    """

    breaks: str
    file: str
    old: str
    new: str
    tests: list[str]

    def apply(self, root: Path) -> None:
        """Changes the file below a folder.

        Raises:
            ValueError: The text doesn't occur exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.file} has the text of the mutant {self.breaks!r} {count} times, expected once. "
                f"Write it as the file has it now: {self.old!r}"
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


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


def main() -> int:
    """Tries the mutants, and prints what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="try only mutants whose file or description has one")
    words = parser.parse_args().words
    chosen = [
        it for it in all_mutants() if not words or any(word in f"{it.file} {it.breaks}" for word in words)
    ]
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
