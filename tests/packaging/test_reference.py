"""The reference pages show everything that is exported, and nothing else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import hookcore
import hookcore.memory
import hookcore.testing
from hookcore import Hook, Phase, Resource

_DIRECTIVE = re.compile(r"^\.\. auto(?P<kind>\w+):: (?P<name>\S+)(?P<options>(?:\n   :.*)*)", re.MULTILINE)
_ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())


def _shown():
    """Yields what the pages show; what a module's own directive shows with it, too."""
    for page in _ROOT.glob("docs/reference/*.md"):
        for found in _DIRECTIVE.finditer(page.read_text()):
            if found["kind"] == "module":
                shown = importlib.import_module(found["name"])
                if ":no-members:" not in found["options"]:
                    yield from (it for it in vars(shown).values() if inspect.getmodule(it) is shown)
            else:
                module, _, name = found["name"].rpartition(".")
                yield getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module", [hookcore, hookcore.memory, hookcore.testing], ids=lambda it: it.__name__)
def test_everything_exported_is_shown(module):
    shown = {id(it) for it in _shown()}
    assert not [name for name in module.__all__ if id(getattr(module, name)) not in shown]


@pytest.mark.parametrize("described", [Phase, Resource, Hook])
def test_everything_that_a_class_holds_is_described(described):
    """Sphinx shows only what has a description."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(described))).body
    after = {id(it): following for it, following in zip(tree.body, tree.body[1:], strict=False)}
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            following = after.get(id(statement))
            assert isinstance(following, ast.Expr), ast.unparse(statement)
            assert isinstance(following.value, ast.Constant), ast.unparse(statement)
        elif isinstance(statement, ast.FunctionDef) and not statement.name.startswith("_"):
            assert ast.get_docstring(statement), statement.name


def test_everything_exported_can_be_imported():
    for name in ("hookcore", "hookcore.memory", "hookcore.testing", "hookcore.testing.simulator"):
        module = importlib.import_module(name)
        assert not [it for it in module.__all__ if not hasattr(module, it)]
