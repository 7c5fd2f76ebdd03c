"""torch's caching allocator, and how the pools of streams share a device."""

from __future__ import annotations

import gc
import itertools
import math

import pytest
import torch
from attrs import evolve
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hookcore.testing import simulator
from hookcore.testing.simulator.caching import CachingAllocator, rounded, segment_size

FOR_EACH_EXAMPLE = settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
MIB = 2**20
sizes = st.one_of(
    st.integers(1, 2000),
    st.integers(1, 3 * MIB),
    st.integers(1, 25 * MIB),
    st.sampled_from([512, MIB, 10 * MIB]),
)


def module():
    return torch.get_device_module("sim")


# The allocator by itself


@pytest.mark.parametrize(
    ("nbytes", "size", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (24 * MIB, 24 * MIB, 24 * MIB),
    ],
)
def test_sizes_are_those_of_torch(nbytes, size, segment):
    assert rounded(nbytes) == size
    assert segment_size(size) == segment


class Segments:
    """A slow allocator by the same rules: for each segment a list of its parts, (size, user or None)."""

    def __init__(self):
        self.segments = []

    def allocate(self, stream, nbytes, user):
        size = rounded(nbytes)
        pool = (stream, size <= MIB)
        free = [
            (part[0], at, index)
            for at, (owner, parts) in enumerate(self.segments)
            for index, part in enumerate(parts)
            if owner == pool and part[1] is None and part[0] >= size
        ]
        if not free:
            self.segments.append((pool, [(segment_size(size), None)]))
            free = [(segment_size(size), len(self.segments) - 1, 0)]
        whole, at, index = min(free)
        parts = self.segments[at][1]
        rest = whole - size
        if rest < 512 or (size > MIB and rest <= MIB):
            parts[index] = (whole, user)
        else:
            parts[index : index + 1] = [(size, user), (rest, None)]

    def free(self, user):
        for _, parts in self.segments:
            index = next((i for i, part in enumerate(parts) if part[1] == user), None)
            if index is not None:
                parts[index] = (parts[index][0], None)
                for i in (index, index - 1):
                    if 0 <= i < len(parts) - 1 and parts[i][1] is parts[i + 1][1] is None:
                        parts[i : i + 2] = [(parts[i][0] + parts[i + 1][0], None)]

    def release(self):
        for _, parts in self.segments:
            if len(parts) == 1 and parts[0][1] is None:
                parts.clear()  # and stays, so that addresses go on

    def size_of(self, user):
        return next(size for _, parts in self.segments for size, it in parts if it == user)

    def reserved(self, stream):
        return sum(size for owner, parts in self.segments for size, _ in parts if owner[0] == stream)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(0, 1), sizes),
        st.tuples(st.just("free"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("release"), st.just(0), st.just(0)),
    ),
    max_size=30,
)


@FOR_EACH_EXAMPLE
@given(steps)
@example(
    [("allocate", 0, 600), ("allocate", 0, 600), ("allocate", 0, 600), *[("free", it, 0) for it in (0, 1, 0)]]
)
def test_segments_are_split_joined_kept_and_released_as_by_torch(program):
    allocator, segments, chunks = CachingAllocator(), Segments(), {}
    for user, (step, argument, nbytes) in enumerate(program):
        if step == "allocate":
            segments.allocate(argument, nbytes, user)
            before = allocator.reserved.total()
            missing = allocator.missing(argument, nbytes)
            chunks[user] = allocator.allocate(argument, nbytes)
            assert allocator.reserved.total() - before == missing
        elif step == "free" and chunks:
            freed = list(chunks)[argument % len(chunks)]
            segments.free(freed)
            chunks.pop(freed).free()
        elif step == "release":
            segments.release()
            allocator.release()
        assert {it: chunk.size for it, chunk in chunks.items()} == {it: segments.size_of(it) for it in chunks}
        assert [allocator.reserved[stream] for stream in (0, 1)] == [segments.reserved(it) for it in (0, 1)]
        assert allocator.allocated == sum(chunk.size for chunk in chunks.values())
        spans = sorted((chunk.address, chunk.address + chunk.size) for chunk in chunks.values())
        assert all(low % 512 == 0 for low, _ in spans)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    for chunk in chunks.values():
        chunk.free()
    allocator.release()
    assert allocator.reserved.total() == allocator.allocated == 0


# On the device


@pytest.fixture
def cached(sim):
    with sim.limited(profile=evolve(sim.GENERIC, caching=True)):
        yield sim


@pytest.mark.parametrize("caching", [False, True])
@FOR_EACH_EXAMPLE
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * MIB), st.integers(0, 1)), max_size=12))
def test_freed_memory_stays_with_its_stream(sim, caching, program):
    """Without the cache, pools hold the most that each stream used at once; with it, its segments."""
    sim.reset()
    streams = [sim.Stream() for _ in range(2)]
    kept, peaks, allocator = ([], []), [0, 0], CachingAllocator()
    with sim.limited(profile=evolve(sim.GENERIC, caching=caching)):
        for frees, nbytes, index in program:
            if frees and kept[index]:
                chunk = kept[index].pop()[1]
                if chunk is not None:
                    chunk.free()
            else:
                with streams[index]:
                    tensor = torch.empty(nbytes, dtype=torch.uint8, device="sim")
                kept[index].append((tensor, allocator.allocate(index, nbytes) if nbytes else None))
                del tensor
            now = [sum(chunk.size if caching else it.nbytes for it, chunk in of if chunk) for of in kept]
            peaks = [max(pair) for pair in zip(peaks, now, strict=True)]
            held = [allocator.reserved[number] for number in (0, 1)] if caching else peaks
            found = {pool.stream: (pool.allocated, pool.reserved) for pool in sim.stream_pools()}
            for stream, expected in zip(streams, zip(now, held, strict=True), strict=True):
                assert found.get(stream.stream_id, (0, 0)) == expected
            assert module().memory_allocated() == sum(now)
            assert module().memory_reserved() == (sum(held) if caching else sum(now))
        del kept


def test_reserved_memory_is_not_free_until_the_cache_is_emptied(cached):
    with cached.limited(memory=100 * MIB):
        there = torch.empty(5 * MIB, dtype=torch.uint8, device="sim")
        assert module().mem_get_info() == (80 * MIB, 100 * MIB)
        assert module().memory_allocated() == 5 * MIB
        del there
        assert module().memory_reserved() == 20 * MIB
        assert module().mem_get_info() == (80 * MIB, 100 * MIB)
        module().empty_cache()
        assert module().mem_get_info() == (100 * MIB, 100 * MIB)
        assert module().max_memory_reserved() == torch.accelerator.max_memory_reserved() == 20 * MIB
        module().reset_peak_memory_stats()
        assert module().max_memory_reserved() == torch.accelerator.memory_reserved() == 0


def test_another_streams_cache_is_emptied_before_giving_up(cached):
    with cached.limited(memory=40 * MIB):
        with cached.Stream():
            torch.empty(30 * MIB, dtype=torch.uint8, device="sim")
        assert module().memory_reserved() == 30 * MIB
        there = torch.empty(30 * MIB, dtype=torch.uint8, device="sim")
        assert module().memory_reserved() == 30 * MIB
        with pytest.raises(torch.OutOfMemoryError, match=f"{30 * MIB} B reserved"):
            torch.empty(11 * MIB, dtype=torch.uint8, device="sim")
        torch.empty(9 * MIB + 1, dtype=torch.uint8, device="cpu")
        del there


def test_fragments_are_not_given_to_larger_allocations(cached):
    with cached.limited(memory=40 * MIB):
        parts = [torch.empty(5 * MIB, dtype=torch.uint8, device="sim") for _ in range(8)]
        assert module().memory_reserved() == 40 * MIB
        del parts[::2]  # half of it is free, in pieces of 5 MiB
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(6 * MIB, dtype=torch.uint8, device="sim")
        torch.empty(5 * MIB, dtype=torch.uint8, device="sim")
        del parts


def test_memory_that_record_stream_holds_comes_back_to_its_pool(cached):
    side = cached.Stream()
    there = torch.empty(MIB, dtype=torch.uint8, device="sim")
    side.wait_stream(module().current_stream())
    with side:
        there.fill_(1)
        module()._sleep(10**9)
    there.record_stream(side)
    del there
    assert module().memory_allocated() == MIB
    other = torch.empty(MIB, dtype=torch.uint8, device="sim")
    side.synchronize()
    assert module().memory_allocated() == MIB
    again = torch.empty(MIB, dtype=torch.uint8, device="sim")
    assert module().memory_reserved() == 2 * MIB
    del other, again


def test_what_was_allocated_before_still_counts(sim):
    before = torch.empty(1000, dtype=torch.uint8, device="sim")
    with sim.limited(profile=evolve(sim.GENERIC, caching=True, memory=10 * MIB)):
        assert module().memory_reserved() == 1000
        inside = torch.empty(10, dtype=torch.uint8, device="sim")
        assert module().memory_reserved() == 1000 + 2 * MIB
        del before
        assert module().memory_reserved() == 2 * MIB
    assert module().memory_allocated() == module().memory_reserved() == 512
    del inside
    gc.collect()
    assert module().memory_allocated() == 0


# Launches


@FOR_EACH_EXAMPLE
@given(st.integers(1, 8), st.lists(st.integers(0, 1), max_size=20))
def test_the_host_waits_while_the_queue_of_a_stream_is_full(sim, depth, program):
    sim.reset()
    second = 10**9
    streams = [sim.Stream() for _ in range(2)]
    with sim.limited(profile=simulator.DeviceProfile(name="queue", launch_queue=depth, launch_latency=0)):
        ends, host = ([], []), 0
        for done, index in enumerate(program, 1):  # one engine runs all
            with streams[index]:
                module()._sleep(second)
            ends[index].append(done)
            if len(ends[index]) > depth:
                host = max(host, ends[index][-depth - 1])
            assert sim.now() == pytest.approx(host, abs=0.1)


def test_the_first_launch_of_each_kernel_takes_the_host_longer(sim):
    profile = simulator.DeviceProfile(name="lazy", first_launch=1.0, launch_latency=0)
    with sim.limited(profile=profile):
        there = torch.empty(4, device="sim")
        for name, expected in (("add_", 1), ("add_", 1), ("mul_", 2), ("add_", 2)):
            getattr(there, name)(1)
            assert sim.now() == pytest.approx(expected)
        torch.empty(4, device="sim:1").add_(1)
        assert sim.now() == pytest.approx(3)
        with sim.limited(profile=profile):  # another device, which has loaded nothing
            there.add_(1)
            assert sim.now() == pytest.approx(4)
        there.add_(1)
        assert sim.now() == pytest.approx(4)


# Addresses


def _fresh(nbytes):
    """Memory of kernels, copies, constructors and storages; of a kernel whose result is not its own, too."""
    host = torch.zeros(nbytes, dtype=torch.uint8)
    made = torch.empty(nbytes, dtype=torch.uint8, device="sim")
    out = torch.add(made, 1, out=torch.empty(0, dtype=torch.uint8, device="sim"))
    resized = torch.empty(0, dtype=torch.uint8, device="sim").resize_(nbytes)
    storage = torch.UntypedStorage(nbytes, device="sim")
    return (made, made + 1, host.to("sim"), host.pin_memory().to("sim"), made.clone(), out, resized, storage)


@pytest.mark.parametrize("caching", [False, True])
@FOR_EACH_EXAMPLE
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_all_memory_of_devices_is_aligned_and_overlaps_nothing(sim, caching, sizes):
    with sim.limited(profile=evolve(sim.GENERIC, caching=caching)):
        made = [(tensor, nbytes) for nbytes in sizes for tensor in _fresh(nbytes)]
        spans = sorted((it.data_ptr(), it.data_ptr() + nbytes) for it, nbytes in made)
        assert all(start % 512 == 0 for start, _ in spans)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
        del made


@pytest.mark.parametrize("caching", [False, True])
@FOR_EACH_EXAMPLE
@given(
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]),
    st.lists(st.integers(0, 1030), min_size=1, max_size=3),
)
def test_a_trace_says_how_what_a_kernel_reads_is_aligned(sim, caching, dtype, starts):
    with sim.limited(profile=evolve(sim.GENERIC, caching=caching)):
        slab = torch.zeros(2000, dtype=dtype, device="sim")
        parts = [slab[start : start + 1] for start in starts]
        with sim.traced() as trace:
            torch.cat(parts)
            for part in parts:
                part.fill_(1)
                part.to("cpu")
        offsets = [start * dtype.itemsize for start in starts]
        expected = [math.gcd(512, *offsets)]
        for offset in offsets:
            expected += 2 * [math.gcd(512, offset)]
        assert [span.alignment for span in trace.spans] == expected
        assert all(part.data_ptr() % span == 0 for part, span in zip(parts, expected[1::2], strict=True))
        del slab, parts, part


def test_an_address_of_a_device_is_none_of_the_hosts(sim):
    tensor = torch.ones(4, device="sim")
    assert tensor.data_ptr() >= 1 << 57  # the most that Linux lets a process map
