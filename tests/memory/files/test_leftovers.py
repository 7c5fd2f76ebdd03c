"""What a killed process left is cleared by the next; what another one needs is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookcore.memory.files.leftovers import make_claimed

PATTERN = "made-*"


def make_file(path):
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)


def make_folder(path):
    path.mkdir()
    (path / "inside").write_text("full")
    return os.open(path, os.O_RDONLY)


makers = st.sampled_from([make_file, make_folder])


@given(st.lists(st.tuples(makers, st.booleans(), st.booleans()), max_size=5), makers)
def test_what_nobody_claims_is_cleared(before, maker):
    """Each thing is a file or a folder, matches the pattern or not, and somebody still has it or not."""
    with tempfile.TemporaryDirectory() as folder:
        here, held, expected = Path(folder), [], {"made-last"}
        for number, (make, matches, is_held) in enumerate(before):
            name = f"{'made' if matches else 'other'}-{number}"
            descriptor = make_claimed(here, "nothing", partial(make, here / name))
            if is_held or not matches:
                expected.add(name)
            if is_held:
                held.append(descriptor)
            else:
                os.close(descriptor)
        held.append(make_claimed(here, PATTERN, partial(maker, here / "made-last")))
        assert {path.name for path in here.iterdir()} == expected
        for descriptor in held:
            os.close(descriptor)


def test_a_link_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs").touch()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "made-link").symlink_to(outside)
    os.mkfifo(inside / "made-pipe")
    os.close(make_claimed(inside, PATTERN, partial(make_file, inside / "made-new")))
    assert (outside / "theirs").exists()


WRITES = """
import os, signal, sys, torch, hookcore
from hookcore_plugins import GroupOffload
from hookcore.memory.files import spill as written

def die(tensor, file):
    os.kill(os.getpid(), signal.SIGKILL)
written._write_bytes = die
hookcore.apply(torch.nn.Linear(8, 8), [GroupOffload("cpu", offload_to_disk_path=sys.argv[1])])
"""


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    killed = subprocess.run([sys.executable, "-c", WRITES, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"]
    finishes = WRITES.replace("written._write_bytes = die", "")
    subprocess.run([sys.executable, "-c", finishes, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_a_failure_to_make_comes_through_and_holds_nothing(make, tmp_path):
    with pytest.raises(FileNotFoundError):
        make_claimed(tmp_path, PATTERN, partial(make, tmp_path / "no" / "folder"))
    os.close(make_claimed(tmp_path, PATTERN, partial(make, tmp_path / "made-new")))
