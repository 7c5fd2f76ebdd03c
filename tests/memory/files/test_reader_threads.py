"""Threads and open files belong to one process: a forked child has its own, and leaves its parent's alone."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import X, save, stored_tensors, wide
from hypothesis import given, settings
from hypothesis import strategies as st

import hookcore
from hookcore import CheckpointError
from hookcore.memory.files.reader_threads import ReaderThreads
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import DiskOffload, GroupOffload


def in_child(function):
    """Runs a function in a forked child; fails where it does, or where it takes half a minute."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            function()
            status = 0
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - pytest must not go on in the child
            sys.__stderr__.write(f"in the child: {error!r}\n")
        finally:
            if status:
                os._exit(status)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_has_threads_of_its_own(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(9000))
    workers = ReaderThreads("test")
    goes_on = threading.Event()
    before = [workers.submit(goes_on.wait), workers.submit(goes_on.wait), workers.submit(os.getpid)]
    reader = workers.reader(path)

    def child():
        for task in before:
            assert task.done()
            assert not task.cancel()
            assert not task.cancelled()
            with pytest.raises(CheckpointError, match="forked"):
                task.result()
        assert workers.submit(os.getpid).result() == os.getpid()
        assert workers.reader(path)
        workers.close()

    try:
        in_child(child)
        assert not before[0].done()
    finally:
        goes_on.set()
    assert before[2].result() == os.getpid()
    assert workers.reader(path) is reader
    workers.close()


def test_a_child_closes_what_it_has_never_used():
    workers = ReaderThreads("test")
    goes_on = threading.Event()
    for _ in range(3):
        workers.submit(goes_on.wait)
    try:
        in_child(workers.close)
    finally:
        goes_on.set()
    workers.close()


def call(model):
    with torch.no_grad():
        return model(X)


@settings(deadline=None)
@given(
    calls=st.integers(0, 3),
    child_does=st.lists(st.sampled_from(["call", "remove", "drop", "apply"]), max_size=3),
    writes=st.booleans(),
    read_ahead=st.sampled_from([0, 2**20]),
)
def test_parent_and_child_have_a_model_each(calls, child_does, writes, read_ahead):
    """Whatever a child does with its copy, both compute as the bare model does and remove what they have."""
    with tempfile.TemporaryDirectory() as folder:
        model = wide()
        expected = call(model)
        if writes:
            technique = GroupOffload("cpu", offload_to_disk_path=folder)
        else:
            save(stored_tensors(model), folder)
            technique = DiskOffload(folder, read_ahead=read_ahead)
        hookcore.apply(model, [technique])
        for _ in range(calls):
            call(model)

        def child():
            nonlocal model
            for what in child_does:
                if what == "call" and model:
                    assert torch.allclose(call(model), expected)
                elif what == "remove" and model:
                    hookcore.remove(model)
                    assert same_bits(call(model), expected)
                elif what == "drop":
                    model = None
                    gc.collect()
                elif what == "apply":
                    other = wide()
                    with hookcore.apply(other, [technique]):
                        assert torch.allclose(call(other), expected)

        in_child(child)
        files = len(list(Path(folder).iterdir()))
        assert files == 1
        assert torch.allclose(call(model), expected)
        hookcore.remove(model)
        assert same_bits(call(model), expected)


def test_a_child_that_exits_leaves_its_parents_file(tmp_path):
    """By the interpreter's own end, with all that is to be done then."""
    code = """
import os, sys, torch, hookcore
from hookcore_plugins import GroupOffload
model = torch.nn.Linear(8, 8)
x = torch.ones(1, 8)
expected = model(x)
hookcore.apply(model, [GroupOffload("cpu", offload_to_disk_path=sys.argv[1])])
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.allclose(model(x), expected)
hookcore.remove(model)
assert torch.equal(model(x), expected)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []


def open_files(folder):
    found = []
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names of links
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("drops", [False, True])
def test_no_file_is_held_open_for_a_model_that_is_gone(sim, device, drops, tmp_path):
    save(stored_tensors(wide()), tmp_path, 3)
    model = wide()
    hookcore.apply(model, [DiskOffload(tmp_path, execution_device=device)])
    with torch.no_grad():
        model(X.to(device))
    assert open_files(tmp_path)
    if not drops:
        hookcore.remove(model)
    del model
    for _ in range(200):
        gc.collect()
        if not open_files(tmp_path):
            break
        time.sleep(0.01)
    assert open_files(tmp_path) == []
