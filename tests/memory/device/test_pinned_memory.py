"""Locked host memory: exact, within its limit, and locked in place where the runtime can."""

from __future__ import annotations

import mmap
import os
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookcore.memory.device import pinned_memory as host
from hookcore.memory.device.pinned_memory import PinnedMemory


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 100), max_size=10), st.integers(0, 300))
def test_memory_is_locked_to_the_byte_and_within_the_limit(sim, sizes, limit):
    before = sim.pinned_bytes()
    memory = PinnedMemory(torch.device("sim"), limit)
    made = []
    for nbytes in sizes:
        fits = memory.locked + nbytes <= limit
        made.append(memory.make(nbytes))
        memory.lock(made[-1])
        assert made[-1].dtype is torch.uint8
        assert made[-1].shape == (nbytes,)
        assert made[-1].is_pinned() == (fits and nbytes > 0)
    assert memory.locked == sum(it.nbytes for it in made if it.is_pinned()) <= limit
    assert sim.pinned_bytes() - before == memory.locked
    while made:
        memory.release(made.pop())
    assert memory.locked == 0
    assert sim.pinned_bytes() == before


@pytest.mark.parametrize("nbytes", [0, 8])
def test_nothing_is_asked_for_where_nothing_can_be_locked(nbytes):
    """Without an accelerator torch refuses to make locked memory, also of no bytes."""
    with patch.object(torch, "empty", wraps=torch.empty) as empty:
        PinnedMemory(torch.device("cpu"), 0).make(nbytes)
    assert not empty.call_args.kwargs["pin_memory"]


class Runtime:
    """A runtime that locks memory where it is."""

    def __init__(self):
        self.locked = {}

    def cudaHostRegister(self, address, nbytes, _flags):  # noqa: N802 -- the runtime's name
        self.locked[address] = nbytes

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.locked[address]


def test_memory_is_locked_in_place_once_it_is_filled(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(
        torch,
        "get_device_module",
        lambda _: SimpleNamespace(cudart=lambda: runtime, device=lambda _: nullcontext()),
    )
    with patch.object(torch.Tensor, "is_pinned", lambda it: it.data_ptr() in runtime.locked):
        memory = PinnedMemory(torch.device("cuda"), 1000)
        first, second = memory.make(700), memory.make(400)
        assert runtime.locked == {}
        memory.lock(first)
        memory.lock(second)  # more than the limit
        assert runtime.locked == {first.data_ptr(): 700}
        assert memory.locked == 700
        memory.release(second)
        memory.release(first)
        assert runtime.locked == {}
        assert memory.locked == 0
        third = memory.make(300)
        third.fill_(7)
        memory.lock(third)
        view = third[5:]
        del third
        assert len(runtime.locked) == 1
        assert view.eq(7).all()
        del view  # nobody has released it, nobody sees it any more
        assert runtime.locked == {}
        assert memory.make(0).nbytes == 0


def test_what_finds_no_room_to_be_locked_is_told_once_with_the_reason(sim, monkeypatch):
    monkeypatch.setattr(host, "free_host_bytes", lambda share: int(10_000 * share))
    memory = PinnedMemory(torch.device("sim"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for nbytes in (6000, 3000, 2000, 3000, 0):
            memory.lock(memory.make(nbytes))
    (told,) = caught
    assert memory.locked == 8000
    assert str(told.message).startswith(
        "2.9 KiB of weights stay in host memory that is not page-locked, and all that find no room later: "
        "5.9 KiB are locked by now, and no more than 7.8 KiB may be, which is 80% of what was free."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wished = PinnedMemory(torch.device("sim"), 0)
        wished.lock(wished.make(100))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 5), max_size=6), st.integers(0, 12))
def test_what_the_system_refuses_to_lock_is_told_once_and_leaves_no_error(sim, pages, lockable):
    device = torch.device("sim")
    profile = evolve(sim.CUDA, lockable=lockable * mmap.PAGESIZE)
    with sim.limited(profile=profile), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        memory = PinnedMemory(device, 1 << 30)
        made = []
        for count in pages:
            made.append(memory.make(count * mmap.PAGESIZE))
            memory.lock(made[-1])
            torch.ones(2, device=device).add_(1)  # raises what is pending
        left, refused = lockable, False
        for it in made:
            refused |= it.nbytes > left * mmap.PAGESIZE
            assert it.is_pinned() == (not refused)
            left -= it.nbytes // mmap.PAGESIZE
        assert len(told) == refused
        assert all("page-locked" in str(it.message) for it in told)
        while made:
            memory.release(made.pop())
        assert memory.locked == 0
        torch.ones(2, device=device).add_(1)


def test_an_error_of_unlocking_is_not_left_for_the_next_kernel(sim):
    with sim.limited(profile=sim.CUDA):
        memory = PinnedMemory(torch.device("sim"), 1 << 20)
        made = memory.make(100)
        memory.lock(made)
        torch.get_device_module("sim").cudart().cudaHostUnregister(made.data_ptr())  # a stranger
        del made
        torch.ones(2, device="sim").add_(1)


def test_memory_that_goes_away_while_a_graph_is_captured_is_unlocked_later(sim):
    module = torch.get_device_module("sim")
    with sim.limited(profile=sim.CUDA):
        memory = PinnedMemory(torch.device("sim"), 1 << 20)
        before = sim.pinned_bytes()
        made = memory.make(100)
        memory.lock(made)
        graph, there = module.CUDAGraph(), torch.zeros(2, device="sim")
        with module.graph(graph):
            there.add_(1)
            del made
        module.synchronize()
        assert sim.pinned_bytes() == before + 100
        memory.lock(another := memory.make(50))
        assert sim.pinned_bytes() == before + 50
        memory.release(another)


def test_locking_for_a_device_takes_no_context_of_another(monkeypatch):
    current, runtime = [0], Runtime()
    runtime.cudaHostRegister = lambda address, nbytes, _flags: seen.append(current[-1])
    seen = []

    @contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    module = SimpleNamespace(cudart=lambda: runtime, device=device)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    memory = PinnedMemory(torch.device("cuda:1"), 1000)
    with patch.object(torch.Tensor, "is_pinned", lambda _: False):
        made = memory.make(10)
        memory.lock(made)
    assert seen == [1]
    runtime.cudaHostUnregister = lambda _: None


def test_a_forked_child_does_not_change_its_parents_weights(monkeypatch):
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(cudart=lambda: runtime))
    weights = PinnedMemory(torch.device("cuda"), 0).make(5000).fill_(7)
    child = os.fork()
    if not child:
        weights.fill_(9)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert weights.eq(7).all()
