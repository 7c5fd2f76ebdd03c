"""What may not be done while a graph is captured, by the rules of CUDA."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookcore.testing.simulator import CudaError, UnsupportedOperationError

FOR_EACH_EXAMPLE = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
NOT_PERMITTED = "operation not permitted when stream is capturing"
BROKEN = "operation failed due to a previous error during capture"
UNCAPTURED = "dependency created on uncaptured work in another stream"
CAPTURED_EVENT = "operation not permitted on an event last recorded in a capturing stream"


def module():
    return torch.get_device_module("sim")


@pytest.fixture
def cuda(sim):
    with sim.limited(profile=sim.CUDA_CACHING):
        yield sim


class Scene:
    """Streams and events; only `captured` is captured, until `forked` waits for it."""

    def __init__(self, sim):
        self.sim = sim
        self.captured, self.forked, self.other = (sim.Stream() for _ in range(3))
        self.weight = torch.ones(4, device="sim")
        self.pinned = torch.ones(4).pin_memory()
        self.timed, self.late = sim.Event(enable_timing=True), sim.Event()
        self.timed.record()
        self.late.record()
        self.graph = module().CUDAGraph()
        module().synchronize()

    def begin(self, mode="global"):
        self.captured.__enter__()
        self.graph.capture_begin(capture_error_mode=mode)

    def end(self):
        try:
            self.graph.capture_end()
        finally:
            self.captured.__exit__()


def _record_and_wait_for_it(scene):
    scene.captured.record_event().synchronize()


def _time(scene):
    end = scene.sim.Event(enable_timing=True)
    end.record(scene.captured)
    scene.timed.elapsed_time(end)


def _join_another_capture(scene):
    with scene.other:
        module().CUDAGraph().capture_begin()
    scene.captured.wait_stream(scene.other)


FORBIDDEN = {
    "device.synchronize": (lambda scene: module().synchronize(), NOT_PERMITTED),
    "stream.synchronize": (lambda scene: scene.captured.synchronize(), NOT_PERMITTED),
    "stream.query": (lambda scene: scene.captured.query(), NOT_PERMITTED),
    "empty_cache": (lambda scene: module().empty_cache(), NOT_PERMITTED),
    "item": (lambda scene: (scene.weight + 1).sum().item(), NOT_PERMITTED),
    "nonzero": (lambda scene: scene.weight.nonzero(), NOT_PERMITTED),
    "mask": (lambda scene: scene.weight[scene.weight > 0], NOT_PERMITTED),
    "to the host": (lambda scene: scene.weight.cpu(), NOT_PERMITTED),
    "from the host": (lambda scene: torch.ones(4).to("sim"), NOT_PERMITTED),
    "from pageable memory": (lambda scene: torch.ones(4).to("sim", non_blocking=True), NOT_PERMITTED),
    "from pinned memory, blocking": (lambda scene: scene.pinned.to("sim"), NOT_PERMITTED),
    "another stream": (lambda scene: scene.captured.wait_stream(scene.other), UNCAPTURED),
    "an event from before": (lambda scene: scene.captured.wait_event(scene.late), UNCAPTURED),
    "an event of its own": (_record_and_wait_for_it, CAPTURED_EVENT),
    "a time of its own": (_time, CAPTURED_EVENT),
    "another capture": (_join_another_capture, "merge of separate capture sequences"),
    "the default stream": (
        lambda scene: module().default_stream().wait_stream(scene.captured),
        "would make the legacy stream depend",
    ),
}
UNSAFE = {
    "stream.synchronize": lambda scene: scene.other.synchronize(),
    "stream.query": lambda scene: scene.other.query(),
    "event.synchronize": lambda scene: scene.late.synchronize(),
    "event.query": lambda scene: scene.late.query(),
}


def _fork_and_join(scene):
    scene.forked.wait_stream(scene.captured)
    with scene.forked:
        scene.weight + 1
    scene.captured.wait_event(scene.forked.record_event())


def _work_elsewhere(scene):
    with scene.other:
        torch.ones(4, device="sim") + 1


ALLOWED = {
    "kernel": lambda scene: scene.weight * 2,
    "allocation": lambda scene: torch.empty(8, device="sim"),
    "copy from pinned memory": lambda scene: scene.pinned.to("sim", non_blocking=True),
    "copy to pinned memory": lambda scene: scene.weight.to("cpu", non_blocking=True),
    "copy on the device": lambda scene: scene.weight.clone(),
    "wait for its own event": lambda scene: scene.captured.wait_event(scene.captured.record_event()),
    "wait for an event that was never recorded": lambda scene: scene.captured.wait_event(scene.sim.Event()),
    "fork and join": _fork_and_join,
    "work elsewhere": _work_elsewhere,
}
allowed = st.lists(st.sampled_from(sorted(ALLOWED)), max_size=4)


@FOR_EACH_EXAMPLE
@given(allowed)
def test_what_is_allowed_is_captured_and_takes_no_time(cuda, steps):
    cuda.reset()
    scene = Scene(cuda)
    scene.begin()
    with cuda.traced() as trace:
        for name in steps:
            assert module().is_current_stream_capturing()
            assert scene.captured.is_capturing()
            assert not scene.other.is_capturing()
            ALLOWED[name](scene)
    elsewhere = (0, scene.other.stream_id)
    assert all(span.stream == elsewhere for span in trace.spans)
    scene.end()
    assert not scene.captured.is_capturing()
    assert not scene.forked.is_capturing()
    module().synchronize()


@FOR_EACH_EXAMPLE
@given(allowed, st.sampled_from(sorted(FORBIDDEN)), st.sampled_from(sorted(FORBIDDEN)))
def test_what_is_forbidden_raises_and_breaks_the_capture(cuda, before, forbidden, after):
    cuda.reset()
    scene = Scene(cuda)
    scene.begin("relaxed")
    for name in before:
        ALLOWED[name](scene)
    step, message = FORBIDDEN[forbidden]
    with pytest.raises(torch.AcceleratorError, match=message):
        step(scene)
    for again in (ALLOWED["kernel"], ALLOWED["wait for its own event"]):
        with pytest.raises(torch.AcceleratorError, match=BROKEN):
            again(scene)
    with pytest.raises(torch.AcceleratorError):
        FORBIDDEN[after][0](scene)
    with pytest.raises(torch.AcceleratorError, match=BROKEN):
        scene.end()
    cuda.reset()  # ends the other capture, where there is one
    scene.captured.synchronize()
    with scene.captured:
        assert (scene.weight + 1).sum().item() == 8


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
@pytest.mark.parametrize("same_thread", [True, False])
@pytest.mark.parametrize("name", UNSAFE)
def test_waiting_for_what_is_not_captured_is_unsafe(cuda, mode, same_thread, name):
    scene = Scene(cuda)
    is_broken = mode == "global" or (mode == "thread_local" and same_thread)
    raised = []

    def wait():
        try:
            UNSAFE[name](scene)
        except torch.AcceleratorError as error:
            raised.append(str(error))

    scene.begin(mode)
    if same_thread:
        wait()
    else:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    assert raised == ([f"CUDA error: {NOT_PERMITTED}"] if is_broken else [])
    if is_broken:
        with pytest.raises(torch.AcceleratorError, match=BROKEN):
            scene.end()
    else:
        scene.end()


def test_page_locking_is_unsafe_and_done_when_the_capture_is_over(cuda):
    scene, runtime, memory = Scene(cuda), module().cudart(), torch.ones(1 << 14)
    scene.begin()
    error = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    assert error == CudaError.streamCaptureUnsupported
    assert not memory.is_pinned()
    with pytest.raises(torch.AcceleratorError, match=BROKEN):
        scene.end()
    with pytest.raises(torch.AcceleratorError, match=NOT_PERMITTED):
        scene.weight + 1  # the error that was pending
    assert runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0) == CudaError.success
    scene = Scene(cuda)
    scene.begin()
    assert runtime.cudaHostUnregister(memory.data_ptr()) == CudaError.streamCaptureUnsupported
    assert memory.is_pinned()
    with pytest.raises(torch.AcceleratorError, match=BROKEN):
        scene.end()
    assert runtime.cudaHostUnregister(memory.data_ptr()) == CudaError.success
    cuda.reset()


def test_what_was_forked_has_to_be_joined(cuda):
    scene = Scene(cuda)
    scene.begin()
    scene.forked.wait_stream(scene.captured)
    assert scene.forked.is_capturing()
    with scene.forked:
        scene.weight + 1
    with pytest.raises(torch.AcceleratorError, match="unjoined work"):
        scene.end()
    assert not scene.forked.is_capturing()
    module().synchronize()


def test_a_capture_ends_where_it_began(cuda):
    scene = Scene(cuda)
    with pytest.raises(RuntimeError, match="must end on the same stream"):
        scene.graph.capture_end()
    with pytest.raises(RuntimeError, match="must be captured on a non-default stream"):
        scene.graph.capture_begin()
    scene.begin()
    with pytest.raises(torch.AcceleratorError, match="cannot be performed in the present state"):
        module().CUDAGraph().capture_begin()
    scene.forked.wait_stream(scene.captured)
    with scene.forked, pytest.raises(RuntimeError, match="must end on the same stream"):
        scene.graph.capture_end()
    scene.end()


def test_an_event_of_a_capture_that_is_over_cannot_be_waited_for(cuda):
    scene = Scene(cuda)
    scene.begin()
    event = scene.captured.record_event()
    scene.end()
    for wait in (event.synchronize, event.query, lambda: scene.other.wait_event(event)):
        with pytest.raises(torch.AcceleratorError, match=CAPTURED_EVENT):
            wait()
    event.record()
    event.synchronize()


def test_no_memory_is_waited_for_during_a_capture(cuda):
    with cuda.limited(profile=cuda.CUDA_CACHING, memory="2MiB"):
        torch.ones(4, device="sim")  # its segment stays with the default stream
        side = cuda.Stream()
        with pytest.raises(torch.OutOfMemoryError):
            side.__enter__()
            graph = module().CUDAGraph()
            graph.capture_begin()
            torch.empty(4, device="sim")
        graph.capture_end()
        side.__exit__()
        with side:
            torch.empty(4, device="sim")


def test_the_block_form_captures_on_a_stream_of_its_own(cuda):
    weight, graph = torch.ones(4, device="sim"), module().CUDAGraph()
    before = module().current_stream()
    with module().graph(graph):
        assert module().is_current_stream_capturing()
        assert module().current_stream() != before
        weight + 1
    assert not module().is_current_stream_capturing()
    assert module().current_stream() == before
    with pytest.raises(UnsupportedOperationError, match="cannot replay"):
        graph.replay()
    with pytest.raises(ValueError, match="capture_error_mode is 'strict', expected one of global"):
        with module().graph(graph, capture_error_mode="strict"):
            pass
    with pytest.raises(torch.AcceleratorError, match=BROKEN):
        with module().graph(graph):
            weight.cpu()
    assert module().current_stream() == before


def test_races_are_found_during_a_capture(cuda):
    side, source = cuda.Stream(), torch.ones(4).pin_memory()
    with side:
        weight = source.to("sim", non_blocking=True)
    other, graph = cuda.Stream(), module().CUDAGraph()
    with other:
        graph.capture_begin()
        with pytest.raises(cuda.RaceError, match="read before it was written"):
            weight + 1
        graph.capture_end()
    module().synchronize()
