"""What must wait and doesn't is found, and what waits is not: each rule as people break and keep it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hookcore.testing.simulator import RaceError

SIZE = 64


@pytest.fixture
def side(sim):
    return sim.Stream()


@pytest.fixture
def main(sim):
    return torch.get_device_module("sim").current_stream()


@pytest.fixture
def source(sim):
    return torch.randn(SIZE, SIZE).pin_memory()


def bring(stream, source, *, non_blocking=True):
    with stream:
        return source.to("sim", non_blocking=non_blocking)


def race(rule, *names):
    return pytest.raises(RaceError, match="(?s)" + ".*".join((rule, *names)))


# Reading and writing on two streams


def test_reading_what_another_stream_copies(side, source):
    weight = bring(side, source)
    expected = (
        "of 16384 B on sim:0",
        "by aten.add.Tensor on stream 0 of sim:0",
        f"copy to the device on stream {side.stream_id} of sim:0",
    )
    with race("read before it was written", *expected):
        weight + 1


def test_waiting_for_an_event_keeps_order_both_ways(side, main, source):
    weight = bring(side, source)
    main.wait_event(side.record_event())
    assert (weight + 1).cpu().equal(source + 1)
    side.wait_event(main.record_event())
    del weight


def test_waiting_for_a_stream_keeps_order_both_ways(side, main, source):
    weight = bring(side, source)
    main.wait_stream(side)
    assert (weight + 1).cpu().equal(source + 1)
    side.wait_stream(main)
    del weight


@pytest.mark.parametrize("how", ["stream", "event", "device"])
def test_a_host_that_waits_keeps_order(sim, side, main, source, how):
    weight = bring(side, source)
    event = side.record_event()
    {"stream": side, "event": event, "device": torch.get_device_module("sim")}[how].synchronize()
    result = weight + 1
    main.synchronize()
    del weight
    assert result.cpu().equal(source + 1)


def test_an_event_recorded_before_the_copy_is_no_use(side, main, source):
    event = side.record_event()
    weight = bring(side, source)
    main.wait_event(event)
    with race("read before it was written"):
        weight + 1


def test_an_event_covers_what_came_before_it_only(side, main, source):
    first = bring(side, source)
    main.wait_event(side.record_event())
    second = bring(side, source)
    first + 1
    with race("read before it was written"):
        second + 1
    torch.get_device_module("sim").synchronize()


def test_order_is_handed_on_by_a_third_stream(sim, side, main, source):
    third = sim.Stream()
    weight = bring(side, source)
    third.wait_stream(side)
    main.wait_event(third.record_event())
    weight + 1
    main.synchronize()


def test_an_event_that_was_polled_until_true_keeps_order(side, main, source):
    weight = bring(side, source)
    event = side.record_event()
    polls = 0
    while not event.query():
        polls += 1
    assert polls > 0
    weight + 1
    main.synchronize()


def test_overwriting_what_is_still_read(sim, side, main, source):
    buffer = torch.empty(SIZE, SIZE, device="sim")
    side.wait_stream(main)
    with side:
        buffer.copy_(source, non_blocking=True)
    main.wait_stream(side)
    buffer @ buffer
    with race("overwritten while in use", "copy to the device", "aten.mm"), side:
        buffer.copy_(source, non_blocking=True)


def test_two_streams_writing_at_once(sim, side, main, source):
    buffer = torch.empty(SIZE, SIZE, device="sim")
    side.wait_stream(main)
    buffer.fill_(1)
    with race("written twice at once", "aten.fill_", "aten.mul_|aten.fill_"), side:
        buffer.fill_(2)


def test_two_streams_reading_at_once_is_fine(sim, side, main):
    weight = torch.ones(SIZE, device="sim")
    side.wait_stream(main)
    weight + 1
    with side:
        other = weight + 2
    main.wait_stream(side)
    side.wait_stream(main)
    del other


def test_other_slots_of_one_slab_are_other_memory(sim, side, main, source):
    allocator = torch.empty(2, SIZE, SIZE, device="sim")
    side.wait_stream(main)
    with side:
        allocator[0].copy_(source, non_blocking=True)
    main.wait_stream(side)
    allocator[0] @ allocator[0]
    with side:
        allocator[1].copy_(source, non_blocking=True)
    with race("read before it was written"):
        allocator[1] + 1
    torch.get_device_module("sim").synchronize()


def test_a_row_and_a_column_that_cross_share_memory(sim, side, main):
    matrix = torch.ones(SIZE, SIZE, device="sim")
    side.wait_stream(main)
    matrix[:, 0] + 1
    with race("overwritten while in use"), side:
        matrix[SIZE - 1].zero_()
    main.synchronize()


def test_using_memory_on_another_stream_than_it_was_allocated_on(sim, side, main, source):
    torch.ones(1, device="sim")  # the main stream has something to do
    buffer = torch.empty(SIZE, SIZE, device="sim")
    with race("written twice at once", "allocating it"), side:
        buffer.copy_(source, non_blocking=True)


def test_a_race_stays_one_under_autograd(side, source):
    weight = bring(side, source)
    inputs = torch.ones(2, SIZE, device="sim", requires_grad=True)
    with race("read before it was written"):
        nn.functional.linear(inputs, weight)


# Copies


def test_pageable_memory_promises_no_order(side):
    weight = bring(side, torch.randn(SIZE))
    with race("read before it was written"):
        weight + 1


def test_a_blocking_copy_is_there(side, main):
    weight = bring(side, torch.randn(SIZE), non_blocking=False)
    weight + 1
    main.synchronize()


def test_a_copy_to_another_device_waits_for_both(sim):
    first = torch.randn(SIZE, device="sim:0")
    second = first.to("sim:1")
    assert second.device == torch.device("sim:1")
    assert (second + 1).cpu().equal(first.cpu() + 1)
    second + 1
    second.copy_(first + 2)
    assert second.cpu().equal(first.cpu() + 2)


def test_an_event_of_one_device_is_waited_for_on_another(sim):
    first, second = sim.Stream("sim:0"), sim.Stream("sim:1")
    source = torch.ones(SIZE).pin_memory()
    here, there = torch.empty(SIZE).pin_memory(), torch.zeros(SIZE, device="sim:1")
    torch.get_device_module("sim").synchronize("sim:1")
    with first:
        here.copy_(source.to("sim:0", non_blocking=True), non_blocking=True)
    names = (f"on stream {second.stream_id} of sim:1", f"on stream {first.stream_id} of sim:0")
    with race("read before it was written", *names), second:
        there.copy_(here, non_blocking=True)
    second.wait_event(first.record_event())
    with second:
        there.copy_(here, non_blocking=True)
    second.synchronize()
    assert there.eq(1).all()


def test_reading_a_copy_to_the_host_too_early(sim, main):
    there = torch.ones(SIZE, device="sim")
    here = there.to("cpu", non_blocking=True)
    assert here.is_pinned()
    with race("host read too early", "pinned", "aten.add", "on the host", "copy to the host on stream 0"):
        here + 1
    main.synchronize()
    assert (here + 1).eq(2).all()


def test_what_is_read_too_early_unseen_is_poison(sim, main):
    here = torch.ones(SIZE, device="sim").to("cpu", non_blocking=True)
    assert all(value != value for value in here.numpy())  # noqa: PLR0124 - NaN
    main.synchronize()
    assert here.eq(1).all()


def test_a_copy_to_the_host_lands_when_the_host_knows_of_it(sim, side, main):
    first, second = torch.ones(SIZE, device="sim"), torch.ones(SIZE, device="sim")
    side.wait_stream(main)
    here = first.to("cpu", non_blocking=True)
    with side:
        other = second.to("cpu", non_blocking=True)
    side.synchronize()
    assert (other.numpy() == 1).all()
    assert not (here.numpy() == 1).any()
    main.synchronize()
    assert (here.numpy() == 1).all()


def test_a_copy_to_the_host_brings_what_was_there_when_it_ran(main):
    there = torch.ones(SIZE, device="sim")
    here = there.to("cpu", non_blocking=True)
    there.zero_()
    main.synchronize()
    assert here.eq(1).all()


def test_a_blocking_copy_to_the_host_is_there(sim):
    assert torch.ones(SIZE, device="sim").cpu().eq(1).all()


def test_a_copy_to_the_host_and_back_on_one_stream_needs_no_host(sim, side, main):
    there = torch.arange(SIZE, device="sim")
    side.wait_stream(main)
    with side:
        back = there.to("cpu", non_blocking=True).to("sim", non_blocking=True)
    side.synchronize()
    assert back.equal(there)


def test_a_copy_to_the_host_and_back_on_two_streams_races(sim, side, main):
    here = torch.ones(SIZE, device="sim").to("cpu", non_blocking=True)
    with race("read before it was written", "pinned"), side:
        here.to("sim", non_blocking=True)


def test_overwriting_a_pinned_source_that_is_being_read(side, source):
    weight = bring(side, source)
    with race("host write too early", "aten.zero_|aten.fill_", "on the host", "copy to the device"):
        source.zero_()
    side.synchronize()
    source.zero_()
    del weight


def test_overwriting_a_pinned_source_unseen_is_found_when_the_copy_is_waited_for(side, source):
    weight = bring(side, source)
    source.numpy()[3] = 0
    with race("host write too early", "copy to the device"):
        side.synchronize()
    del weight


# Freeing


def test_freeing_what_another_stream_reads(sim, side, main, source):
    weight = bring(side, source)
    main.wait_stream(side)
    weight @ weight
    del weight
    (found,) = sim.violations()
    assert found.rule == "freed while in use"
    assert found.earlier == "aten.mm.default"
    assert found.earlier_stream == (0, 0)
    with race("freed while in use", "record_stream"):
        torch.ones(1, device="sim")


def test_freeing_after_record_stream_holds_the_memory(sim, side, main, source):
    module = torch.get_device_module("sim")
    weight = bring(side, source)
    main.wait_stream(side)
    result = weight @ weight
    weight.record_stream(main)
    before = module.memory_allocated()
    del weight
    assert module.memory_allocated() == before
    main.synchronize()
    assert module.memory_allocated() == before - source.nbytes
    del result


def test_swapping_data_back_frees_the_copy(side, main, source):
    parameter = nn.Parameter(source)
    with side:
        parameter.data = source.to("sim", non_blocking=True)
    main.wait_stream(side)
    parameter.detach() @ parameter.detach()
    parameter.data = source
    with race("freed while in use"):
        torch.ones(1, device="sim")


def test_freeing_on_the_stream_that_used_it_is_fine(sim):
    weight = torch.ones(SIZE, SIZE, device="sim")
    weight @ weight
    del weight
    assert sim.violations() == ()


def test_uninitialised_memory_is_poison(sim):
    assert torch.empty(SIZE, device="sim").cpu().isnan().all()
    assert (torch.empty(SIZE, device="sim", dtype=torch.int64).cpu() == -1).all()


# Saying where


def test_errors_name_the_parameter(sim, side, source):
    model = nn.ModuleDict({"block": nn.Linear(SIZE, SIZE)})
    sim.name_tensors(model, "transformer")
    weight = model["block"].weight
    weight.data = weight.data.pin_memory()
    copy = bring(side, weight.data)
    with race("read before it was written", "'transformer.block.weight'"):
        copy + 1
    weight.data = copy
    with race("read before it was written", "'transformer.block.weight'"):
        weight.detach() + 1
    side.synchronize()
    weight.data = torch.zeros(1)


def test_without_strictness_all_is_kept(sim, side, source):
    with sim.limited(strict=False):
        weight = bring(side, source)
        weight + 1
        weight + 2
        torch.ones(1, device="sim")
        assert [it.rule for it in sim.violations()] == ["read before it was written"] * 2
        with pytest.raises(RaceError) as raised:
            sim.check()
        assert len(raised.value.violations) == 2


# A layer on another stream than the model that calls it


class OnSide(nn.Module):
    """Calls a layer on a side stream, as one has to: each stream waits for the other."""

    def __init__(self, side):
        super().__init__()
        self.side, self.layer = side, nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x):
        main = torch.get_device_module("sim").current_stream()
        self.side.wait_stream(main)
        with self.side:
            out = self.layer(x)
        main.wait_stream(self.side)
        return out


def run_layer(sim, model, source, *, reads, writes):
    """Brings the layer's weight ahead of its call, and the next weight into its place after it.

    Args:
        sim: The simulator.
        model: The model.
        source: The weights.
        reads: The stream that waits for the weight at the layer's call.
        writes: The stream that the copies wait for at the end of that call.
    """
    copies, layer = sim.Stream(), model.layer
    layer.weight.data = torch.empty(SIZE, SIZE, device="sim")
    copies.wait_stream(torch.get_device_module("sim").current_stream())

    def bring_and_wait(module, args):
        with copies:
            layer.weight.data.copy_(source, non_blocking=True)
        reads.wait_stream(copies)

    def bring_next(module, args, out):
        copies.wait_stream(writes)
        with copies:
            layer.weight.data.copy_(source, non_blocking=True)

    layer.register_forward_pre_hook(bring_and_wait)
    layer.register_forward_hook(bring_next)
    try:
        with torch.no_grad():
            model(torch.ones(1, SIZE, device="sim"))
    finally:
        torch.get_device_module("sim").synchronize()


def test_a_layer_on_a_side_stream_reads_what_that_stream_waited_for(sim, side, main, source):
    run_layer(sim, OnSide(side), source, reads=side, writes=side)
    with race("read before it was written", f"on stream {side.stream_id} of sim:0"):
        run_layer(sim, OnSide(side), source, reads=main, writes=side)


def test_what_a_layer_reads_on_a_side_stream_is_kept_until_that_stream_is_done(sim, side, main, source):
    with race("overwritten while in use", f"mm.* on stream {side.stream_id} of sim:0"):
        run_layer(sim, OnSide(side), source, reads=side, writes=main)
