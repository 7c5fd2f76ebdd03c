"""Groups streamed to the simulated device: right whatever is called and edited, and never waited for."""

from __future__ import annotations

import contextlib
import gc
import itertools
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import hookcore
from hookcore import BudgetError
from hookcore.memory.device import copy_engine as engine
from hookcore.memory.device import pinned_memory as host
from hookcore.memory.device import stream_mover as stream
from hookcore.memory.planning.pool_layout import choose_layout
from hookcore.testing import simulator
from hookcore.testing.modules import Counter
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import GroupOffload, LayerwiseCasting

FOR_EACH_EXAMPLE = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WIDTH = 16


class Block(nn.Module):
    """Layers of different sizes, registered in another order than they run."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks that can be left out, a layer with a buffer only, and a weight that is used twice."""

    def __init__(self, blocks=6):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.stem.weight
        self.count = Counter(WIDTH)

    def forward(self, x, skip=(), backwards=False, fails_at=None):
        x = self.stem(self.count(x))
        order = range(len(self.blocks))
        for number in reversed(order) if backwards else order:
            if number == fails_at:
                raise BoomError
            if number not in skip:
                x = self.blocks[number](x)
        return self.head(x)


class BoomError(Exception):
    pass


def build(blocks=6, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(blocks)


def weights(model):
    return sum({it.data_ptr(): it.nbytes for it in model.parameters()}.values())


def mover_of(applied):
    return next(iter(applied._attachments)).bindings[0].hook._placement.mover


X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


def call(model, device="sim", **options):
    with torch.no_grad():
        return model(X.to(device), **options)


# Whatever is called and edited

calls = st.fixed_dictionaries(
    {},
    optional={
        "skip": st.sets(st.integers(0, 5), max_size=3),
        "backwards": st.just(True),
        "fails_at": st.integers(0, 5),
    },
)
edits = st.sampled_from(["in place", "through data", "new data", "loaded", "held", "none"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("call"), calls),
        st.tuples(st.just("call"), st.just({})),
        st.tuples(st.just("edit"), st.tuples(edits, st.integers(0, 5))),
        st.tuples(st.just("block"), st.integers(0, 5)),
        st.tuples(st.just("gradients"), st.none()),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("other_stream"), st.none()),
    ),
    max_size=12,
)
techniques = st.builds(
    lambda level, budget, prefetch: GroupOffload(
        "sim", offload_type=level, memory_budget=budget, prefetch=prefetch
    ),
    st.sampled_from(["auto", "block_level"]),
    st.none() | st.integers(12_000, 60_000),
    st.none() | st.integers(0, 5),
)


def edit(model, how, number, held):
    module = model.blocks[number].up
    with torch.no_grad():
        if how == "in place":
            module.weight.mul_(2)
        elif how == "through data":
            module.weight.data += 1
        elif how == "new data":
            module.weight.data = module.weight.data.cpu() / 2
        elif how == "loaded":
            model.load_state_dict({name: it.cpu() / 2 for name, it in model.state_dict().items()})
        elif how == "held":  # as optimizers hold them
            held[number].mul_(0.5)


class Twins:
    """A model with a technique and its bare twin, to which the same is done."""

    def __init__(self, technique):
        self.model, self.bare = build(), build()
        self.applied = hookcore.apply(self.model, [technique])
        self.held = [[block.up.bias for block in it.blocks] for it in (self.model, self.bare)]
        self.outputs = []
        self.module = torch.get_device_module("sim")
        self.streams = [self.module.current_stream(), torch.Stream("sim")]

    def call(self, options):
        try:
            expected = call(self.bare, "cpu", **options)
        except BoomError:
            with pytest.raises(BoomError):
                call(self.model, **options)
        else:
            self.outputs.append((call(self.model, **options), expected))

    def edit(self, what):
        if what[0] == "held":  # nobody is told of it, so no copy may be under way
            self.module.synchronize()
        for it, held in zip((self.model, self.bare), self.held, strict=True):
            edit(it, *what, held)

    def block(self, number):
        with torch.no_grad():
            found = self.model.blocks[number](X.to("sim"))
            self.outputs.append((found, self.bare.blocks[number](X)))

    def gradients(self, _):
        for it, x in ((self.model, X.to("sim")), (self.bare, X)):
            it(x).square().sum().backward()
        for ours, theirs in zip(self.model.parameters(), self.bare.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
            ours.grad = theirs.grad = None

    def reset(self, _):
        self.applied.reset()

    def other_stream(self, _):
        self.module.synchronize()
        self.streams.reverse()
        self.module.set_stream(self.streams[0])

    def finish(self):
        self.module.set_stream(min(self.streams, key=lambda it: it.stream_id))
        self.module.synchronize()
        for ours, theirs in self.outputs:
            assert same_bits(ours.cpu(), theirs)

    def bytes_on_device(self):
        tensors = (*self.model.parameters(), *self.model.buffers())
        here = {id(it): it.nbytes for it in tensors if it.device.type == "sim"}
        return sum(here.values()) + mover_of(self.applied)._engine.allocator.size

    def remove(self):
        self.applied.remove()
        states = [it.state_dict() for it in (self.model, self.bare)]
        for name, theirs in states[1].items():
            assert states[0][name].device.type == "cpu", name
            assert same_bits(states[0][name], theirs), name
        assert self.model.head.weight is self.model.stem.weight


@FOR_EACH_EXAMPLE
@given(steps, techniques)
def test_outputs_are_those_of_the_bare_model(sim, steps, technique):
    twins = Twins(technique)
    for kind, what in [*steps, ("call", {})]:
        getattr(twins, kind)(what)
    twins.finish()
    if technique.memory_budget is not None:
        assert twins.bytes_on_device() <= technique.memory_budget
    twins.remove()


def test_what_was_copied_ahead_is_used_on_another_stream(sim):
    twins = Twins(GroupOffload("sim", prefetch=1))
    for step in (twins.call, twins.call, twins.other_stream, twins.call):
        step({})
    twins.finish()
    twins.remove()


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_a_change_that_torch_counts_is_seen_whoever_makes_it(sim, prefetch):
    """Through references from before, so that nobody is told of it."""
    model, bare = build(), build()
    held = {name: list(it.parameters()) for name, it in (("model", model), ("bare", bare))}
    hookcore.apply(model, [GroupOffload("sim", prefetch=prefetch)])
    for _ in range(4):
        assert same_bits(call(model).cpu(), call(bare, "cpu"))
        torch.get_device_module("sim").synchronize()  # as with memory of one's own that is being copied
        for parameters in held.values():
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(0.75)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_what_autograd_keeps_is_not_overwritten_by_later_calls(sim, prefetch):
    model, bare = build(), build()
    hookcore.apply(model, [GroupOffload("sim", prefetch=prefetch)])
    outputs = []
    for root, device in ((model, "sim"), (bare, "cpu")):
        for _ in range(2):
            call(root, device)  # the last one copies ahead for the next
        outputs.append(root(X.to(device)))
        for _ in range(2):
            call(root, device)
    for output in outputs:
        output.sum().backward()
    for here, there in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(here.grad.cpu(), there.grad)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_what_a_forward_changes_in_its_weights_is_kept(sim, prefetch):
    def count(module, _args):
        with torch.no_grad():
            module.weight.add_(0.25)

    model, bare = build(), build()
    for root in (model, bare):
        for module in root.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(count)
    applied = hookcore.apply(model, [GroupOffload("sim", prefetch=prefetch)])
    for _ in range(4):
        assert same_bits(call(model).cpu(), call(bare, "cpu"))
    applied.remove()
    assert all(
        same_bits(here, there) for here, there in zip(model.parameters(), bare.parameters(), strict=True)
    )


@pytest.mark.parametrize("order", [["casting", "offload"], ["offload", "casting"]])
@pytest.mark.parametrize("budget", [None, 12_000])
def test_bytes_of_the_storage_dtype_travel(sim, order, budget):
    model, bare = build(), build()
    locked = simulator.pinned_bytes()
    both = {"casting": LayerwiseCasting(), "offload": GroupOffload("sim", memory_budget=budget)}
    hookcore.apply(bare, [LayerwiseCasting()])
    hookcore.apply(model, [both[name] for name in order])
    for _ in range(3):
        assert same_bits(call(model).cpu(), call(bare, "cpu"))
    with sim.traced() as trace:
        call(model)
    copied = [it for it in trace.spans if it.engine == "copy in"]
    assert copied
    assert simulator.pinned_bytes() - locked < weights(build()) / 2


@pytest.mark.parametrize("options", [{}, {"offload_type": "block_level", "prefetch": 2}])
def test_weights_given_in_another_dtype_between_calls(sim, options):
    """Three half-precision numbers take six bytes, which hold no whole number of single-precision ones."""

    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(*(nn.Linear(3, 3) for _ in range(8))).half()

    model, bare = made(), made()
    hookcore.apply(model, [GroupOffload("sim", **options)])
    for dtype in (torch.float16, torch.float32, torch.float16, torch.float64, torch.float64):
        model.to(dtype)
        bare.to(dtype)
        for _ in range(2):
            with torch.no_grad():
                x = torch.ones(1, 3, dtype=dtype)
                assert same_bits(model(x).cpu(), bare(x))


# Speed


@contextlib.contextmanager
def no_waiting():
    """Raises where the host waits for the device."""

    def waits(*_):
        raise AssertionError("the host waited")

    machine = simulator.state.get_machine()
    with patch.object(machine, "host_waits", waits):
        yield


@pytest.mark.parametrize(
    "options", [{}, {"offload_type": "block_level"}, {"memory_budget": 15_000}, {"memory_budget": 40_000}]
)
def test_in_the_long_run_each_group_is_copied_once_a_pass_and_nothing_is_waited_for(sim, options):
    model = build()
    applied = hookcore.apply(model, [GroupOffload("sim", **options)])
    x = X.to("sim")
    module = torch.get_device_module("sim")
    with torch.no_grad():
        for _ in range(3):
            model(x)
        module.synchronize()
        held = module.memory_allocated()
        mover = mover_of(applied)
        misses = mover.prefetcher.order.misses
        with no_waiting(), sim.traced() as trace:
            for _ in range(5):
                output = model(x)
                del output
        assert module.memory_allocated() == held
    copies = [it for it in trace.spans if it.engine == "copy in"]
    assert not [it for it in trace.spans if it.engine == "copy out"]
    streamed = [it for it in mover.own.groups.values() if not it.stays]
    uses = len(mover.prefetcher.order._order)
    assert len(streamed) <= uses <= len(streamed) + 1  # the tied weight is used twice
    # What is in memory at the end for the pass to come was so at the beginning.
    assert len(copies) == 5 * uses
    assert mover.prefetcher.order.misses == misses


def test_the_next_group_is_copied_while_one_computes(sim):
    """With room for one group only, each waits for the end of the one before; with more, it doesn't."""
    durations = []
    profile = simulator.DeviceProfile(name="slow", host_to_device=1e8, kernel_latency=1e-5)
    for prefetch in (0, 2):
        model = build(20)
        applied = hookcore.apply(model, [GroupOffload("sim", offload_type="block_level", prefetch=prefetch)])
        x = X.to("sim")
        with torch.no_grad(), sim.limited(profile=profile):
            model(x)
            torch.get_device_module("sim").synchronize()
            with sim.traced() as trace:
                model(x)
        durations.append(trace.duration)
        applied.remove()
    assert durations[1] < 0.8 * durations[0]


link = st.sampled_from([0.5, 1.0, 2.0])
widths = st.lists(st.integers(1, 12).map(lambda it: 16 * it), min_size=3, max_size=14)


class Between(nn.Module):
    """Computes without weights: so many products with what it is given."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = (x @ x.mT) @ x
        return x


def chain(widths, between=()):
    """Linear layers of these widths, without biases; after the first ones computing without weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pairs = itertools.pairwise([*widths, widths[0]])
        layers = [nn.Linear(*pair, bias=False) for pair in pairs]
    both = itertools.zip_longest(layers, map(Between, between))
    return nn.Sequential(*(it for pair in both for it in pair if it is not None))


UNEQUAL = [16 * it for it in (11, 4, 4, 1, 10, 10, 3, 6, 7, 10, 12, 9, 11)]


chains = st.tuples(widths, st.lists(st.integers(0, 3), max_size=3))


@settings(FOR_EACH_EXAMPLE, max_examples=15)
@given(chains, link, st.floats(0.05, 0.9), st.none() | st.integers(1, 3))
@example((UNEQUAL, []), 2.0, 0.6877, None)  # 18 % longer if large groups lay among small ones
def test_a_pass_takes_as_long_as_the_layout_says(sim, made_of, link, share, prefetch):
    model = chain(*made_of)
    total, rows, flops = weights(model), 64, 1e9
    computing = 2 * rows * sum(it.numel() for it in model.parameters()) / flops
    profile = simulator.DeviceProfile(
        name="without waits of the host",
        launch_latency=1e-9,
        flops_32=flops,
        host_to_device=total / (link * computing),
    )
    layouts = []

    def noting(*args, **options):
        layouts.append(choose_layout(*args, **options))
        return layouts[-1]

    least = max(it.nbytes for it in model.parameters())
    budget = max(least, int(share * total))
    x = torch.ones(rows, made_of[0][0], device="sim")
    with sim.limited(profile=profile), patch.object(stream, "choose_layout", noting), torch.no_grad():
        applied = hookcore.apply(model, [GroupOffload("sim", memory_budget=budget, prefetch=prefetch)])
        for _ in range(20):  # as many as it may take until passes repeat
            model(x)
        # Of computing: copies for the pass after the last one go on for longer.
        begun, ended = (torch.get_device_module("sim").Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(16):
            model(x)
        ended.record()
        ended.synchronize()
        taken = begun.elapsed_time(ended) / 16_000
    applied.remove()
    if layouts:
        assert taken == pytest.approx(layouts[0].seconds, rel=0.02)


def test_ways_to_call_are_known_again(sim):
    model = build()
    applied = hookcore.apply(model, [GroupOffload("sim")])
    ways = [{}, {"backwards": True}, {"skip": {1, 4}}]
    for _ in range(2):
        for way in ways:
            call(model, **way)
    order = mover_of(applied).prefetcher.order
    for way in ways * 2:
        before = order.misses
        call(model, **way)
        assert order.misses - before <= 2  # where this way leaves each of the others


# Memory


def test_the_budget_is_used_and_kept_to_the_byte(sim):
    model = build(10)
    total = weights(model)
    module = torch.get_device_module("sim")
    for budget in (total // 4, total // 2, 2 * total):
        x = X.to("sim")
        call(build(0).to("sim"))
        before = module.memory_allocated()
        applied = hookcore.apply(model, [GroupOffload("sim", memory_budget=budget)])
        with torch.no_grad():
            peaks = []
            for _ in range(5):
                model(x)
                module.synchronize()
                peaks.append(module.memory_allocated() - before)
        mover = mover_of(applied)
        assert max(peaks) <= budget
        aligned = sum(it.flat.nbytes for it in mover.own.groups.values())
        assert max(peaks) > min(budget, aligned) * 0.97
        applied.remove()
        assert module.memory_allocated() == before
        del x


@FOR_EACH_EXAMPLE
@given(widths, st.integers(0, 3))
def test_no_more_groups_are_there_than_may_be_copied_ahead_and_the_one_in_use(sim, widths, prefetch):
    model = chain(widths)
    sizes = [it.nbytes for it in model.parameters()]
    module = torch.get_device_module("sim")
    x = torch.ones(1, widths[0], device="sim")
    before = module.memory_allocated()
    applied = hookcore.apply(model, [GroupOffload("sim", prefetch=prefetch)])
    found = []
    linear = nn.functional.linear

    def counting(*args):
        found.append(module.memory_allocated() - before)
        return linear(*args)

    with torch.no_grad(), patch.object(nn.functional, "linear", counting):
        for _ in range(4):
            model(x)
    per_group = not mover_of(applied).lingers
    for number, nbytes in enumerate(found[-len(sizes) :]):
        window = [sizes[(number + ahead) % len(sizes)] for ahead in range(min(prefetch + 1, len(sizes)))]
        if per_group:
            assert nbytes <= sum(window) + 4 * 2 * max(widths)  # an input, and that of the one before
        assert nbytes >= sizes[number]
        if len(window) == 2 and sum(window) <= mover_of(applied)._engine.allocator.size:
            assert nbytes >= sum(window)
    applied.remove()


@FOR_EACH_EXAMPLE
@given(widths, st.floats(1, 3))
def test_a_budget_for_few_groups_is_kept_to_while_one_goes_and_another_comes(sim, widths, times):
    model = chain(widths)
    sizes = [it.nbytes for it in model.parameters()]
    budget = max(int(times * max(sizes)), max(sizes) + min(sizes))
    module = torch.get_device_module("sim")
    x = torch.ones(1, widths[0], device="sim")
    before = module.memory_allocated()
    applied = hookcore.apply(model, [GroupOffload("sim", memory_budget=budget)])
    module.reset_peak_memory_stats()
    with torch.no_grad():
        for _ in range(4):
            model(x)
    activations = 4 * 2 * max(widths)  # an input, and that of the one before
    assert module.max_memory_allocated() - before <= budget + activations
    applied.remove()


@FOR_EACH_EXAMPLE
@given(widths, st.integers(0, 3), st.floats(0.5, 0.95))
def test_no_more_groups_are_copied_ahead_than_asked_for_however_much_room_there_is(
    sim, widths, prefetch, share
):
    """Also in the first pass, whose order is a guess, of which no more than a few groups are believed."""
    model = chain(widths)
    budget = max(int(share * weights(model)), 2 * max(it.nbytes for it in model.parameters()))
    applied = hookcore.apply(model, [GroupOffload("sim", memory_budget=budget, prefetch=prefetch)])
    x = torch.ones(1, widths[0], device="sim")
    found = []
    for layer in model:
        layer.register_forward_pre_hook(
            lambda *_: found.append(applied.run_report().entries[0].counted.copies)
        )
    for _ in range(2):
        with torch.no_grad():
            model(x)
        assert all(copies <= used + prefetch for used, copies in enumerate(found))
        found.clear()
        applied.reset()


def test_in_no_more_memory_than_accelerates_it_takes_less_time(sim):
    """Layers of unequal size, with activations that are largest where weights are small."""
    accelerate = pytest.importorskip("accelerate")
    device = torch.get_device_module("sim")
    x = torch.ones(512, 64, device="sim")
    found = {}
    for name in ("ours", "theirs"):
        layers = [nn.Linear(*pair) for pair in itertools.pairwise([64, 512, 512, 64, 1024, 64])]
        model = nn.Sequential(*itertools.chain.from_iterable((it, nn.ReLU()) for it in layers))
        if name == "ours":
            largest = max(weights(it) for it in layers)
            technique = GroupOffload("sim", offload_type="leaf_level", memory_budget=largest)
            hookcore.apply(model, [technique])
        else:
            accelerate.cpu_offload(model, torch.device("sim"))
        with torch.no_grad():
            for _ in range(2):
                model(x)
            device.synchronize()
            device.reset_peak_memory_stats()
            begun, before = sim.now(), device.memory_allocated()
            model(x)
            device.synchronize()
        found[name] = device.max_memory_allocated() - before, sim.now() - begun
        del model
    assert found["ours"][0] <= found["theirs"][0]
    assert found["ours"][1] < 0.8 * found["theirs"][1]


@pytest.mark.parametrize("prefetch", [1, 5])
def test_calls_may_come_on_one_stream_and_then_on_another(sim, prefetch):
    model = build()
    module = torch.get_device_module("sim")
    streams = [module.current_stream(), module.Stream()]
    with simulator.limited(strict=True):
        applied = hookcore.apply(model, [GroupOffload("sim", prefetch=prefetch)])
        for number in (0, 0, 1, 1, 0):
            module.synchronize()
            with module.stream(streams[number]):
                call(model)
        assert mover_of(applied).lingers == (prefetch == 5)  # else memory is allocated group by group
        simulator.check()
    applied.remove()


@pytest.mark.parametrize("prefetch", [1, 5])
def test_a_call_on_another_stream_comes_after_the_one_before(sim, prefetch):
    """Though nobody waits in between: both use the same memory."""
    model, module = build(), torch.get_device_module("sim")
    streams = [module.Stream(), module.Stream()]
    hookcore.apply(model, [GroupOffload("sim", prefetch=prefetch)])
    x = X.to("sim")
    module.synchronize()
    with simulator.limited(strict=True), torch.no_grad():
        for number in (0, 1, 0, 1, 1, 0):
            with module.stream(streams[number]):
                model(x)
        simulator.check()


@given(blocks=st.integers(1, 4))
@FOR_EACH_EXAMPLE
def test_the_smallest_budget_is_named_and_works(sim, blocks):
    model = build(blocks)
    with pytest.raises(BudgetError, match=r"memory_budget is 10 B \(10 B\), .* on 'sim:0' at once") as raised:
        hookcore.apply(model, [GroupOffload("sim", memory_budget=10)])
    assert not hookcore.status(model).techniques
    least = int(str(raised.value).rsplit("works is ", 1)[1].split()[0])
    with pytest.raises(BudgetError):
        hookcore.apply(model, [GroupOffload("sim", memory_budget=least - 1)])
    hookcore.apply(model, [GroupOffload("sim", memory_budget=least)])
    assert same_bits(call(model).cpu(), call(build(blocks), "cpu"))


def test_a_share_of_what_is_free_is_a_budget(sim):
    with sim.limited(memory="1MB"):
        model = build()
        applied = hookcore.apply(model, [GroupOffload("sim", memory_budget=0.02)])
        call(model)
        allocator = mover_of(applied)._engine.allocator.size
    assert 10_000 < allocator <= 20_000


def test_originals_are_freed_group_by_group_and_locked_memory_is_exact(sim):
    model = build(10)
    total = weights(model)
    originals = [StorageWeakRef(it.untyped_storage()) for it in model.parameters()]
    locked = []
    make = host.PinnedMemory.make

    def counted(memory, nbytes):
        locked.append((nbytes, sum(not it.expired() for it in originals)))
        return make(memory, nbytes)

    with patch.object(host.PinnedMemory, "make", counted):
        hookcore.apply(model, [GroupOffload("sim", offload_type="block_level")])
    remaining = [it for _, it in locked]
    assert remaining == sorted(remaining, reverse=True)
    assert remaining[-1] < len(originals) / 2
    assert all(it.expired() for it in originals)
    assert total <= simulator.max_pinned_bytes() <= 1.05 * total  # small weights begin at multiples of 64


@FOR_EACH_EXAMPLE
@given(st.integers(0, 5), st.none() | st.integers(12_000, 60_000), st.integers(0, 3))
def test_little_memory_is_locked_if_so_wished(sim, prefetch, budget, repeats):
    model, bare = build(), build()
    before = sim.pinned_bytes()
    options = {"prefetch": prefetch, "memory_budget": budget, "low_cpu_mem_usage": True}
    applied = hookcore.apply(model, [GroupOffload("sim", **options)])
    found = [call(model) for _ in range(3 + repeats)]
    torch.get_device_module("sim").synchronize()
    for it in found:
        assert same_bits(it.cpu(), call(bare, "cpu"))
    largest = max(it.flat.nbytes for it in mover_of(applied).own.groups.values())
    assert sim.pinned_bytes() - before <= 3 * largest
    applied.remove()
    assert sim.pinned_bytes() == before


@pytest.mark.parametrize("budget", [None, 15_000])
def test_a_model_may_go_away_with_its_hooks_on(sim, budget):
    module = torch.get_device_module("sim")
    before = module.memory_allocated(), sim.pinned_bytes()
    model = build()
    hookcore.apply(model, [GroupOffload("sim", memory_budget=budget)])
    for _ in range(3):
        call(model)  # the next one's first groups are on their way
    del model
    gc.collect()
    sim.check()
    assert (module.memory_allocated(), sim.pinned_bytes()) == before


def test_a_process_ends_with_techniques_on():
    program = """
import torch, hookcore, hookcore_plugins
import hookcore.testing.simulator as sim
torch.set_num_threads(1)
sim.install()
models = {}
for name in ("GroupOffload", "SequentialOffload", "ModelOffload"):
    models[name] = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20)))
    hookcore.apply(models[name], [getattr(hookcore_plugins, name)("sim")])
    with torch.no_grad():
        for _ in range(2):
            models[name](torch.zeros(1, 64))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match="memory_budget needs groups that are copied on a stream, which 'cpu'"
    ):
        GroupOffload("cpu", memory_budget="1GiB")
    with pytest.raises(ValueError, match="use_stream=True needs an onload device with streams"):
        GroupOffload("cpu", use_stream=True)
    with pytest.raises(ValueError, match=r"memory_budget is 1\.5; give bytes, .* or a share"):
        GroupOffload("cpu", memory_budget=1.5)
    with pytest.raises(ValueError, match="prefetch is -1, expected an int of 0 or more"):
        GroupOffload("cpu", prefetch=-1)


# Each wait is needed


def without_wait_for_copy(self, load):
    if self.times is not None:
        load.used = self.times.mark(self._computing)


def without_event_after_use(self, load):
    self.allocator.give_back(load.flat, load.place)


FAULTS = {
    "use does not wait for its copy": ("wait_for", without_wait_for_copy),
    "copy does not wait for the last use": ("leave", without_event_after_use),
}


@pytest.mark.parametrize("options", [{"prefetch": 5}, {"memory_budget": 15_000}])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_wait_is_missed(sim, fault, options):
    name, mutant = fault
    model = build()
    with patch.object(engine.CopyEngine, name, mutant), simulator.limited(strict=True):
        hookcore.apply(model, [GroupOffload("sim", **options)])
        with pytest.raises(simulator.RaceError):
            for _ in range(3):
                call(model)
            simulator.check()
    simulator.reset()
    hookcore.remove(model)
    simulator.reset()
