"""Limits, peaks, pinned memory, snapshots, profiles, timelines, and the fixture itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from attrs.exceptions import FrozenInstanceError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hookcore.testing import simulator

FOR_EACH_EXAMPLE = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def module():
    return torch.get_device_module("sim")


# Memory


@FOR_EACH_EXAMPLE
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 300), st.integers(0, 1)), max_size=20))
def test_memory_is_counted_to_the_byte(sim, program):
    sim.reset()
    kept = ([], [])
    peaks = [0, 0]
    for frees, nbytes, device in program:
        if frees and kept[device]:
            kept[device].pop()
        else:
            kept[device].append(torch.empty(nbytes, dtype=torch.uint8, device=f"sim:{device}"))
        now = [sum(tensor.nbytes for tensor in tensors) for tensors in kept]
        peaks = [max(pair) for pair in zip(peaks, now, strict=True)]
        assert [module().memory_allocated(index) for index in range(2)] == now
        assert [module().max_memory_allocated(index) for index in range(2)] == peaks


@FOR_EACH_EXAMPLE
@given(st.integers(1, 1000), st.integers(0, 1000))
def test_what_does_not_fit_raises_and_changes_nothing(sim, capacity, nbytes):
    with sim.limited(memory=capacity):
        assert module().mem_get_info() == (capacity, capacity)
        if nbytes > capacity:
            with pytest.raises(torch.OutOfMemoryError, match=rf"sim:0 is out of memory: .*\({nbytes} B\)"):
                torch.empty(nbytes, dtype=torch.uint8, device="sim")
        else:
            there = torch.empty(nbytes, dtype=torch.uint8, device="sim")
            assert module().mem_get_info() == (capacity - nbytes, capacity)
            del there
        assert module().memory_allocated() == 0


def test_a_result_that_does_not_fit_leaves_its_inputs(sim):
    there = torch.ones(10, device="sim")
    with sim.limited(memory=60), pytest.raises(torch.OutOfMemoryError):
        there + 1
    assert (there + 1).tolist() == [2] * 10


def test_memory_that_record_stream_holds_is_waited_for_before_giving_up(sim):
    side, source = sim.Stream(), torch.ones(100).pin_memory()
    with side:
        weight = source.to("sim", non_blocking=True)
    module().current_stream().wait_stream(side)
    with sim.limited(memory=weight.nbytes + 8):
        weight.sum(0, keepdim=True)
        weight.record_stream(module().current_stream())
        del weight
        before = sim.now()
        torch.empty(100, device="sim")
        assert sim.now() > before


def test_resizing_and_out_arguments_are_counted(sim):
    there = torch.arange(4.0, device="sim")
    there.resize_(2)
    assert module().memory_allocated() == 16
    there.resize_(8)
    assert there[:2].tolist() == [0, 1]
    assert module().memory_allocated() == 32
    out = torch.empty(0, device="sim")
    torch.add(there, 1, out=out)
    assert out[:2].tolist() == [1, 2]
    assert module().memory_allocated() == 64


@pytest.mark.parametrize(
    "pin",
    [
        lambda: torch.ones(10).pin_memory(),
        lambda: torch.empty(10, pin_memory=True),
        lambda: torch.zeros(10, pin_memory=True),
        lambda: torch.full((10,), 3.0, pin_memory=True),
        lambda: torch.randn(10, pin_memory=True),
        lambda: torch.tensor([1.0] * 10, pin_memory=True),
        lambda: torch.empty_like(torch.ones(10), pin_memory=True),
        lambda: torch.empty_strided((10,), (1,), pin_memory=True),
        lambda: torch.ones(10, device="sim").to("cpu", non_blocking=True),
    ],
)
def test_pinned_memory_is_counted(sim, pin):
    before = sim.pinned_bytes()
    pinned = pin()
    assert pinned.is_pinned()
    assert pinned.device.type == "cpu"
    assert sim.pinned_bytes() - before == pinned.nbytes == 40
    del pinned
    module().synchronize()
    assert sim.pinned_bytes() == before
    assert sim.max_pinned_bytes() >= before + 40
    assert not torch.ones(10).is_pinned()
    assert torch.zeros(3, pin_memory=True).tolist() == [0, 0, 0]
    assert torch.tensor([1, 2], pin_memory=True).tolist() == [1, 2]
    assert torch.full((2,), 3, pin_memory=True, dtype=torch.float16).tolist() == [3, 3]


def test_a_snapshot_says_who_holds_what(sim):
    model = nn.Linear(4, 4).to("sim")
    sim.name_tensors(model, "model")
    other = torch.ones(100, device="sim:1")
    pinned = torch.ones(7).pin_memory()
    found = {(it.device, it.nbytes, it.tensors) for it in sim.snapshot()}
    assert {("sim:0", 64, ("model.weight",)), ("sim:0", 16, ("model.bias",)), ("sim:1", 400, ())} <= found
    assert ("pinned", 28, ()) in found
    largest = sim.snapshot()[0]
    assert str(largest) == "sim:1 400 B: unnamed (by aten.empty.memory_format)"
    del other, pinned


# Profiles and virtual time


REAL = [simulator.A100_80GB, simulator.H100_80GB, simulator.L4, simulator.RTX_4090]


@pytest.mark.parametrize("profile", REAL, ids=lambda it: it.name)
def test_real_profiles_say_where_their_figures_come_from(sim, profile):
    assert "NVIDIA" in profile.source
    with sim.limited(profile=profile):
        assert module().get_device_name() == profile.name
        assert module().mem_get_info()[1] == profile.memory
        assert module().get_device_properties().total_memory == profile.memory
    with pytest.raises(FrozenInstanceError):
        profile.memory = 3
    assert profile.with_memory("1GiB").memory == 2**30


@FOR_EACH_EXAMPLE
@given(st.integers(1, 5000), st.booleans(), st.sampled_from([simulator.GENERIC, *REAL]))
def test_copies_take_latency_and_bytes_over_bandwidth(sim, count, pinned, profile):
    source = torch.ones(count)
    if pinned:
        source = source.pin_memory()
    with sim.limited(profile=profile), sim.traced() as trace:
        source.to("sim", non_blocking=pinned)
        module().synchronize()
    (span,) = trace.spans
    bandwidth = profile.host_to_device if pinned else profile.pageable
    assert span.engine == "copy in"
    assert span.end - span.start == pytest.approx(profile.copy_latency + 4 * count / bandwidth)


def test_kernels_take_their_traffic_or_their_arithmetic(sim):
    profile = simulator.DeviceProfile(
        name="round", memory_bandwidth=1e6, flops_32=1e6, flops_16=4e6, kernel_latency=0, launch_latency=0
    )
    wide, narrow = torch.ones(100, 100, device="sim"), torch.ones(100, 100, device="sim").bfloat16()
    with sim.limited(profile=profile), sim.traced() as trace:
        wide + 1
        wide @ wide
        narrow @ narrow
    times = [span.end - span.start for span in trace.spans]
    assert times == pytest.approx([80_000 / 1e6, 2_000_000 / 1e6, 2_000_000 / 4e6])


@pytest.mark.parametrize(
    ("changes", "message"), [({"memory": -1}, "negative"), ({"flops_16": 0}, "flops_16")]
)
def test_impossible_profiles_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        simulator.DeviceProfile(name="none", **changes)


def load_and_compute(sim, prefetch):
    """Copies four weights on a side stream and multiplies by each; ahead of time, or when it is needed."""
    side, main = sim.Stream(), module().current_stream()
    weights = [torch.ones(256, 256).pin_memory() for _ in range(4)]
    there, events = {}, {}
    value = torch.ones(256, 256, device="sim")

    def load(index):
        with side:
            there[index] = weights[index].to("sim", non_blocking=True)
        events[index] = side.record_event()

    side.wait_stream(main)
    if prefetch:
        load(0)
    for index in range(4):
        if not prefetch:
            load(index)
        elif index < 3:
            load(index + 1)
        main.wait_event(events[index])
        value = value @ there[index]
        there.pop(index).record_stream(main)
        if not prefetch:
            main.synchronize()
    module().synchronize()


def test_prefetching_saves_virtual_time(sim):
    times, stalls = [], []
    for prefetch in (False, True):
        sim.reset()
        with sim.traced() as trace:
            load_and_compute(sim, prefetch)
        times.append(trace.duration)
        stalls.append(trace.stalled())
    assert times[1] < times[0]
    assert stalls[1] < stalls[0]


def test_a_trace_is_written_and_drawn(sim, tmp_path):
    with sim.traced() as trace:
        load_and_compute(sim, prefetch=True)
    written = json.loads(trace.to_chrome(tmp_path / "trace.json").read_text())["traceEvents"]
    kernels = [it for it in written if it["ph"] == "X" and it["cat"] != "stall"]
    assert [it["name"] for it in kernels] == [span.name for span in trace.spans]
    assert sum(it["dur"] for it in written if it.get("cat") == "stall") == pytest.approx(
        sum(span.stall for span in trace.spans) * 1e6
    )
    assert max(it["args"]["bytes"] for it in written if it["ph"] == "C") == module().max_memory_allocated()
    pytest.importorskip("matplotlib")
    figure = trace.draw(tmp_path / "trace.svg")
    assert "stall" in (tmp_path / "trace.svg").read_text()
    labels = [it.get_text() for it in figure.axes[0].get_yticklabels()]
    assert labels == [
        f"sim:{device} stream {number}" for device, number in sorted({s.stream for s in trace.spans})
    ]


def test_an_empty_trace_cannot_be_drawn(sim):
    with sim.traced() as trace:
        pass
    assert trace.duration == 0
    with pytest.raises(sim.SimulatorError, match="no operation ran"):
        trace.draw()


# Scopes and installing


def test_limits_end_with_their_block(sim):
    before = module().mem_get_info()
    with pytest.raises(ZeroDivisionError), sim.limited(memory="1KiB", profile=simulator.L4, strict=False):
        assert module().mem_get_info() == (1024, 1024)
        raise ZeroDivisionError
    assert module().mem_get_info() == before
    assert module().get_device_name() == "generic"


def test_a_reset_starts_anew(sim):
    side = sim.Stream("sim:1")
    kept = torch.ones(100, device="sim:1")
    with side:
        event = side.record_event()
    torch.ones(1000, device="sim:1")
    module().set_device(1)
    module().set_stream(side)
    module().synchronize()
    old = sim.now()
    assert old > 0
    sim.reset()
    assert sim.now() == 0
    assert module().current_device() == 0
    assert module().current_stream("sim:1") == module().default_stream("sim:1")
    assert module().max_memory_allocated(1) == kept.nbytes
    with sim.traced() as trace:
        module().current_stream("sim:1").wait_event(event)  # of before: it keeps nobody waiting
        kept + 1
    (span,) = trace.spans
    assert 0 < span.start == span.ready < old
    assert [time <= sim.now() for _, time, _ in trace.memory] == [True] * len(trace.memory)


def test_nobody_waits_for_what_was_over_before_a_reset(sim):
    kept = torch.ones(100, device="sim")
    for _ in range(3):
        kept.mul_(2)
    sim.reset()
    with sim.Stream():
        kept.mul_(2)
        other = torch.empty(100, device="sim")
    module().synchronize()
    del other


def test_another_number_of_devices_is_refused(sim):
    with pytest.raises(sim.SimulatorError, match="installed with devices=2, which cannot be changed"):
        sim.install(devices=3)
    with pytest.raises(ValueError, match="devices is 0"):
        sim.install(devices=0)


def test_installing_again_sets_memory_and_profile(sim):
    with sim.limited():
        sim.install(devices=2, memory="2KiB", profile=simulator.L4)
        assert module().mem_get_info() == (2048, 2048)
        assert module().get_device_name() == "NVIDIA L4"
        sim.install(devices=2)  # names neither
        assert module().mem_get_info() == (2048, 2048)
        assert module().get_device_name() == "NVIDIA L4"


# Devices that lack something


def public_names():
    return {name for name in vars(module()) if not name.startswith("_")}


@FOR_EACH_EXAMPLE
@given(st.frozensets(st.sampled_from(sorted(simulator.STREAM_NAMES | {"mem_get_info", "memory_reserved"}))))
def test_the_device_module_lacks_what_its_profile_lacks(sim, lacks):
    before = public_names()
    with pytest.raises(ZeroDivisionError):
        with sim.limited(profile=simulator.DeviceProfile(name="bare", lacks=lacks)):
            assert public_names() == (before | simulator.CUDA_NAMES) - lacks
            with sim.limited(memory=100):
                assert not any(hasattr(module(), name) for name in lacks)
            raise ZeroDivisionError
    assert public_names() == before


def test_a_device_without_streams_copies_and_computes(sim):
    with sim.limited(profile=sim.NO_STREAMS):
        assert not torch.ones(3).pin_memory().is_pinned()
        assert not torch.ones(3, pin_memory=True).is_pinned()
        there = torch.ones(3).pin_memory().to("sim", non_blocking=True) + 1
        assert there.to("cpu", non_blocking=True).tolist() == [2, 2, 2]
        torch.accelerator.synchronize()
        assert torch.accelerator.current_stream() == torch.accelerator.current_stream("sim")
        with pytest.raises(RuntimeError, match="doesn't support create a new Stream"):
            torch.Stream("sim")
        with pytest.raises(RuntimeError, match="doesn't support events"):
            torch.Event("sim").record()
        assert sim.pinned_bytes() == 0


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_using_it_before_installing_says_what_to_do():
    result = run_python("import hookcore.testing.simulator as sim; sim.snapshot()")
    assert "the simulator is not installed. Call hookcore.testing.simulator.install() first" in result.stderr


def test_a_slot_that_is_taken_is_left_alone():
    code = "import torch, hookcore.testing.simulator as sim; torch.utils.rename_privateuse1_backend('mine')\n"
    assert "is taken by 'mine'" in run_python(code + "sim.install()").stderr


def test_gradients_work_also_where_torch_made_its_threads_before():
    code = (
        "import torch, hookcore.testing.simulator as sim\n"
        "torch.ones(2, requires_grad=True).sum().backward()\n"
        "sim.install()\n"
        "weight = torch.ones(2, device='sim', requires_grad=True)\n"
        "(weight * 2).sum().backward()\n"
        "assert weight.grad.tolist() == [2, 2]\n"
    )
    assert run_python(code).stderr == ""


pytest_plugins = ["pytester"]


def test_the_fixture_fails_a_test_for_what_is_found_late(pytester):
    pytester.makepyfile(
        """
        import torch

        def test_late(sim):
            side = sim.Stream()
            with side:
                weight = torch.ones(9).pin_memory().to("sim", non_blocking=True)
            torch.get_device_module("sim").current_stream().wait_stream(side)
            weight + 1
            del weight

        def test_failing(sim):
            kept = torch.ones(9, device="sim")
            raise ValueError(kept)

        def test_next(sim):
            assert sim.violations() == ()
            assert sim.now() == 0
            assert torch.get_device_module("sim").memory_allocated() == 0
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*RaceError: freed while in use*"])
