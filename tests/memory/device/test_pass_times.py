"""What a pass took is measured by events that are known to be over."""

from __future__ import annotations

from functools import partial

import torch

from hookcore.memory.device.flat_group import FlatGroup
from hookcore.memory.device.pass_times import PassTimes


def test_a_copy_that_nothing_has_waited_for_is_left_out(sim):
    """As of a last module that the pass has not used, and whose copy was begun ahead."""
    module = torch.get_device_module("sim")
    computing, copying = module.current_stream(), sim.Stream()
    times = PassTimes(partial(sim.Event, enable_timing=True))
    source, there = torch.ones(1 << 20).pin_memory(), torch.empty(1 << 20, device="sim")
    used, unused = FlatGroup((), "used"), FlatGroup((), "unused")
    for group in (used, unused):
        copying.wait_stream(computing)
        begun = times.mark(copying)
        with module.stream(copying):
            there.copy_(source, non_blocking=True)
        times.copy(group, begun, times.mark(copying))
        if group is used:
            asked = times.mark(computing)
            computing.wait_stream(copying)
            begun = times.mark(computing)
            there.add_(1)
            times.use(group, asked, begun, times.mark(computing))
            computing.synchronize()
    times.end_pass()
    assert times.is_known
    assert [use.group for use in times.uses({used, unused})] == [used]
    copying.synchronize()
    assert times.uses({used, unused})[0].copy > 0
