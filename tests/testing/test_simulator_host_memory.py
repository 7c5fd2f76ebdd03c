"""Host memory that a program registers: what is page-locked, what refuses, and what must not go too early."""

from __future__ import annotations

import ctypes
import gc
import mmap
import weakref

import pytest
import torch
from attrs import evolve
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hookcore.testing import simulator

FOR_EACH_EXAMPLE = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
PAGE, PAGES = mmap.PAGESIZE, 4
SIZE = PAGE * PAGES


def module():
    return torch.get_device_module("sim")


def arena(nbytes=SIZE):
    """Pages of their own."""
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_buffer(mmap.mmap(-1, nbytes)), dtype=torch.uint8)


@pytest.fixture
def cuda(sim):
    with sim.limited(profile=sim.CUDA):
        yield sim
        gc.collect()
        machine = simulator.state.get_machine()
        for block in machine.host_memory.registered:
            module().cudart().cudaHostUnregister(block.address)


def register(tensor):
    return module().cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)


def unregister(tensor):
    return module().cudart().cudaHostUnregister(tensor.data_ptr())


def forget_error():
    """Launches a kernel, which raises what is pending."""
    with pytest.raises(torch.AcceleratorError):
        torch.empty(1, device="sim").zero_()


# What is registered

bounds = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda it: (it[0], min(sum(it), SIZE)))
edges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
    lambda it: (it[0] * PAGE, min(it[0] + it[1], PAGES) * PAGE)
)
parts = st.one_of(bounds, edges)
steps = st.lists(st.tuples(st.sampled_from(["register", "unregister", "copy"]), parts), max_size=15)


@FOR_EACH_EXAMPLE
@given(steps)
@example([("register", (0, PAGE)), ("register", (PAGE, SIZE)), ("copy", (PAGE - 1, PAGE + 1))])
@example([("register", (0, 10)), ("register", (20, 30)), ("register", (PAGE, PAGE + 10))])
@example([("register", (10, 30)), ("unregister", (11, 30)), ("unregister", (10, 20)), ("copy", (10, 20))])
def test_ranges_are_registered_by_pages_and_copied_from_by_bytes(cuda, program):
    memory, registered = arena(), {}
    before, there = cuda.pinned_bytes(), torch.zeros(SIZE, dtype=torch.uint8, device="sim")
    for step, (start, stop) in program:
        part = memory[start:stop]
        if step == "register":
            pages = range(start // PAGE, (stop - 1) // PAGE + 1)
            taken = {
                it for low, high in registered.items() for it in range(low // PAGE, (high - 1) // PAGE + 1)
            }
            if taken.isdisjoint(pages):
                assert register(part) == 0
                registered[start] = stop
            else:
                assert register(part) == cuda.CudaError.hostMemoryAlreadyRegistered
                forget_error()
        elif step == "unregister":
            if registered.pop(start, None):
                assert unregister(part) == 0
            else:
                assert unregister(part) == cuda.CudaError.hostMemoryNotRegistered
                forget_error()
        else:
            holds = any(low <= start and stop <= high for low, high in registered.items())
            touches = any(low < stop and start < high for low, high in registered.items())
            if touches and not holds:
                with pytest.raises(torch.AcceleratorError, match="invalid argument"):
                    there[start:stop].copy_(part, non_blocking=True)
            else:
                with cuda.traced() as trace:
                    there[start:stop].copy_(part, non_blocking=True)
                waits = cuda.now() >= trace.spans[0].end
                assert waits == (not holds)
                module().synchronize()
        assert cuda.pinned_bytes() - before == sum(high - low for low, high in registered.items())
        assert memory.is_pinned() == (0 in registered)  # torch looks at the first byte of the storage
    for start in registered:
        assert module().cudart().cudaHostUnregister(memory.data_ptr() + start) == 0
    assert cuda.pinned_bytes() == before


@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_bytes_cannot_be_registered(cuda, nbytes):
    runtime = module().cudart()
    assert runtime.cudaHostRegister(arena().data_ptr(), nbytes, 0) == runtime.cudaError.invalidValue
    forget_error()
    assert runtime.cudaHostRegister(0, 10, 0) == runtime.cudaError.invalidValue
    forget_error()


def test_what_torch_pinned_is_not_registered_again(cuda):
    pinned = torch.ones(10).pin_memory()
    assert register(pinned) == cuda.CudaError.hostMemoryAlreadyRegistered
    forget_error()
    assert unregister(pinned) == cuda.CudaError.hostMemoryNotRegistered
    forget_error()


def test_a_generic_device_registers_nothing(sim):
    assert not hasattr(module(), "cudart")


# Limits and pending errors


@FOR_EACH_EXAMPLE
@given(
    st.integers(0, 3 * PAGE),
    st.sampled_from([simulator.CudaError.memoryAllocation, simulator.CudaError.notSupported]),
    st.lists(st.tuples(st.booleans(), st.integers(1, PAGE)), max_size=6),
)
def test_no_more_is_locked_than_the_system_lets(cuda, lockable, error, sizes):
    before, kept = cuda.pinned_bytes(), []
    with cuda.limited(profile=evolve(cuda.CUDA, lockable=before + lockable, lock_error=error)):
        for in_place, nbytes in sizes:
            fits = cuda.pinned_bytes() - before + nbytes <= lockable
            if in_place:
                kept.append(arena(PAGE)[:nbytes])
                assert register(kept[-1]) == (0 if fits else error)
                assert kept[-1].is_pinned() == fits
                if not fits:
                    forget_error()
            elif fits:
                kept.append(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
            else:
                with pytest.raises(torch.AcceleratorError, match="CUDA error: out of memory"):
                    torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    for it in kept:
        if it.data_ptr() % PAGE == 0 and it.is_pinned():
            unregister(it)


def test_an_error_waits_for_the_next_kernel_and_no_longer(cuda):
    there, source = torch.ones(4, device="sim"), torch.ones(4).pin_memory()
    assert module().cudart().cudaHostUnregister(1) == cuda.CudaError.hostMemoryNotRegistered
    there.copy_(source, non_blocking=True)  # no kernel
    module().synchronize()
    with pytest.raises(torch.AcceleratorError, match="pointer does not correspond to a registered memory"):
        there + 1
    assert (there + 1).tolist() == [2] * 4


def test_asking_for_an_event_that_is_not_done_clears_a_pending_error(cuda):
    there = torch.ones(4, device="sim")
    module()._sleep(10**9)
    event = module().current_stream().record_event()
    module().cudart().cudaHostUnregister(1)
    assert not event.query()
    there + 1


# Copies that are under way


@pytest.mark.parametrize("to_device", [True, False])
@pytest.mark.parametrize("wait", ["no", "event", "stream", "device"])
def test_memory_stays_registered_until_its_copies_are_done(cuda, to_device, wait):
    memory, there = arena(), torch.ones(SIZE, dtype=torch.uint8, device="sim")
    register(memory)
    side = cuda.Stream()
    side.wait_stream(module().current_stream())
    with side:
        target, source = (there, memory) if to_device else (memory, there)
        target.copy_(source, non_blocking=True)
    event = side.record_event()
    {
        "no": lambda: None,
        "event": event.synchronize,
        "stream": side.synchronize,
        "device": module().synchronize,
    }[wait]()
    assert unregister(memory) == 0
    if wait == "no":
        with pytest.raises(
            cuda.RaceError, match="unregistered while in use: .*Keep host memory, and its regist"
        ):
            module().synchronize()
    module().synchronize()
    assert torch.equal(there.cpu(), memory)


def test_a_finalizer_that_unregisters_too_early_is_found(cuda):
    there = torch.empty(SIZE, dtype=torch.uint8, device="sim")
    buffer = (ctypes.c_ubyte * SIZE).from_buffer(mmap.mmap(-1, SIZE))
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    register(memory)
    weakref.finalize(buffer, module().cudart().cudaHostUnregister, memory.data_ptr())
    there.copy_(memory, non_blocking=True)
    del buffer, memory  # nothing of the simulator keeps it
    with pytest.raises(cuda.RaceError, match="unregistered while in use"):
        module().synchronize()
    assert there.eq(0).all()


def test_memory_that_is_unmapped_too_early_is_found(cuda):
    there, memory = torch.empty(SIZE, dtype=torch.uint8, device="sim"), arena()
    register(memory)
    there.copy_(memory, non_blocking=True)
    del memory
    with pytest.raises(cuda.RaceError, match="freed while in use: .*by unmapping it on the host"):
        module().synchronize()


def test_torchs_own_pinned_memory_may_go_at_once(cuda):
    there, source = torch.empty(8, device="sim"), torch.ones(8).pin_memory()
    there.copy_(source, non_blocking=True)
    del source
    module().synchronize()
    assert there.tolist() == [1] * 8


def test_registered_sources_and_targets_are_watched(cuda):
    memory, there = arena(), torch.ones(SIZE // 2, dtype=torch.uint8, device="sim")
    register(memory)
    first, second = memory[: SIZE // 2], memory[SIZE // 2 :]
    there.copy_(first, non_blocking=True)
    second + 1
    with pytest.raises(cuda.RaceError, match="host write too early"):
        first.add_(1)
    second.copy_(there, non_blocking=True)
    with pytest.raises(cuda.RaceError, match="host read too early"):
        second + 1
    assert set(second.numpy()) == {255}
    first.numpy()[0] += 1
    with pytest.raises(cuda.RaceError, match="host write too early"):
        module().synchronize()
    assert not second.numpy().any()
    unregister(memory)


def test_registered_tensors_are_named(cuda):
    memory = arena().view(torch.float32)
    model = torch.nn.Linear(4, 4)
    model.weight.data, model.bias.data = memory[:16].view(4, 4), memory[16:20]
    cuda.name_tensors(model)
    register(memory)
    names = {it.tensors for it in cuda.snapshot() if it.device == "pinned" and it.nbytes == SIZE}
    assert names == {("weight", "bias")}
    unregister(memory)
