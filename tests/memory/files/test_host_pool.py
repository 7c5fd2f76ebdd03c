"""Components of a target have the memory for what is read from disk in turn, within one budget."""

from __future__ import annotations

import contextlib
import gc
import re
import tempfile
import threading
import weakref
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checkpoints import (
    Wide,
    X,
    damage,
    edit,
    edits,
    reading,
    save,
    stored_tensors,
    watching_memory,
    ways,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import hookcore
from hookcore import BudgetError, CheckpointError, ConcurrentCallError
from hookcore.memory import FileMover, StreamMover
from hookcore.memory.files import file_mover as disk
from hookcore.memory.files.page_arena import rounded
from hookcore.testing.snapshot import same_bits
from hookcore_plugins import DiskOffload, GroupOffload

NAMES = ("text", "control", "unet")
LAYER = rounded(128 * 129 * 4) + 4_096  # bytes of memory, where it doesn't begin with a page


class BoomError(Exception):
    pass


class Part(Wide):
    """Layers, and perhaps components that are called between them."""

    inner = ()

    def forward(self, x, fails=False, skip=None):
        for number, layer in enumerate(self.layers):
            if number != skip:
                x = x + layer(x) / 4
            if not number:
                for other in self.inner:
                    x = other(x)
        if fails:
            raise BoomError
        return x


class Parts:
    """Components in checkpoints of their own, with a technique, and their bare twins."""

    def __init__(self, folder, sizes, stored=torch.float32):
        self.sizes = dict(zip(NAMES, sizes, strict=False))
        self.folders = {name: Path(folder, name) for name in self.sizes}
        for seed, (name, layers) in enumerate(self.sizes.items()):
            self.folders[name].mkdir()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                save(stored_tensors(Part(layers).to(stored)), self.folders[name])
        self.ours, self.bare = self.load(), self.load()

    def load(self):
        return {
            name: hookcore.load(Part, self.folders[name], layers=layers, torch_dtype=torch.float32)
            for name, layers in self.sizes.items()
        }

    def techniques(self, budget, read_ahead=0):
        """One for each, the same but for where its checkpoint is."""
        return {
            name: [DiskOffload(folder, memory_budget=budget, read_ahead=read_ahead)]
            for name, folder in self.folders.items()
        }

    def apply(self, budget, read_ahead=0):
        self.applied = hookcore.apply(self.ours, self.techniques(budget, read_ahead))
        return self.applied

    def call(self, name, **options):
        outputs = [call(both[name], **options) for both in (self.bare, self.ours)]
        assert same_bits(*outputs)

    def least(self):
        """The smallest budget that works, as the error says."""
        with pytest.raises(BudgetError) as caught:
            hookcore.plan(self.ours, self.techniques(1))
        return int(re.search(r"works is (\d+) bytes", str(caught.value)).group(1))


def call(model, **options):
    with torch.no_grad():
        return model(X, **options)


def movers_of(applied):
    found = {}
    for item in applied._attachments:
        for binding in item.bindings:
            mover = binding.hook._placement.mover
            if isinstance(mover, FileMover | StreamMover):
                found[item.component.name] = mover
    return found


def room_of(applied):
    return next(iter(movers_of(applied).values()))._pool


def kept(applied):
    return {name: len(mover._kept) for name, mover in movers_of(applied).items()}


@contextlib.contextmanager
def counting_reads():
    """How many groups were brought in each call."""
    found = []
    submit = FileMover._submit

    def counted(mover, *args):
        found.append(mover.number)
        return submit(mover, *args)

    with patch.object(FileMover, "_submit", counted):
        yield found


@pytest.fixture
def directly():
    """Memory of what was used is there at once, as no pages have to be let go."""
    with reading("read"):
        yield


def nothing_beside(*_):
    raise AssertionError("memory was taken beside the budget")


# Right, whatever happens

names = st.sampled_from(NAMES)
options = st.fixed_dictionaries({}, optional={"fails": st.just(True), "skip": st.integers(0, 3)})
steps = st.lists(
    st.one_of(
        st.tuples(st.just("call"), names, options),
        st.tuples(st.just("thrice"), names, st.none()),
        st.tuples(st.just("round"), names, st.none()),
        st.tuples(st.just("gradients"), names, st.none()),
        st.tuples(st.just("edit"), names, edits),
        st.tuples(st.just("reset"), names, st.none()),
    ),
    min_size=1,
    max_size=8,
)


def both_edit(parts, name, how, layer, value):
    for both in (parts.bare, parts.ours):
        edit(both[name], how, layer % len(both[name].layers), value)


def gradients(parts, name):
    found = []
    for both in (parts.bare, parts.ours):
        x = X.clone().requires_grad_()
        both[name](x).sum().backward()
        found.append(x.grad)
        both[name].zero_grad()
    assert same_bits(*found)


def calls(parts, name, options):
    if "fails" not in options:
        parts.call(name, **options)
        return
    for both in (parts.bare, parts.ours):
        with pytest.raises(BoomError):
            call(both[name], **options)


def rounds(parts, *called):
    for name in called * 3:
        parts.call(name)


KINDS = {
    "call": calls,
    "thrice": lambda parts, name, _: rounds(parts, name),
    "round": lambda parts, name, _: rounds(parts, name, NAMES[NAMES.index(name) - 1]),
    "gradients": lambda parts, name, _: gradients(parts, name),
    "edit": lambda parts, name, what: both_edit(parts, name, *what),
    "reset": lambda parts, *_: parts.applied.reset(),
}


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 4)] * 3),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    ways,
    st.none() | st.integers(0, 12),
    st.sampled_from([0, LAYER, 10 * LAYER]),
    st.booleans(),
    steps,
    st.integers(0, 99),
)
def test_outputs_are_those_of_bare_components(  # noqa: PLR0917
    sizes, stored, way, spare, read_ahead, nested, made, seed
):
    with tempfile.TemporaryDirectory() as folder, reading(way, seed), watching_memory():
        parts = Parts(folder, sizes, stored)
        if nested:
            for both in (parts.bare, parts.ours):
                both["unet"].inner = (both["control"],)
        if stored != torch.float32:  # what is edited between calls is what is stored, and that is rounded
            made = [step for step in made if step[0] != "edit"]
        budget = None if spare is None else parts.least() + spare * LAYER // 2
        applied = parts.apply(budget, read_ahead)
        with contextlib.ExitStack() as stack:
            # Calls in each other hold more at once, and autograd what it needs.
            if not nested and all(kind != "gradients" for kind, *_ in made):
                stack.enter_context(patch.object(disk, "separate_pages", nothing_beside))
            for kind, name, what in made:
                KINDS[kind](parts, name, what)
        room = room_of(applied)
        assert budget is None or room.arena.nbytes == rounded(budget)
        applied.remove()
        assert room._arena is None
        for name in NAMES:
            parts.call(name)
            ours, bare = (dict(both[name].named_parameters()) for both in (parts.ours, parts.bare))
            assert all(same_bits(ours[key], it) for key, it in bare.items())
            assert not any(vars(it) for it in ours.values())


def test_what_was_changed_uncounted_is_kept_when_it_makes_way(tmp_path):
    parts = Parts(tmp_path, (2, 2, 6))
    with reading("read"):
        applied = parts.apply(6 * LAYER)
        for _ in range(4):
            parts.call("unet")
        assert kept(applied)["unet"] == 6
        for both in (parts.bare, parts.ours):
            for layer in both["unet"].layers:
                layer.weight.data[5] += 1
        for _ in range(4):
            parts.call("text")  # now that is what repeats
        assert kept(applied) == {"text": 2, "control": 0, "unet": 4}
        parts.call("unet")


def test_data_given_to_what_is_kept_are_used_as_calls_find_them(tmp_path):
    parts = Parts(tmp_path, (2, 2), torch.bfloat16)
    applied = parts.apply("1GiB")
    parts.call("text")
    assert kept(applied) == {"text": 2, "control": 0}
    given = torch.full((128, 128), 0.125)
    parts.ours["text"].layers[0].weight.data = given.bfloat16()  # as it is stored
    parts.bare["text"].layers[0].weight.data = given
    parts.call("text")


def test_what_makes_way_in_inference_mode_outlives_it(tmp_path):
    parts = Parts(tmp_path, (2, 2, 6), torch.bfloat16)
    with reading("read"):
        whole = hookcore.plan(parts.ours["unet"], parts.techniques("1GiB")["unet"]).needs["cpu"]
        applied = parts.apply(whole)
        for _ in range(4):
            parts.call("unet")
        assert kept(applied)["unet"] == 6  # and so they are edited in the dtype of calls
        for both in (parts.bare, parts.ours):
            for layer in both["unet"].layers:
                layer.weight.data[5] += 1
        with torch.inference_mode():
            while room_of(applied).evict_one():
                pass
        assert kept(applied)["unet"] == 0
        gradients(parts, "unet")


@pytest.mark.usefixtures("directly")
def test_what_an_outer_call_keeps_makes_way_for_an_inner_one(tmp_path):
    parts = Parts(tmp_path, (1, 2, 8))
    applied = parts.apply(6 * LAYER)
    for _ in range(4):
        parts.call("unet")
    assert kept(applied)["unet"] == 5
    for both in (parts.bare, parts.ours):
        both["unet"].inner = (both["control"],)
    with patch.object(disk, "separate_pages", nothing_beside):
        for _ in range(2):
            parts.call("unet")


# Budget


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(-1, 20), st.sampled_from([0, LAYER]))
def test_the_smallest_budget_is_named_and_works(sizes, spare, read_ahead):
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(folder, sizes)
        least = parts.least()
        assert least <= LAYER
        budget = least + (spare if spare < 0 else spare * LAYER // 2)
        if spare < 0:
            with pytest.raises(BudgetError, match=r"the call of 'layers\.\d' in '(text|control|unet)' needs"):
                parts.apply(budget, read_ahead)
            assert not hookcore.status(parts.ours).attachments
            return
        plan = hookcore.plan(parts.ours, parts.techniques(budget, read_ahead))
        whole = sum(sizes) * LAYER
        assert min(budget, 0.9 * whole) <= plan.needs["cpu"] <= min(budget, whole)
        assert [bool(step.needs) for step in plan.steps] == [True, False, False]
        parts.apply(budget, read_ahead)
        for name in NAMES * 2:
            parts.call(name)


@pytest.mark.parametrize("technique", [DiskOffload, GroupOffload])
def test_without_a_budget_the_largest_counts(technique, tmp_path):
    parts = Parts(tmp_path, (8, 2, 5))
    if technique is DiskOffload:
        techniques = parts.techniques(None, read_ahead=2 * LAYER)
    else:
        folder = tmp_path / "written"
        offload = GroupOffload("cpu", offload_type="leaf_level", offload_to_disk_path=folder)
        techniques = {name: [offload] for name in NAMES}
    plans = [hookcore.plan({name: parts.ours[name]}, {name: techniques[name]}) for name in NAMES]
    alone = [plan.needs["cpu"] for plan in plans]
    assert hookcore.plan(parts.ours, techniques).needs["cpu"] == max(alone)
    applied = hookcore.apply(parts.ours, techniques)
    movers = list(movers_of(applied).values())
    for name in NAMES * 2:
        parts.call(name)
        assert sum(bool(mover._ahead) for mover in movers) == 1
        assert not any(mover._kept for mover in movers)
        assert movers[0]._pool.arena.lent() <= max(alone) + 8 * 4_096  # whole pages are read


# What stays


@pytest.mark.parametrize("way", ["mapped", "read"])
def test_what_repeats_has_the_budget(way, tmp_path):
    """A denoiser in its loop, with others that run once before and after it."""
    parts = Parts(tmp_path, (5, 1, 8))
    with reading(way), counting_reads() as reads:
        applied = parts.apply(7 * LAYER, read_ahead=LAYER)
        brought = []
        for _ in range(2):
            for name in ("text", *["unet"] * 6, "control"):
                reads.clear()
                parts.call(name)
                brought.append(len(reads))
        assert kept(applied)["unet"] >= 4
    unet = movers_of(applied)["unet"]
    assert len(unet._kept) == len(unet._to_keep) == 5
    # It is chosen when the third call begins; from the fourth one on, what stays is there.
    assert 8 <= sum(brought[4:7]) <= 10
    # The others are streamed, and hardly anything was given up for that.
    assert sum(brought[9:15]) <= 6 * 3 + 2


@pytest.mark.usefixtures("directly")
def test_a_component_that_runs_once_is_read_ahead_too(tmp_path):
    """Groups that another one keeps make way for that, no more of them than it takes."""
    parts = Parts(tmp_path, (4, 1, 8))
    applied = parts.apply(8 * LAYER, read_ahead=2 * LAYER)
    for _ in range(5):
        parts.call("unet")
    assert kept(applied)["unet"] == 8
    ahead = []
    mover = movers_of(applied)["text"]
    for layer in parts.ours["text"].layers:
        layer.register_forward_pre_hook(lambda *_: ahead.append(len(mover._ahead)))
    for _ in range(2):
        parts.call("text")
    assert ahead[:3] == [2, 2, 2]
    assert kept(applied)["unet"] == 5


@pytest.mark.usefixtures("directly")
def test_components_in_turn_divide_the_budget(tmp_path):
    parts = Parts(tmp_path, (2, 6, 6))
    applied = parts.apply(7 * LAYER, read_ahead=LAYER)
    with counting_reads() as reads:
        for _ in range(5):
            reads.clear()
            for name in ("control", "unet"):
                parts.call(name)
        assert len(reads) == 12 - 5
    found = kept(applied)
    assert found["control"] + found["unet"] == 5
    assert min(found["control"], found["unet"]) >= 2


def test_where_all_fit_together_all_stay_from_the_first_call_on(tmp_path):
    parts = Parts(tmp_path, (2, 3, 4))
    applied = parts.apply(9 * LAYER)
    for name in NAMES:
        parts.call(name)
    assert kept(applied) == {"text": 2, "control": 3, "unet": 4}
    with counting_reads() as reads:
        for name in NAMES:
            parts.call(name)
    assert reads == []
    assert "resident on cpu" in str(hookcore.status(parts.ours))


@pytest.mark.usefixtures("directly")
def test_what_is_called_next_is_read_ahead(tmp_path):
    parts = Parts(tmp_path, (3, 3, 3))
    applied = parts.apply(None, read_ahead=2 * LAYER)
    for name in NAMES * 3:
        parts.call(name)
    assert [len(mover._ahead) for mover in movers_of(applied).values()] == [2, 0, 0]
    with counting_reads() as reads:
        for name in NAMES:
            parts.call(name)
    assert len(reads) == 9  # nothing in vain


# Those that come and go


def test_a_component_that_is_removed_or_goes_away_gives_its_share_back(tmp_path):
    parts = Parts(tmp_path, (3, 3, 3))
    applied = parts.apply(9 * LAYER)
    for name in NAMES:
        parts.call(name)
    room = room_of(applied)
    lent = room.arena.lent()
    hookcore.remove(parts.ours["control"])
    assert room.arena.lent() < 0.7 * lent
    gone = [weakref.ref(parts.ours["text"]), weakref.ref(parts.ours["text"].layers[0].weight)]
    del applied, parts.applied, parts.ours["text"]
    gc.collect()
    assert [it() for it in gone] == [None, None]
    parts.call("unet")
    assert room.arena.lent() < 0.4 * lent
    hookcore.remove(parts.ours["unet"])
    assert room._arena is None


def test_one_thread_at_a_time(tmp_path):
    parts = Parts(tmp_path, (3, 3, 3))
    parts.apply(4 * LAYER)
    for name in NAMES:
        parts.call(name)
    inside, go_on = threading.Event(), threading.Event()

    def waits(*_):
        inside.set()
        assert go_on.wait(30)

    handle = parts.ours["control"].layers[1].register_forward_pre_hook(waits)
    thread = threading.Thread(target=parts.call, args=("control",))
    thread.start()
    assert inside.wait(30)
    for what in (lambda: call(parts.ours["unet"]), lambda: hookcore.remove(parts.ours["unet"])):
        with pytest.raises(ConcurrentCallError, match="another thread calls a component"):
            what()
    go_on.set()
    thread.join()
    handle.remove()
    for name in NAMES * 3:
        parts.call(name)
    hookcore.remove(parts.ours)


def test_a_component_whose_weights_change_within_a_call_of_another(tmp_path):
    """It is bound anew then, while the other's weights are in use."""
    parts = Parts(tmp_path, (1, 3, 3))
    for both in (parts.bare, parts.ours):
        both["unet"].inner = (both["control"],)
    applied = parts.apply(5 * LAYER)
    for _ in range(4):
        parts.call("unet")
    for both in (parts.bare, parts.ours):
        edit(both["control"], "module", 1, 0.5)
    for _ in range(2):
        parts.call("unet")
        parts.call("control")
    applied.remove()


@pytest.mark.parametrize("how", ["truncate", "overwrite", "delete"])
def test_a_changed_file_of_one_component_is_no_matter_of_the_others(how, tmp_path):
    parts = Parts(tmp_path, (4, 2, 6))
    with reading("read"):
        applied = parts.apply(4 * LAYER)
        for _ in range(4):
            parts.call("unet")
        put_back = damage(parts.folders["unet"] / "model.safetensors", how)
        for _ in range(4):
            parts.call("text")
        with pytest.raises(CheckpointError, match=r"unet.model\.safetensors"):
            call(parts.ours["unet"])
        put_back()
        for name in ("unet", "text", "unet"):
            parts.call(name)
        applied.remove()


@pytest.mark.parametrize("technique", [DiskOffload, GroupOffload])
def test_components_share_a_device_wherever_their_files_are(sim, technique, tmp_path):
    parts = Parts(tmp_path, (4, 1, 4))
    weights = sum(it.nbytes for model in parts.ours.values() for it in model.parameters())
    device = {"execution_device" if technique is DiskOffload else "onload_device": "sim"}
    techniques = {
        name: [technique(checkpoint=folder, memory_budget=weights // 2, **device)]
        for name, folder in parts.folders.items()
    }
    assert sum(hookcore.plan(parts.ours, techniques).needs.values()) <= weights // 2
    before = torch.get_device_module("sim").memory_allocated()
    applied = hookcore.apply(parts.ours, techniques)
    assert len({id(it) for it in (mover._pool for mover in movers_of(applied).values())}) == 1
    for name in NAMES * 3:
        with torch.no_grad():
            found = parts.ours[name](X.to("sim")).cpu()
        torch.testing.assert_close(found, call(parts.bare[name]))
    assert torch.get_device_module("sim").memory_allocated() - before <= weights // 2
