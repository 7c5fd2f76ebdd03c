"""Model offloading: the component that runs is on the device, the others are not, with the same bits."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import BudgetError, ConcurrentCallError, PlanError
from hookcore.testing import models
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins.model_offload import ModelOffload, offload, part
from hookcore_plugins.model_offload.order import ComponentOrder

NAMES = ("text", "denoiser", "vae", "safety")
FEWER = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


# The order


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
def test_an_order_that_repeats_is_known_after_two_rounds(round_of_calls):
    names = [name for name, _ in itertools.groupby(round_of_calls * 5)]
    order = ComponentOrder(())
    for at, (name, following) in enumerate(itertools.pairwise(names)):
        order.note(name)
        order.note(name)
        if at >= 2 * len(round_of_calls):
            assert order.expected == following


@given(st.permutations(NAMES), st.lists(st.sampled_from(NAMES)))
def test_a_sequence_is_believed_at_first_and_goes_round(sequence, other_calls):
    order = ComponentOrder(sequence)
    for name in other_calls:
        order.note(name)
    order.forget()
    for name, following in itertools.pairwise([*sequence, *sequence, sequence[0]]):
        order.note(name)
        assert order.expected == following


def test_nothing_is_expected_of_what_has_never_been_followed():
    order = ComponentOrder(())
    assert order.expected is None
    order.note("a")
    assert order.expected is None
    order.note("b")
    assert order.expected is None


# The same bits, whatever happens between calls


def fail(_module, _args):
    raise ZeroDivisionError


def call_failing(case, model, fqn):
    handle = model.get_submodule(fqn).register_forward_pre_hook(fail)
    try:
        with contextlib.suppress(ZeroDivisionError), torch.no_grad():
            case.call(model)
    finally:
        handle.remove()


def edit(model, kept, position, how):
    """Changes a parameter in one of the ways in which people do."""
    fqn = list(kept)[position % len(kept)]
    owner, _, name = fqn.rpartition(".")
    with torch.no_grad():
        if how == "in place":
            model.get_parameter(fqn).mul_(2)
        elif how == "in place, by a reference kept":
            kept[fqn].mul_(2)
        elif how == "in place, uncounted":
            model.get_parameter(fqn).data.mul_(2)
        elif how == "other data":
            parameter = model.get_parameter(fqn)
            parameter.data = torch.full(parameter.shape, 0.5, dtype=parameter.dtype)
        elif how == "data of another type":
            parameter = model.get_parameter(fqn)
            parameter.data = parameter.data.cpu().double()
            model.get_parameter(fqn).data = model.get_parameter(fqn).data.float()
        elif how == "another parameter":
            old = model.get_parameter(fqn)
            setattr(model.get_submodule(owner), name, nn.Parameter(torch.full(old.shape, 0.25)))
            kept[fqn] = model.get_parameter(fqn)
        elif how == "a state dict":
            with torch.inference_mode():  # in which a call may have made buffers
                model.load_state_dict(
                    {name: it.detach().cpu() / 2 for name, it in model.state_dict().items()}
                )


EDITS = [
    "in place",
    "in place, by a reference kept",
    "in place, uncounted",
    "other data",
    "data of another type",
    "another parameter",
    "a state dict",
]


@st.composite
def offloads(draw, names, device):
    sequence = draw(st.none() | st.permutations(names).map(tuple))
    last = sequence is not None and draw(st.booleans())
    budget = draw(st.none() | st.just(1 << 20)) if device == "sim" else None
    return ModelOffload(device, sequence, memory_budget=budget, offload_last=last)


class Twins:
    """One component and its bare twin; what is done to one is done to the other."""

    def __init__(self, case):
        self.case = case
        self.both = case.build(), case.build()
        self.before = ModelSnapshot.take(self.both[0], twin=self.both[1])
        self.kept = [dict(it.named_parameters()) for it in self.both]

    def call(self, data):
        seed = data.draw(st.integers(0, 2), label="seed")
        with data.draw(st.sampled_from([torch.no_grad, torch.inference_mode]))():
            found, expected = (self.case.call(it, "forward", seed) for it in self.both)
            assert all(same_bits(one.cpu(), other) for one, other in zip(found, expected, strict=True))

    def edit(self, data):
        if self.kept[0]:
            how = data.draw(st.sampled_from(EDITS), label="edit")
            if how == "another parameter" or ("data" in how and self.has_ties()):  # which the edit breaks
                self.before = None
            position = data.draw(st.integers(0, 9), label="position")
            for model, kept in zip(self.both, self.kept, strict=True):
                edit(model, kept, position, how)

    def has_ties(self):
        storages = [it.untyped_storage().data_ptr() for it in self.both[1].parameters()]
        return len(set(storages)) < len(storages)

    def fail(self, data):
        fqn = data.draw(st.sampled_from([fqn for fqn, _ in self.both[0].named_modules()]), label="fails at")
        for it in self.both:
            call_failing(self.case, it, fqn)

    def go_off(self, _data):
        offload(self.both[0])

    def compare(self, _data):
        found, expected = (it.state_dict() for it in self.both)
        assert list(found) == list(expected)
        assert all(same_bits(found[fqn].cpu(), expected[fqn]) for fqn in found)


STEPS = [Twins.call, Twins.call, Twins.call, Twins.edit, Twins.edit, Twins.fail, Twins.go_off, Twins.compare]


@pytest.fixture(params=[part._LARGE, 0], ids=["large buffers move", "all buffers move"])
def moving_buffers(request, monkeypatch):
    monkeypatch.setattr(part, "_LARGE", request.param)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@FEWER
@given(data=st.data())
def test_any_calls_and_edits_in_any_order_give_the_bits_of_the_bare_models(sim, device, moving_buffers, data):
    cases = data.draw(st.lists(module_trees(), min_size=1, max_size=4), label="models")
    twins = {name: Twins(case) for name, case in zip(NAMES, cases, strict=False)}
    names = st.sampled_from(list(twins))
    hookcore.apply(
        {name: it.both[0] for name, it in twins.items()}, [data.draw(offloads(list(twins), device))]
    )
    for _ in range(data.draw(st.integers(1, 8), label="steps")):
        step = data.draw(st.sampled_from(STEPS), label="step")
        step(twins[data.draw(names, label="component")], data)
    for name in data.draw(st.permutations(list(twins)), label="taken off"):
        hookcore.remove(twins[name].both[0])
        if twins[name].before is not None:
            twins[name].before.assert_restored(twins[name].both[0])
    sim.check()


# Memory


def stack(width, depth):
    """Linear layers, of which each takes a multiple of 64 bytes."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def stacks(sizes, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: stack(16 * size, size) for name, size in zip(NAMES, sizes, strict=False)}


def weights_of(model):
    return sum(it.nbytes for it in model.parameters())


def call(model, device="cpu"):
    """Calls it with an input that lies on a device; what is offloaded returns on its own."""
    with torch.no_grad():
        return model(torch.ones(16, model[0].in_features, device=device))


def on_simulator():
    return torch.get_device_module("sim")


def beside_weights(model):
    """Bytes of the device that a call of a model takes besides its weights."""
    model.to("sim")
    before = here()
    on_simulator().reset_peak_memory_stats()
    call(model, "sim")
    model.to("cpu")
    return on_simulator().max_memory_allocated() - before


def here():
    return on_simulator().memory_allocated()


SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=4)


@FEWER
@given(sizes=SIZES, calls=st.lists(st.integers(0, 3), max_size=12), spare=st.integers(0, 30_000))
def test_a_budget_is_kept(counted, sizes, calls, spare):
    there = stacks(sizes)
    beside = {name: beside_weights(it) for name, it in there.items()}
    largest = max(map(weights_of, there.values()))
    start = here()
    hookcore.apply(there, [ModelOffload("sim", tuple(there), memory_budget=largest + spare)])
    for at in calls:
        name = list(there)[at % len(there)]
        on_simulator().reset_peak_memory_stats()
        call(there[name])
        # What is there when the call begins goes first: nothing but this component and the next is counted.
        assert here() - start <= largest + spare
        assert on_simulator().max_memory_allocated() - start <= largest + spare + beside[name]


@FEWER
@given(sizes=SIZES, calls=st.lists(st.integers(0, 3), max_size=16), told=st.booleans())
def test_what_runs_with_one_component_at_a_time_always_runs(counted, sizes, calls, told):
    """On a device with not a byte more than that needs, nothing that is copied ahead takes the room."""
    there = stacks(sizes)
    needed = max(weights_of(it) + beside_weights(it) for it in there.values())
    hookcore.apply(there, [ModelOffload("sim", tuple(there) if told else None)])
    with counted.limited(memory=here() + needed):
        for at in calls:
            call(list(there.values())[at % len(there)])


@pytest.fixture
def counted(sim):
    """The simulator, while nothing but what a test does changes what is allocated."""
    gc.collect()
    gc.disable()
    yield sim
    gc.enable()


def test_a_budget_that_the_device_has_not_got_only_keeps_components_from_coming_early(counted):
    there = stacks([3, 3, 6])
    needed = weights_of(there["vae"]) + beside_weights(there["vae"])
    hookcore.apply(there, [ModelOffload("sim", memory_budget="1MiB")])
    with counted.limited(memory=here() + needed):
        for name in ["text", "denoiser", "vae", "denoiser"] * 2:
            call(there[name])
        call(there["text"])  # the denoiser comes early, and is expected again
        call(there["vae"])


def test_what_came_early_goes_when_others_take_the_memory(counted):
    there = stacks([2, 6])
    beside = beside_weights(there["text"])
    hookcore.apply(there, [ModelOffload("sim")])
    for model in list(there.values()) * 2:
        call(model)
    call(there["text"])
    assert here() > weights_of(there["denoiser"])
    with counted.limited(memory=here() + beside - 1):  # as another process would
        call(there["text"])
    assert here() < weights_of(there["denoiser"])


def test_methods_that_nobody_declares_bring_a_component_by_the_calls_that_they_make(sim):
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([stack(16, 1), stack(16, 2)])

        def encode(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    coder = Coder()
    x = torch.ones(1, 16)
    with torch.no_grad():
        expected = coder.encode(x)
        hookcore.apply({"coder": coder, "other": stack(16, 1)}, [ModelOffload("sim")])
        found = coder.encode(x)
    assert found.device.type == "sim"
    assert same_bits(found.cpu(), expected)


@FEWER
@given(sizes=SIZES)
def test_the_next_component_is_there_before_it_is_called(counted, sizes):
    there = stacks(sizes)
    nbytes = {it: weights_of(it) for it in there.values()}  # now: to read weights later is no mere reading
    start = here()
    hookcore.apply(there, [ModelOffload("sim")])
    order = list(there.values())
    for model in order * 2:
        call(model)
    for model, following in itertools.pairwise([*order, *order]):
        with counted.traced() as trace:
            call(model)
            call(model)
        assert here() - start == nbytes[model] + nbytes[following]
        copied = [span for span in trace.spans if span.engine == "copy in"]
        # The inputs, and what comes next; of two that take turns both stay.
        assert len(copied) == 2 + (len(order) > 2)


class Told:
    """A pipeline, as far as it tells of itself: components by name, and the order in which it calls them."""

    def __init__(self, components, order):
        self.components = components
        self.model_cpu_offload_seq = "->".join(order)


@FEWER
@given(st.permutations(NAMES), st.permutations(NAMES))
def test_the_order_that_a_pipeline_tells_is_believed_on_its_first_run(sim, registered, order):
    made = stacks([1, 2, 3, 1])
    pipe = Told({name: made[name] for name in registered}, order)
    applied = hookcore.apply(pipe, [ModelOffload("sim", memory_budget="1MiB")])
    for name in order:
        call(made[name])
    report = counts_of(applied)
    assert [(report[name].hits, report[name].on_demand) for name in order] == [(0, 1), *[(1, 0)] * 3]


def test_nothing_is_copied_back_and_each_component_comes_in_one_copy(sim):
    there = stacks([1, 3, 2])
    hookcore.apply(there, [ModelOffload("sim")])
    with sim.traced() as trace:
        for model in list(there.values()) * 3:
            call(model)
            call(model)
    engines = [span.engine for span in trace.spans]
    assert engines.count("copy out") == 0
    inputs, ahead_of_the_next_round = 18, 1
    assert engines.count("copy in") == inputs + 9 + ahead_of_the_next_round


def test_only_what_a_call_changed_is_copied_back(sim):
    there = stacks([1, 3])
    hookcore.apply(there, [ModelOffload("sim")])
    weight = there["text"][0].weight
    call(there["text"])
    with torch.no_grad():
        weight.fill_(3)
    with sim.traced() as trace:
        call(there["denoiser"])
    assert [span.engine for span in trace.spans].count("copy out") == 1
    assert weight.device.type == "cpu"
    assert (weight == 3).all()


# What users do


def test_components_come_when_they_are_called_and_go_when_another_one_is(sim):
    there = stacks([1, 2, 3])
    devices = lambda: [it[0].weight.device.type for it in there.values()]  # noqa: E731
    applied = hookcore.apply(there, [ModelOffload("sim", memory_budget=weights_of(there["vae"]))])
    assert devices() == ["cpu", "cpu", "cpu"]
    call(there["text"])
    assert devices() == ["sim", "cpu", "cpu"]
    call(there["vae"])
    assert devices() == ["cpu", "cpu", "sim"]
    assert "on sim" in str(applied)
    offload(there["vae"])
    assert devices() == ["cpu", "cpu", "cpu"]
    call(there["vae"])
    offload(there)
    assert devices() == ["cpu", "cpu", "cpu"]
    assert here() == 0


def test_offloading_what_is_not_offloaded_does_nothing(sim):
    there = stacks([1])
    offload(there)
    hookcore.apply(there, [ModelOffload("sim")])
    offload(there)
    call(there["text"])


def test_the_last_one_goes_off_after_its_call_when_asked(sim):
    there = stacks([1, 2])
    hookcore.apply(there, [ModelOffload("sim", ("text", "denoiser"), offload_last=True)])
    for _ in range(2):
        call(there["text"])
        assert here() >= weights_of(there["text"])
        call(there["denoiser"])
        assert here() == 0
    with pytest.raises(ValueError, match="needs a sequence"):
        ModelOffload("sim", offload_last=True)


def test_all_entries_bring_a_component(sim):
    case = models.autoencoder()
    there, bare = {"vae": case.build(), "other": stack(16, 1)}, case.build()
    hookcore.apply(there, [ModelOffload("sim")])
    for entry in case.entries:
        with torch.no_grad():
            found, expected = (case.call(it, entry) for it in (there["vae"], bare))
        for one, other in zip(found, expected, strict=True):
            assert one.device.type == "sim"
            torch.testing.assert_close(one.cpu(), other)
        call(there["other"])


def test_a_component_that_is_called_inside_of_another_comes_besides(sim):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, 16))
            self.inner = [inner]  # in a list, so that it is no part of this one

        def forward(self, x):
            return self.inner[0](x @ self.weight) @ self.weight @ self.inner[0][0].weight

    inner = stack(16, 2)
    outer = Outer(inner)
    with torch.no_grad():
        expected = outer(torch.ones(1, 16))
        hookcore.apply({"inner": inner, "outer": outer}, [ModelOffload("sim")])
        for _ in range(3):
            assert same_bits(outer(torch.ones(1, 16)).cpu(), expected)
            inner(torch.ones(1, 16))


def test_a_weight_that_another_component_reads_is_brought(sim):
    class Reader(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))
            self.other = [other]

        def forward(self, x):
            return (x * self.scale) @ self.other[0][0].weight

    other = stack(16, 2)
    there = {"other": other, "reader": Reader(other)}
    with torch.no_grad():
        expected = there["reader"](torch.ones(1, 16))
        hookcore.apply(there, [ModelOffload("sim")])
        for _ in range(2):
            assert same_bits(there["reader"](torch.ones(1, 16)).cpu(), expected)
            call(other)


def test_a_weight_that_was_read_after_it_was_copied_ahead_is_copied_again(sim):
    there = stacks([1, 2])
    hookcore.apply(there, [ModelOffload("sim", ("text", "denoiser"), memory_budget="1MiB")])
    call(there["text"])
    there["denoiser"][1].weight.data.zero_()  # torch doesn't count it
    with sim.traced() as trace:
        assert (call(there["denoiser"]) == 0).all()
    assert [span.engine for span in trace.spans].count("copy in") == 2  # the weight, and the input


def test_reading_a_type_between_calls_copies_nothing_but_what_was_read(sim):
    there = stacks([3, 1])
    hookcore.apply(there, [ModelOffload("sim")])
    with sim.traced() as trace:
        for _ in range(3):
            call(there["text"])
            assert next(there["text"].parameters()).dtype is torch.float32
        call(there["denoiser"])
    out = [span for span in trace.spans if span.engine == "copy out"]
    assert len(out) == 1


def test_one_component_can_be_taken_off_and_the_others_go_on(sim):
    there, bare = stacks([1, 2, 3]), stacks([1, 2, 3])
    hookcore.apply(there, [ModelOffload("sim", tuple(there))])
    for model in there.values():
        call(model)
    before = ModelSnapshot.take(bare["denoiser"])
    hookcore.remove(there["denoiser"])
    assert [it.device.type for it in there["denoiser"].parameters()] == ["cpu"] * 2
    assert same_bits(call(there["denoiser"]), call(bare["denoiser"]))
    assert not before.differences(bare["denoiser"])
    for name in ("text", "vae", "text"):
        assert same_bits(call(there[name]).cpu(), call(bare[name]))


def test_a_component_that_nobody_keeps_goes_away_with_its_memory(sim):
    there = stacks([1, 2])
    hookcore.apply(there, [ModelOffload("sim")])
    for model in list(there.values()) * 2:
        call(model)
    gone = weakref.ref(there.pop("denoiser"))
    del model
    gc.collect()
    assert gone() is None
    call(there["text"])
    assert here() == weights_of(there["text"])


def test_what_is_replanned_goes_on_with_the_others(sim):
    there, bare = stacks([1, 2]), stacks([1, 2])
    hookcore.apply(there, [ModelOffload("sim", memory_budget=weights_of(there["denoiser"]))])
    for model in there.values():
        call(model)
    for both in (there, bare):
        both["text"].append(nn.Linear(16, 16, bias=False))
        with torch.no_grad():
            both["text"][-1].weight.fill_(0.5)
    assert same_bits(call(there["text"]).cpu(), call(bare["text"]))
    call(there["denoiser"])
    assert {it.device.type for it in there["text"].parameters()} == {"cpu"}
    with pytest.raises(BudgetError):
        for _ in range(8):
            there["text"].append(nn.Linear(16, 16, bias=False))
        call(there["text"])


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_first_call_in_inference_mode_leaves_weights_that_can_be_trained(sim, device):
    there = stacks([1])
    hookcore.apply(there, [ModelOffload(device)])
    with torch.inference_mode():
        there["text"](torch.ones(1, 16))
    assert not any(it.is_inference() for it in there["text"].parameters())
    there["text"](torch.ones(1, 16)).sum().backward()
    assert there["text"][0].weight.grad is not None


def test_host_memory_is_not_let_go_while_a_copy_reads_it(sim):
    """Of a component that was copied ahead, and is taken off or given other data before it ever ran."""
    for change in ("remove", "other data"):
        there = stacks([1, 6])
        hookcore.apply(there, [ModelOffload("sim", ("text", "denoiser"), memory_budget="1MiB")])
        kept = there["denoiser"][0].weight
        call(there["text"])
        if change == "remove":
            hookcore.remove(there["denoiser"])
        else:
            kept.data = torch.full_like(kept, 2, device="cpu")
            call(there["denoiser"])
            offload(there)
            assert (kept == 2).all()
        sim.check()


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_other_data_given_while_it_is_on(sim, device):
    there, bare = stacks([1, 2]), stacks([1, 2])
    hookcore.apply(there, [ModelOffload(device)])
    for _ in range(2):
        for name, model in there.items():
            call(model)
            for it in (model, bare[name]):
                it[0].weight.data = torch.full(it[0].weight.shape, 0.5)
            assert same_bits(call(model).cpu(), call(bare[name]))
            for it in (model, bare[name]):  # and again, before another one runs
                it[0].weight.data = torch.full(it[0].weight.shape, 0.25)
        for name, model in there.items():
            assert same_bits(model[0].weight.detach().cpu(), bare[name][0].weight.detach())


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_weights_made_in_inference_mode_move_too(sim, device):
    with torch.inference_mode():
        made = stacks([1, 2])
    bare = stacks([1, 2])
    hookcore.apply(made, [ModelOffload(device)])
    for _ in range(2):
        for name, model in made.items():
            with torch.inference_mode():
                assert same_bits(model(torch.ones(16, model[0].in_features)).cpu(), call(bare[name]))
                model[0].weight.mul_(2)
                bare[name][0].weight.data.mul_(2)
    offload(made)
    assert {it.device.type for it in made["text"].parameters()} == {"cpu"}
    hookcore.remove(made)
    assert all(it.is_inference() and it.device.type == "cpu" for it in made["text"].parameters())
    assert same_bits(made["text"][0].weight, bare["text"][0].weight)


def test_streams_of_the_users_own(sim):
    """The host waits for nothing, so that only the streams' waiting for each other keeps it right."""
    there, bare = stacks([1, 2, 3]), stacks([1, 2, 3])
    hookcore.apply(there, [ModelOffload("sim")])
    streams = [torch.Stream("sim") for _ in range(2)]
    found = []
    # Each comes on one stream and goes on another one, sometimes the one that used it last.
    for at, stream in enumerate([0, 1, 1, 0, 0, 1, 0, 1] * 3):
        with streams[stream]:
            name = NAMES[at // 2 % 3]
            found.append((name, call(there[name], "sim")))
    on_simulator().synchronize()
    for name, output in found:
        assert same_bits(output.cpu(), call(bare[name]))


def test_what_was_changed_on_one_stream_is_copied_back_on_another(sim):
    there = stacks([1, 2])
    hookcore.apply(there, [ModelOffload("sim")])
    weight = there["text"][0].weight
    with torch.Stream("sim"):
        call(there["text"], "sim")
        with torch.no_grad():
            weight.fill_(3)
    with torch.Stream("sim"):
        call(there["denoiser"], "sim")
    assert (weight == 3).all()


def test_threads_may_call_different_components_at_once():
    there, bare = stacks([4, 5, 6]), stacks([4, 5, 6])
    expected = {name: call(model) for name, model in bare.items()}
    hookcore.apply(there, [ModelOffload("cpu")])
    wrong = []

    def calls(name):
        for _ in range(20):
            wrong.extend([] if same_bits(call(there[name]), expected[name]) else [name])

    threads = [threading.Thread(target=calls, args=(name,)) for name in there]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Refusals


def test_a_component_cannot_go_off_during_its_call(sim):
    there = stacks([1])
    there["text"][0].register_forward_pre_hook(lambda *_: offload(there))
    hookcore.apply(there, [ModelOffload("sim")])
    with pytest.raises(ConcurrentCallError, match="cannot offload 'text' during one of its calls"):
        call(there["text"])


@pytest.mark.parametrize("buffered", [False, True])
def test_a_budget_that_is_too_small_is_refused_before_anything_is_touched(sim, buffered):
    there = stacks([1, 3])
    if buffered:
        there["text"].register_buffer("shift", torch.zeros(5))
    smallest = weights_of(there["denoiser"]) + 20 * buffered
    for refuse in (hookcore.plan, hookcore.apply):
        with pytest.raises(BudgetError, match=f"'denoiser' .* with which it runs is {smallest} bytes"):
            _ = refuse(there, [ModelOffload("sim", memory_budget=smallest - 1)]).needs
    assert not hookcore.status(there).attachments
    assert {it.device.type for it in there["text"].buffers()} <= {"cpu"}
    hookcore.apply(there, [ModelOffload("sim", memory_budget=smallest)])
    call(there["text"])
    call(there["denoiser"])


def test_a_name_that_the_target_lacks_is_refused():
    there = stacks([1, 1])
    with pytest.raises(PlanError, match="sequence names 'denoise', but the target has 'denoiser'"):
        hookcore.apply(there, [ModelOffload("cpu", ("text", "denoise"))])
    assert not hookcore.status(there).attachments


# Shared weights


def tied(sizes=(2, 3, 4)):
    """The first layer of each is the text encoder's."""
    there = stacks(sizes)
    for model in there.values():
        model.insert(0, nn.Linear(16, 16 * len(model)))
    first = nn.Linear(16, 16)
    for model in there.values():
        model.insert(0, first)
    return there, first


def call_tied(model):
    with torch.no_grad():
        return model(torch.ones(16, 16))


def counts_of(applied):
    return {entry.component: entry.counted for entry in applied.run_report().entries}


def test_shared_weights_come_once_and_stay_for_the_next_component(sim):
    there, first = tied()
    technique = ModelOffload("sim", memory_budget=sum(map(weights_of, there.values())) - weights_of(first))
    own = {name: weights_of(model) - weights_of(first) for name, model in there.items()}
    shared = sum(-(-it.nbytes // 64) * 64 for it in first.parameters())
    needs = hookcore.plan(there, [ModelOffload("sim")]).needs
    assert needs["sim"] == max(own.values()) + shared  # whole components, each with it
    before = here()
    applied = hookcore.apply(there, [technique])
    for _ in range(3):
        for model in there.values():
            call_tied(model)
    report = counts_of(applied)
    assert sum(it.moved_bytes for it in report.values()) >= sum(own.values()) + shared
    moved = {name: it.moved_bytes for name, it in report.items()}
    assert moved["text"] % (own["text"] + shared) != 0 or moved["text"] == own["text"] + shared
    assert all(moved[name] % own[name] == 0 for name in ("denoiser", "vae"))  # it was there already
    on_simulator().synchronize()
    assert here() - before <= technique.memory_budget
    applied.remove()
    assert all(model[0] is first for model in there.values())


def test_shared_weights_stay_when_another_component_takes_over(sim):
    there = stacks((2, 2))
    there["denoiser"][0].weight = there["text"][0].weight
    applied = hookcore.apply(there, [ModelOffload("sim")])
    for model in there.values():
        call(model)
    own = weights_of(there["denoiser"]) - there["text"][0].weight.nbytes
    assert counts_of(applied)["denoiser"].moved_bytes == own


def test_shared_weights_are_taken_once_and_given_back_to_where_they_were(sim):
    there, first = tied()
    for model in there.values():
        model.to("sim")
    before = sim.pinned_bytes()
    applied = hookcore.apply(there, [ModelOffload("sim")])
    assert first.weight.device.type == "cpu"
    every = {id(it): -(-it.nbytes // 64) * 64 for model in there.values() for it in model.parameters()}
    assert sim.pinned_bytes() - before == sum(every.values())
    call_tied(there["vae"])
    applied.remove()
    assert {it.device.type for model in there.values() for it in model.parameters()} == {"sim"}
    assert sim.pinned_bytes() == before


def test_a_component_that_is_given_back_has_shared_weights_on_the_host(sim):
    there = stacks((2, 2))
    there["denoiser"][0].weight = there["text"][0].weight
    hookcore.apply(there, [ModelOffload("sim")])
    expected = call(there["text"]).cpu()
    call(there["denoiser"])
    hookcore.remove(there["text"])
    assert same_bits(call(there["text"]), expected)


def test_a_budget_counts_shared_weights_once(sim):
    there, first = tied((3, 3))
    rounded = sum(-(-it.nbytes // 64) * 64 for model in there.values() for it in model.parameters())
    shared = sum(it.nbytes for it in first.parameters())
    both = rounded - shared
    assert hookcore.plan(there, [ModelOffload("sim", memory_budget="1GiB")]).needs == {"sim": both}
    for budget, together in ((both, True), (both - 1, False)):
        applied = hookcore.apply(there, [ModelOffload("sim", tuple(there), memory_budget=budget)])
        before = here()
        call_tied(there["text"])
        assert (here() - before > weights_of(there["text"])) == together
        applied.remove()


def test_a_call_of_a_shared_layer_is_no_call_of_the_other_component(sim):
    there, _ = tied()
    applied = hookcore.apply(there, [ModelOffload("sim")])
    before = here()
    on_simulator().reset_peak_memory_stats()
    call_tied(there["text"])
    assert on_simulator().max_memory_allocated() - before < weights_of(there["text"]) + 10_000
    assert [it.calls for it in counts_of(applied).values()] == [1, 0, 0]


def test_what_is_counted(sim):
    there = stacks([2, 3])
    applied = hookcore.apply(there, [ModelOffload("sim", memory_budget="1GiB")])
    for _ in range(2):
        call(there["text"])
        call(there["text"])
        call(there["denoiser"])
    report = counts_of(applied)
    sizes = {name: weights_of(model) for name, model in there.items()}
    assert [(it.calls, it.hits, it.on_demand) for it in report.values()] == [(4, 2, 2), (2, 1, 1)]
    assert all(report[name].moved_bytes == sizes[name] * report[name].copies for name in sizes)
    assert all(report[name].locked_bytes == report[name].resident_bytes == sizes[name] for name in sizes)
    with hookcore.memory.record_timeline(there) as timeline:
        offload(there)
        call(there["denoiser"])
    spans = {(span.kind, span.group) for span in timeline.spans}
    assert spans >= {("copy", "denoiser"), ("stall", "denoiser"), ("compute", "denoiser")}
    report = counts_of(applied)
    assert (report["denoiser"].timed_calls, report["text"].timed_calls) == (1, 0)
    assert report["denoiser"].stalled_seconds == timeline.stalled > 0
    assert "stalled" in str(applied.run_report())
    applied.reset()
    assert all((it.calls, it.copies, it.moved_bytes) == (0, 0, 0) for it in counts_of(applied).values())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"device": "meta"}, ValueError, "holds no data"),
        ({"device": "cpu", "sequence": "text"}, TypeError, "names of components"),
        ({"device": "cpu", "memory_budget": "1GiB"}, ValueError, "'cpu' has none"),
    ],
)
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        ModelOffload(**options)


def test_what_a_call_puts_in_the_place_of_a_buffer_goes_off(sim):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1024))

        def forward(self, x):
            self.count = self.count + 1
            return x + self.count.sum()

    there = {"a": Counting(), "b": stack(16, 1)}
    hookcore.apply(there, [ModelOffload("sim")])
    with torch.no_grad():
        for calls in range(1, 4):
            there["a"](torch.ones(1))
            offload(there)
            assert there["a"].count.device.type == "cpu"
            assert (there["a"].count == calls).all()


def test_removal_ties_weights_again_that_modules_outside_see(sim):
    inside, outside = nn.Linear(4, 4), nn.Linear(4, 4)
    outside.weight = nn.Parameter(inside.weight.detach().t())  # another object on the same memory
    applied = hookcore.apply(inside, [ModelOffload("sim")])
    with torch.no_grad():
        inside(torch.ones(1, 4))
        inside.weight.mul_(2)
    applied.remove()
    assert inside.weight.data_ptr() == outside.weight.data_ptr()
    assert torch.equal(inside.weight, outside.weight.t())
