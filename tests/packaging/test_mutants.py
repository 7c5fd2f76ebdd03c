"""The lists of mutants fit the code as it is now; `make mutants` tries them."""

import ast
import shutil

import pytest
from mutants.run import ROOT, all_mutants

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda it: it.breaks)
def test_a_mutant_can_be_tried(mutant, tmp_path):
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    changed = shutil.copy(ROOT / mutant.file, tmp_path / mutant.file)
    mutant.apply(tmp_path)
    ast.parse(changed.read_text())
    assert mutant.old != mutant.new
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("[")[0].partition("::")
        text = (ROOT / path).read_text()
        assert not name or f"def {name}(" in text or f"class {name}(" in text


def test_each_mutant_breaks_something_else():
    assert len({mutant.breaks for mutant in MUTANTS}) == len(MUTANTS) >= 30
    assert len({(mutant.at, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_a_text_that_is_gone_is_told(tmp_path):
    mutant = MUTANTS[0]
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    (tmp_path / mutant.file).write_text("")
    with pytest.raises(ValueError, match="0 times, expected once"):
        mutant.apply(tmp_path)
