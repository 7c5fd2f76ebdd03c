"""Everything that the documentation shows is run, page by page, and has to say what the page says.

A page is read from top to bottom. ```python is run; all blocks of a page share their names, and a folder
that is empty at the beginning. ```text right after it is what it prints, where `...` stands for anything. A
`{code-block}` with a `:caption:` is a file of that name. ```console has commands after `$`, and what they
print.
"""

from __future__ import annotations

import contextlib
import doctest
import gc
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from attrs import frozen

import hookcore.plugins
from hookcore.cli import _parser, main

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "docs" / "images" / "house.svg"  # drawn when docs are built
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_CAPTION = re.compile(r":caption: (?P<name>\S+)\n\n?(?P<body>.*)", re.DOTALL)
_VARIABLE = re.compile(r"(?P<name>[A-Z_]+)=(?P<value>.*)", re.DOTALL)
_MATCH = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@frozen
class Block:
    """A fenced block: what its fence says, what is in it, and how many lines stand before its first."""

    info: str
    body: str
    line: int
    follows: bool
    """Whether nothing but white space stands between it and the block before."""


def blocks_of(text: str) -> list[Block]:
    matches = list(_FENCE.finditer(text))
    ends = [-1, *(match.end() for match in matches)]
    return [
        Block(
            match["info"].strip(),
            match["body"],
            text.count("\n", 0, match.start("body")),
            follows=end >= 0 and not text[end : match.start()].strip(),
        )
        for match, end in zip(matches, ends, strict=False)
    ]


def forget_plugins() -> None:
    """Has plugins looked for again: a page may install one, or block one."""
    hookcore.plugins._host.cache_clear()


class Page:
    """Runs the blocks of one page."""

    def __init__(self, path: Path, module: types.ModuleType) -> None:
        self.path = path
        self.module = module

    def run(self) -> None:
        blocks = blocks_of(self.path.read_text())
        for block, following in pairwise([*blocks, Block("", "", 0, follows=False)]):
            if block.info == "python":
                printed = self.execute(block)
                if following.info == "text" and following.follows:
                    self.compare(printed, following.body, following.line)
            elif block.info == "console":
                self.type_in(block)
            elif caption := _CAPTION.match(block.body):
                Path(caption["name"]).parent.mkdir(parents=True, exist_ok=True)
                Path(caption["name"]).write_text(caption["body"])

    def execute(self, block: Block) -> str:
        # Empty lines before it, so that a traceback names the page's own line.
        code = compile("\n" * block.line + block.body, str(self.path), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, vars(self.module))  # noqa: S102
        return printed.getvalue()

    def type_in(self, block: Block) -> None:
        for command in re.split(r"^\$ ", block.body, flags=re.MULTILINE)[1:]:
            line, _, wanted = command.replace("\\\n", "").partition("\n")
            printed = self.command(line.partition("  #")[0])
            if wanted.strip():
                self.compare(printed, wanted, block.line)

    def command(self, line: str) -> str:
        words = shlex.split(line)
        variables = {}
        while match := _VARIABLE.fullmatch(words[0]):
            variables[match["name"]] = match["value"]
            words.pop(0)
        match words:
            case ["hookcore", "demo", *_]:  # takes minutes: the words have to be right
                _parser(hookcore.plugins.plugins()).parse_args(words[1:])
            case ["hookcore", *arguments]:
                with mock.patch.dict(os.environ, variables):
                    forget_plugins()
                    with contextlib.redirect_stdout(io.StringIO()) as printed:
                        run_command(arguments)
                forget_plugins()
                return printed.getvalue()
            case ["make", *targets]:
                makefile = (ROOT / "Makefile").read_text()
                assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
            case ["pip", "install", "."]:
                install_here()
            case ["pytest", *arguments]:
                if Path(arguments[0]).exists():  # a file of this page
                    # All of the contract takes too long; whether the page is right shows in some of it.
                    some = ("-k", "options or planning or outputs or peaks or runTest")
                    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *some)
            case ["pip" | "git" | "cd", *_]:
                pass
            case _:
                raise AssertionError(f"{self.path}: who knows whether {line!r} works?")
        return ""

    def compare(self, printed: str, wanted: str, line: int) -> None:
        if not doctest.OutputChecker().check_output(wanted, printed, _MATCH):
            raise AssertionError(f"{self.path}:{line} shows\n{wanted}\nbut it was\n{printed}")


def run_command(arguments: list[str]) -> None:
    """Runs `hookcore`, which ends by itself for some options."""
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"hookcore {arguments} is refused") from end


def install_here() -> None:
    """Installs the distribution in the current folder for this process."""
    packages = Path("site-packages").absolute()
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run_python("-m", "pip", "install", *options, "--target", str(packages), ".")
    sys.path.insert(0, str(packages))
    importlib.invalidate_caches()
    forget_plugins()


def run_python(*arguments: str) -> None:
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_is_true(path, tmp_path, monkeypatch):
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # so that its classes can be copied and pickled
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as Python has it where a user types
    before = set(sys.modules)
    torch.manual_seed(0)
    gc.collect()  # what earlier tests left on the simulated device is in no page's peak
    if hasattr(torch, "sim"):
        torch.sim.reset_peak_memory_stats()
    try:
        Page(path, module).run()
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[name]
        forget_plugins()


@pytest.mark.parametrize(
    "page",
    [
        "```python\nx = 1\n```\n```python\nassert x == 2\n```",
        "```python\nprint('this')\n```\n\n```text\nthat\n```",
        "```console\n$ hookcore --version\nhookcore 99\n```",
        "```console\n$ no_such_command\n```",
        "```console\n$ make nonsense\n```",
        "```{code-block} text\n:caption: a/b\n\nx\n```\n```python\nassert open('a/b').read() != 'x\\n'\n```",
    ],
)
def test_a_page_that_is_not_true_is_found(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(AssertionError):
        Page(tmp_path / "page.md", types.ModuleType("page")).run()


def test_text_after_other_text_is_nobodys_output(tmp_path):
    (tmp_path / "page.md").write_text("```python\nx = 1\n```\nAnd then:\n\n```text\nthat\n```")
    Page(tmp_path / "page.md", types.ModuleType("page")).run()


def test_every_page_is_in_the_contents():
    linked = set()
    for index in ROOT.glob("docs/**/*.md"):
        for block in blocks_of(index.read_text()):
            if block.info == "{toctree}":
                linked |= {(index.parent / line).with_suffix(".md") for line in block.body.splitlines()}
    assert set(ROOT.glob("docs/**/*.md")) - linked == {ROOT / "docs" / "index.md"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = _FENCE.sub("", path.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists() or (path.parent / target).resolve() == HOUSE, target


def test_the_house_is_drawn_from_the_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    importlib.import_module("house").draw(tmp_path / HOUSE.name)
    picture = (tmp_path / HOUSE.name).read_text()
    assert all(f"<!-- {name} -->" in picture for name in ("apply", "memory/placement", "memory/files/spill"))


def test_pages_name_tests_that_exist():
    named = {
        (path, name)
        for page in PAGES
        for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text())
    }
    assert len(named) > 30
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or (name and f"def {name}(" not in (ROOT / path).read_text())
    ]
    assert not missing
