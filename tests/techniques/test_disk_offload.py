"""Disk offloading: the same bits as mapped weights, in bounded memory, whatever users and files do."""

from __future__ import annotations

import contextlib
import copy
import itertools
import struct
import tempfile
import time
from unittest.mock import patch

import pytest
import torch
from attrs import frozen
from checkpoints import (
    Wide,
    X,
    class_of,
    contents,
    copyings,
    damage,
    each_way,
    edit,
    edits,
    every_damage,
    reading,
    save,
    stored_tensors,
    watching_memory,
    ways,
    wide,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_pre_hook

import hookcore
from hookcore import CheckpointError, Hook, Phase, Technique
from hookcore.memory import FileMover, find_mapping, origin_of
from hookcore.memory.files import file_mover as disk
from hookcore.memory.files import reader_threads as workers
from hookcore.memory.files.mapped_file import MappedFile
from hookcore.memory.files.page_arena import rounded
from hookcore.testing import models
from hookcore.testing.cases import tensors_in
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins.disk_offload import DiskOffload
from hookcore_plugins.layerwise_casting import LayerwiseCasting

PAGE = 4096


def mover_of(model):
    """The mover on a model, or None if nothing is streamed."""
    for attachment in hookcore.status(model).attachments:
        for binding in attachment.bindings:
            return binding.hook._placement.mover
    return None


class BoomError(Exception):
    pass


class Bomb:
    """Raises at the n-th begin or end of a module's call."""

    def __init__(self, model):
        self.left = -1
        for module in model.modules():
            module.register_forward_pre_hook(self)
            module.register_forward_hook(self)

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise BoomError


def outcome(model, case, entry, seed, *, mode, dtype):
    """All that one call gives: outputs, then gradients; or the type of what it raised, and nothing."""
    args, kwargs = case.inputs(entry, seed)
    args = [arg.to(dtype) for arg in args]
    for parameter in model.parameters():
        parameter.grad = None
    try:
        with contextlib.ExitStack() as stack:
            if mode == "grad":
                for arg in args:
                    arg.requires_grad_()
            else:
                stack.enter_context({"no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]())
            outputs = list(
                tensors_in((model if entry == "forward" else getattr(model, entry))(*args, **kwargs))
            )
    except Exception as error:
        if isinstance(error, (hookcore.HookcoreError, AssertionError)):
            raise
        return [type(error)], []
    gradients = []
    if mode == "grad" and any(it.requires_grad for it in outputs):
        sum(it.float().sum() for it in outputs if it.requires_grad).backward()
        gradients = [it.grad for it in (*args, *model.parameters())]
    return [it.detach() for it in outputs], gradients


def differences(first, second):
    """Where two outcomes are not the same."""
    if len(first) != len(second) or any(isinstance(it, type) for it in (*first, *second)):
        return [] if first == second else [(first, second)]
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None or b is not None]
    return [(a, b) for a, b in pairs if a is None or b is None or not same_bits(a, b)]


# What is computed

calls = st.lists(
    st.tuples(
        st.integers(0, 3),  # which entry
        st.integers(0, 5),  # the input
        st.sampled_from(["no_grad", "grad", "inference"]),
        st.booleans(),  # train mode
        st.one_of(st.just(-1), st.integers(1, 12)),  # where it fails
    ),
    min_size=1,
    max_size=5,
)


def least_budget(model_class, folder, dtype=None):
    """The least that works, as the error tells it."""
    try:
        hookcore.load(model_class, folder, [DiskOffload(memory_budget=0)], torch_dtype=dtype)
    except hookcore.BudgetError as error:
        return int(str(error).split("works is ")[1].split(" bytes")[0])
    return 0  # nothing but empty tensors


@settings(max_examples=150)
@given(
    case=module_trees(),
    shards=st.integers(1, 3),
    way=ways,
    stored=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    spare_pages=st.one_of(st.none(), st.integers(0, 40)),
    read_ahead=st.sampled_from([0, PAGE, 4 * PAGE, 2**20]),
    made=calls,
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_those_of_mapped_weights(  # noqa: PLR0917
    case, shards, way, stored, dtype, spare_pages, read_ahead, made, seed
):
    with tempfile.TemporaryDirectory() as folder, reading(way, seed), watching_memory():
        tensors = stored_tensors(case.build())
        for (key, tensor), kept in zip(tensors.items(), itertools.cycle(stored), strict=False):
            tensors[key] = tensor.to(kept) if tensor.is_floating_point() else tensor
        assume(any(True for _ in case.build().parameters()))
        save(tensors, folder, shards)
        model_class = class_of(case)
        bare = hookcore.load(model_class, folder, torch_dtype=dtype)
        technique = DiskOffload(
            memory_budget=None
            if spare_pages is None
            else least_budget(model_class, folder, dtype) + spare_pages * PAGE,
            read_ahead=read_ahead,
        )
        model = hookcore.load(model_class, folder, [technique], torch_dtype=dtype)
        # A plain module's other methods are no entries: a weight read there, outside of calls, is as stored.
        converted = any(it != dtype for it in stored)
        entries = ["forward"] if converted else case.entries
        bombs = Bomb(bare), Bomb(model)
        for entry, number, mode, training, fails_at in made:
            name = entries[entry % len(entries)]
            outputs, gradients = [], []
            for one, bomb in zip((bare, model), bombs, strict=True):
                one.train(training)
                bomb.left = fails_at
                for kind, found in zip(
                    (outputs, gradients),
                    outcome(one, case, name, number, mode=mode, dtype=dtype),
                    strict=True,
                ):
                    kind.append(found)
                bomb.left = -1
            assert differences(*outputs) == []
            if converted:
                # autograd adds up the uses of a weight in one sum for each time that it changes its dtype.
                torch.testing.assert_close(*gradients)
            else:
                assert differences(*gradients) == []
        assert all(same_bits(*pair) for pair in zip(bare.buffers(), model.buffers(), strict=True))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of `Wide` in two shards."""
    save(stored_tensors(wide()), tmp_path, shards=2)
    return tmp_path


def call(model):
    with torch.no_grad():
        return model(X)


def read_ahead_done(model):
    """Waits until all that is read ahead is there; says how much."""
    loads = list(mover_of(model)._ahead.values())
    for load in loads:
        load.done.exception()
    return len(loads)


@pytest.mark.parametrize("name", models.real_models())
@each_way
def test_real_models_compute_and_tell_the_same(name, way, tmp_path):
    case = models.real_models()[name]()
    model = case.build()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
        model_class = type(model)
    else:
        (tmp_path / "saved").mkdir()
        save(stored_tensors(model), tmp_path / "saved", shards=2)
        model_class = class_of(case)
    before = contents(tmp_path / "saved")
    bare = hookcore.load(model_class, tmp_path / "saved")
    with reading(way), watching_memory():
        streamed = hookcore.load(model_class, tmp_path / "saved", [DiskOffload(read_ahead="50KB")])
        for entry in (*case.entries, *case.entries):
            for mode in ("no_grad", "grad"):
                outcomes = []
                for one in (bare, streamed):
                    one.zero_grad()
                    with torch.set_grad_enabled(mode == "grad"):
                        outputs = case.call(one, entry)
                    if mode == "grad":
                        sum(it.float().sum() for it in outputs if it.requires_grad).backward()
                        outputs = (*outputs, *(it.grad for it in one.parameters()))
                    outcomes.append([None if it is None else it.detach() for it in outputs])
                assert differences(*outcomes) == []
        expected = bare.state_dict()
        assert streamed.state_dict().keys() == expected.keys()
        assert all(same_bits(value, expected[key]) for key, value in streamed.state_dict().items())
        if hasattr(model, "save_pretrained"):
            streamed.save_pretrained(tmp_path / "again", max_shard_size="40KB")
            again = hookcore.load(model_class, tmp_path / "again")
            assert all(same_bits(value, expected[key]) for key, value in again.state_dict().items())
    assert contents(tmp_path / "saved") == before


@pytest.mark.parametrize("name", ["bert", "t5", "flux", "unet", "sd3"])
@each_way
def test_real_models_compute_in_the_dtype_asked_for(name, way, tmp_path):
    case = models.real_models()[name]()
    case.build().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    model_class = type(case.build())
    bare = hookcore.load(model_class, tmp_path, torch_dtype=torch.float32)
    with reading(way), torch.no_grad():
        streamed = hookcore.load(model_class, tmp_path, ["disk_offload"], torch_dtype=torch.float32)
        assert streamed.dtype == torch.float32
        for _ in range(2):
            assert differences(case.call(bare), case.call(streamed)) == []
        hookcore.remove(streamed)
        assert all(same_bits(*pair) for pair in zip(bare.parameters(), streamed.parameters(), strict=True))
        assert differences(case.call(bare), case.call(streamed)) == []


class Alias(nn.Module):
    """Returns views of its weights, with and without gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x):
        seen = self.first.weight[3:5].detach()
        return self.second(self.first(x)), seen, self.second.weight.t()


@each_way
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_output_that_is_a_view_of_a_weight_stays_right(way, stored, tmp_path):
    model = Alias().to(stored)
    save(stored_tensors(model), tmp_path)
    with reading(way), torch.no_grad():
        streamed = hookcore.load(Alias, tmp_path, [DiskOffload(read_ahead=0)], torch_dtype=torch.float32)
        kept = [streamed(X + number)[1:] for number in range(4)]
    for seen, transposed in kept:
        assert same_bits(seen, model.first.weight[3:5].float())
        assert same_bits(transposed, model.second.weight.t().float())


def test_a_layer_computes_with_what_was_read_for_it(folder):
    """However long that takes: the mapping has the same values, but using it is another way to read."""
    read_range, linear = workers.DirectReader.read_range, nn.functional.linear
    mapped = []

    def slow(*args, **kwargs):
        time.sleep(0.02)
        return read_range(*args, **kwargs)

    def looking(value, weight, bias):
        mapped.append(find_mapping(weight))
        return linear(value, weight, bias)

    with (
        patch.object(workers.DirectReader, "read_range", slow),
        patch.object(nn.functional, "linear", looking),
        reading("read"),
    ):
        call(hookcore.load(Wide, folder, [DiskOffload(read_ahead=0)]))
    assert mapped == [None] * 4


def test_memory_for_direct_reads_is_used_again(folder):
    """Not a page more than the largest layer has been written to, however often all are read."""
    with reading("read"):
        streamed = hookcore.load(Wide, folder, [DiskOffload(read_ahead=0)])
        with patch.object(disk, "separate_pages", side_effect=AssertionError):
            for _ in range(5):
                call(streamed)
    largest = max(it.nbytes for it in mover_of(streamed)._streamed.values())
    assert mover_of(streamed)._pool.arena.nbytes <= rounded(largest)


def test_the_second_call_finds_everything_read_ahead_also_the_first_of_it(folder):
    needed = []
    start = FileMover._start

    def counting(mover, group):
        needed.append(group.name)
        return start(mover, group)

    with patch.object(FileMover, "_start", counting), reading("read"):
        streamed = hookcore.load(Wide, folder, [DiskOffload(read_ahead="160KB")])  # two layers
        for _ in range(3):
            call(streamed)
    assert needed == []


# Copies and true reading


@pytest.mark.parametrize("copying", copyings.values(), ids=copyings.keys())
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, "300KB", "1GiB"])
@each_way
def test_copies_are_plain_models_that_compute_the_same(copying, stored, budget, way, tmp_path):
    save(stored_tensors(wide(stored)), tmp_path)
    plain = wide(stored).float()
    with reading(way):
        streamed = hookcore.load(
            Wide, tmp_path, [DiskOffload(memory_budget=budget, read_ahead=0)], torch_dtype=torch.float32
        )
        streamed.layers[1].weight.requires_grad_(False)
        call(streamed)
        copies = [copying(streamed)]
        third = streamed.layers[2]  # a hook on the module itself would be copied with it
        hook = register_module_forward_pre_hook(
            lambda module, _: copies.append(copying(streamed)) if module is third else None
        )
        call(streamed)
        hook.remove()
    assert len(copies) == 2
    for copied in copies:
        assert not hookcore.status(copied).techniques
        assert [it.requires_grad for it in copied.parameters()] == [
            it.requires_grad for it in streamed.parameters()
        ]
        assert all(same_bits(*pair) for pair in zip(copied.parameters(), plain.parameters(), strict=True))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
                assert copy.deepcopy(parameter).dtype == torch.float32
    with reading(way):
        assert torch.equal(call(streamed), call(hookcore.load(Wide, tmp_path, torch_dtype=torch.float32)))
    hookcore.remove(streamed)
    assert not any(vars(parameter) for parameter in streamed.parameters())


@each_way
def test_weights_read_true_in_the_middle_of_a_call(way, folder):
    expected = wide().state_dict()
    seen = []

    def read(*_):
        seen.append({key: value.clone() for key, value in streamed.state_dict().items()})
        seen.append({key: value.data.clone() for key, value in streamed.named_parameters()})
        seen.append({"layers.3.weight": streamed.layers[3].weight.clone()})

    with reading(way), torch.no_grad():
        streamed = hookcore.load(Wide, folder, ["disk_offload"])
        streamed.layers[1].register_forward_pre_hook(read)
        streamed.layers[1].register_forward_hook(read)
        streamed(X)
        read()
    assert len(seen) == 9
    assert all(same_bits(value, expected[key]) for state in seen for key, value in state.items())


# Edits


@settings(max_examples=100)
@given(
    shards=st.integers(1, 2),
    way=ways,
    in_memory=st.booleans(),
    budget=st.sampled_from([None, "200KB", "300KB", "1MiB"]),
    read_ahead=st.sampled_from([0, "80KB", "1MiB"]),
    steps=st.lists(st.one_of(edits, st.none()), min_size=1, max_size=8),
)
def test_edits_are_seen_by_the_next_call_and_survive_removal(  # noqa: PLR0917
    shards, way, in_memory, budget, read_ahead, steps
):
    with tempfile.TemporaryDirectory() as folder, reading(way):
        save(stored_tensors(wide()), folder, shards)
        before = contents(folder)
        bare = hookcore.load(Wide, folder)
        model = wide() if in_memory else hookcore.load(Wide, folder)
        technique = DiskOffload(folder, memory_budget=budget, read_ahead=read_ahead)
        if in_memory:
            applied = hookcore.apply(model, [technique])
        else:
            model = hookcore.load(Wide, folder, [technique])
        assert torch.equal(call(bare), call(model))
        for step in steps:
            read_ahead_done(model) if mover_of(model) else None
            if step is None:
                assert torch.equal(call(bare), call(model))
                continue
            for one in (bare, model):
                edit(one, *step)
        assert torch.equal(call(bare), call(model))
        applied.remove() if in_memory else hookcore.remove(model)
        assert not any(origin_of(parameter) for parameter in model.parameters())
        assert [key for key, _ in model.named_parameters()] == [key for key, _ in bare.named_parameters()]
        assert all(same_bits(*pair) for pair in zip(bare.parameters(), model.parameters(), strict=True))
        assert contents(folder) == before


@pytest.mark.parametrize("how", ["copy_", "add_", "data.add_", "data =", "bias", "load_state_dict"])
@each_way
def test_an_edit_of_what_is_read_ahead_is_seen(how, way, folder):
    bare = hookcore.load(Wide, folder)
    with reading(way):
        model = hookcore.load(Wide, folder, [DiskOffload(read_ahead="1MiB")])
        call(model)
        assert read_ahead_done(model) == 4
        assert all(bool(load.positions) == (way == "read") for load in mover_of(model)._ahead.values())
        for one in (bare, model):
            edit(one, how, 2, 1.5)
        for _ in range(2):
            assert torch.equal(call(bare), call(model))


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float16])
@each_way
def test_data_given_in_the_stored_dtype_is_converted_and_other_data_is_not(given, way, tmp_path):
    save(stored_tensors(wide(torch.bfloat16)), tmp_path)
    found = []
    with reading(way):
        streamed = hookcore.load(Wide, tmp_path, ["disk_offload"], torch_dtype=torch.float32)
        call(streamed)
        streamed.layers[0].weight.data = torch.full((128, 128), 0.5, dtype=given)
        streamed.layers[0].forward = lambda x: found.append(streamed.layers[0].weight.clone()) or x
        call(streamed)
    wanted = torch.float32 if given == torch.bfloat16 else given
    assert same_bits(found[0], torch.full((128, 128), 0.5, dtype=wanted))
    del streamed.layers[0].forward
    hookcore.remove(streamed)
    assert same_bits(streamed.layers[0].weight.data, found[0])
    assert streamed.layers[1].weight.dtype == torch.float32


@each_way
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_a_forward_changes_in_its_weight_is_kept(way, stored, tmp_path):
    class Growing(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.add_(2**-12)
            return super().forward(x)

    class Model(nn.Sequential):
        def __init__(self):
            super().__init__(Growing(128, 128), nn.Linear(128, 128))

    save(stored_tensors(Model().to(stored)), tmp_path)
    bare = hookcore.load(Model, tmp_path, torch_dtype=torch.float32)
    with reading(way):
        streamed = hookcore.load(Model, tmp_path, ["disk_offload"], torch_dtype=torch.float32)
        for _ in range(3):
            assert torch.equal(call(bare), call(streamed))
        hookcore.remove(streamed)
    assert same_bits(bare[0].weight, streamed[0].weight)


def test_nothing_is_brought_while_what_makes_room_for_it_is_being_let_go(folder):
    leaving, met = [], []
    drop, populate = disk.drop, MappedFile.populate

    def slow(ranges):
        leaving.append(ranges)
        time.sleep(0.02)
        drop(ranges)
        leaving.remove(ranges)

    def checked(mapping, start, nbytes):
        met.extend(leaving)
        populate(mapping, start, nbytes)

    with (
        patch.object(disk, "drop", slow),
        patch.object(MappedFile, "populate", checked),
        reading("mapped"),
    ):
        streamed = hookcore.load(Wide, folder, [DiskOffload(read_ahead=0)])  # room for one layer
        call(streamed)
    assert met == []


def test_a_call_does_not_end_before_its_pages_are_let_go(folder):
    """Or a user's edit after the call could be let go with them."""
    dropped = []
    drop = disk.drop

    def slow(ranges):
        time.sleep(0.02)
        drop(ranges)
        dropped.append(ranges)

    with patch.object(disk, "drop", slow), reading("mapped"):
        streamed = hookcore.load(Wide, folder, [DiskOffload(read_ahead=0)])
        call(streamed)
        assert len(dropped) == 4


@each_way
@pytest.mark.parametrize("in_memory", [True, False])
def test_adapters_are_planned_anew_with_the_base_still_streamed(way, in_memory, folder):
    peft = pytest.importorskip("peft")
    bare = hookcore.load(Wide, folder)
    with reading(way):
        model = wide() if in_memory else hookcore.load(Wide, folder, ["disk_offload"])
        applied = hookcore.apply(model, [DiskOffload(folder)]) if in_memory else None
        assert torch.equal(call(bare), call(model))
        edit(model, "add_", 0, 0.5)
        edit(bare, "add_", 0, 0.5)
        for one in (bare, model):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                config = peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
                peft.inject_adapter_in_model(config, one)
        assert torch.equal(call(bare), call(model))
        base = model.layers[2].base_layer.weight
        assert origin_of(base) is not None
        assert find_mapping(base) is not None
        assert origin_of(model.layers[2].lora_A.default.weight) is None
        applied.remove() if in_memory else hookcore.remove(model)
    assert all(same_bits(*pair) for pair in zip(bare.parameters(), model.parameters(), strict=True))


# Applying to a model in memory, and removing


@settings(max_examples=60)
@given(module_trees(), ways, st.sampled_from([None, "4KB", "20KB", "1MiB"]), st.integers(0, 99))
def test_removal_leaves_a_model_in_memory_as_it_was(case, way, budget, seed):
    with tempfile.TemporaryDirectory() as folder, reading(way, seed):
        model, twin = case.build(), case.build()
        assume(any(True for _ in model.parameters()))
        save(stored_tensors(model), folder)
        snapshot = ModelSnapshot.take(model, twin=twin)
        try:
            applied = hookcore.apply(model, [DiskOffload(folder, memory_budget=budget)])
        except (hookcore.BudgetError, hookcore.UnsupportedModelError):
            snapshot.assert_restored(model, same_storage=True)
            return
        for entry in case.entries:
            with torch.no_grad():
                streamed, expected = case.call(model, entry), case.call(twin, entry)
            # Weights in memory lie another way, so that not all kernels round alike.
            torch.testing.assert_close(streamed, expected)
        if not any(True for _ in model.buffers()):
            assert all(same_bits(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))
        applied.remove()
        for one in (model, twin):  # what calls did to buffers differs in the last bits
            for buffer in one.buffers():
                buffer.zero_()
        snapshot.assert_restored(model)


def test_weights_come_in_full_again_when_casting_is_removed(folder):
    streamed = hookcore.load(Wide, folder, [DiskOffload()])
    expected = call(streamed)
    with hookcore.apply(streamed, [LayerwiseCasting(torch.float8_e4m3fn, skip_modules_pattern=())]):
        assert not torch.equal(call(streamed), expected)
    assert torch.equal(call(streamed), expected)
    hookcore.remove(streamed)
    assert torch.equal(call(streamed), expected)


def test_removal_leaves_nothing_on_weights_that_were_converted(folder):
    streamed = hookcore.load(Wide, folder, [DiskOffload()], torch_dtype=torch.float64)
    assert all(vars(it) for it in streamed.parameters())
    hookcore.remove(streamed)
    assert not any(vars(it) for it in streamed.parameters())


def test_removal_waits_for_what_is_being_read_and_closes_files(folder):
    under_way, closed = [], []
    read_range, close = workers.DirectReader.read_range, workers.DirectReader.close

    def slow(reader, *args, **kwargs):
        under_way.append(reader)
        time.sleep(0.02)
        try:
            return read_range(reader, *args, **kwargs)
        finally:
            under_way.remove(reader)

    def checked(reader):
        assert reader not in under_way
        closed.append(reader)
        close(reader)

    with (
        patch.object(workers.DirectReader, "read_range", slow),
        patch.object(workers.DirectReader, "close", checked),
        reading("read"),
    ):
        streamed = hookcore.load(Wide, folder, [DiskOffload(read_ahead="1MiB")])
        call(streamed)  # at its end the next call's weights begin to be read
        readers = set(mover_of(streamed)._workers._readers.values())
        hookcore.remove(streamed)
    assert readers
    assert set(closed) == readers


def test_memory_is_free_while_applied_and_strides_come_back(tmp_path):
    model = wide()
    model.layers[1].weight = nn.Parameter(model.layers[1].weight.detach().t().contiguous().t())
    save(stored_tensors(model), tmp_path)
    snapshot = ModelSnapshot.take(model)
    storages = [StorageWeakRef(it.untyped_storage()) for it in model.parameters()]
    applied = hookcore.apply(model, [DiskOffload(tmp_path, memory_budget="400KB", read_ahead=0)])
    assert all(it.expired() for it in storages)
    model(torch.zeros(1, 128))
    assert any(mover_of(model)._resident)
    applied.remove()
    snapshot.assert_restored(model)
    assert not any(origin_of(it) for it in model.parameters())


@pytest.mark.parametrize("tie", ["transpose", "row"])
def test_ties_that_a_file_cannot_hold_are_refused(tie, tmp_path):
    model = wide()
    if tie == "transpose":
        model.layers[1].weight = nn.Parameter(model.layers[0].weight.detach().t())
    else:
        model.layers[1].bias = nn.Parameter(model.layers[0].weight.detach()[2])
    save(stored_tensors(model), tmp_path)
    snapshot = ModelSnapshot.take(model)
    with pytest.raises(
        hookcore.UnsupportedModelError, match=r"'layers\.0\.weight' and 'layers\.1\.\w+' share memory"
    ):
        hookcore.apply(model, [DiskOffload(tmp_path)])
    snapshot.assert_restored(model, same_storage=True)


@each_way
def test_objects_that_share_all_memory_do_so_until_one_is_given_other_data(way, tmp_path):
    model = wide()
    model.layers[1].weight = nn.Parameter(model.layers[0].weight.data)
    save({key: it for key, it in stored_tensors(model).items() if key != "layers.1.weight"}, tmp_path)
    bare = copy.deepcopy(model)
    with reading(way):
        hookcore.apply(model, [DiskOffload(tmp_path)])
        torch.testing.assert_close(call(model), call(bare))
        for one in (model, bare):
            one.layers[1].weight.data = torch.full((128, 128), 0.01)
        torch.testing.assert_close(call(model), call(bare))
        hookcore.remove(model)
    assert all(same_bits(*pair) for pair in zip(bare.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("budget", [None, "300KB", "1MiB"])
def test_values_that_differ_from_the_checkpoint_are_refused(budget, folder):
    model = wide()
    with torch.no_grad():
        model.layers[2].bias[5].add_(1e-3)
    snapshot = ModelSnapshot.take(model)
    with pytest.raises(CheckpointError, match=r"'layers\.2\.bias' in memory differs from .*safetensors"):
        hookcore.apply(model, [DiskOffload(folder, memory_budget=budget)])
    snapshot.assert_restored(model)
    assert not hookcore.status(model).techniques


@frozen
class Failing(Technique):
    """Fails to attach, inside or outside of the others."""

    name = "failing"
    phase = Phase.SPLIT

    def bind(self, component):
        class FailingHook(Hook):
            def attach(self, module):
                raise BoomError

        yield hookcore.Binding("", FailingHook())


@pytest.mark.parametrize("budget", [None, "300KB"])
def test_a_later_technique_that_fails_to_attach_rolls_back(budget, folder):
    model = wide()
    snapshot = ModelSnapshot.take(model)
    technique = DiskOffload(folder, memory_budget=budget)
    with pytest.raises(BoomError):
        hookcore.apply(model, [technique, Failing()])
    snapshot.assert_restored(model)
    assert not any(origin_of(it) for it in model.parameters())
    # Nothing is left to be taken for an earlier application: other values are refused as ever.
    with torch.no_grad():
        model.layers[0].weight.add_(1)
    with pytest.raises(CheckpointError, match="in memory differs"):
        hookcore.apply(model, [technique])


def test_removing_applying_and_resetting_again_and_again(folder):
    model = wide()
    snapshot = ModelSnapshot.take(model)
    expected = call(model)
    for _ in range(3):
        applied = hookcore.apply(model, [DiskOffload(folder)])
        for _ in range(2):
            torch.testing.assert_close(call(model), expected)
            applied.reset()
        applied.remove()
        applied.remove()
        snapshot.assert_restored(model)


def test_a_model_made_elsewhere_needs_a_path():
    with pytest.raises(CheckpointError, match=r"not made by hookcore\.load"):
        hookcore.apply(wide(), [DiskOffload()])


# Inference mode and files of other writers


@each_way
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_memory", [True, False])
def test_nothing_made_in_inference_mode_stays_behind(way, stored, in_memory, tmp_path):
    save(stored_tensors(wide(stored)), tmp_path)
    with reading(way):
        with torch.inference_mode():
            technique = DiskOffload(tmp_path, memory_budget="400KB", read_ahead=0)
            if not in_memory:
                model = hookcore.load(Wide, tmp_path, [technique], torch_dtype=torch.float32)
        if in_memory:
            model = wide(stored).float()
            with torch.inference_mode():
                hookcore.apply(model, [technique])
        with torch.inference_mode():
            first = model(X)
        x = X.clone().requires_grad_()
        second = model(x)
        assert torch.equal(first, second)
        second.sum().backward()
        with torch.inference_mode():
            hookcore.remove(model)
        assert not any(it.is_inference() for it in model.parameters())
        model.zero_grad()
        model(X).sum().backward()


def test_files_whose_tensors_are_not_aligned(tmp_path):
    save(stored_tensors(wide()), tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 4 + 4)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    bare = hookcore.load(Wide, tmp_path)
    assert bare.layers[0].weight.data_ptr() % 4
    with reading("read"):
        assert torch.equal(call(hookcore.load(Wide, tmp_path, ["disk_offload"])), call(bare))


# Files that change


@every_damage
@each_way
@pytest.mark.parametrize("read_ahead", [0, "1MiB"])
def test_a_file_changed_between_calls_is_an_error_until_it_is_put_back(how, way, read_ahead, folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    expected = call(hookcore.load(Wide, folder))
    with reading(way):
        model = hookcore.load(Wide, folder, [DiskOffload(read_ahead=read_ahead)])
        call(model)
        assert bool(read_ahead_done(model)) == bool(read_ahead)
        put_back = damage(file, how)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=rf"{file.name}', which holds tensor 'layers\."):
                call(model)
        put_back()
        assert torch.equal(call(model), expected)


@pytest.mark.parametrize("how", ["append", "overwrite", "replace", "delete"])
@each_way
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_file_changed_during_a_call_is_an_error_of_this_call(how, way, layer, folder):
    file = min(folder.glob("*.safetensors"))
    expected = call(hookcore.load(Wide, folder))
    with reading(way):
        model = hookcore.load(Wide, folder, [DiskOffload(read_ahead="1MiB")])
        call(model)
        handle = model.layers[layer].register_forward_hook(lambda *_: put_back.append(damage(file, how)))
        put_back = []
        with pytest.raises(CheckpointError, match=file.name):
            call(model)
        handle.remove()
        put_back[0]()
        assert torch.equal(call(model), expected)


def layers_run(model):
    """A list to which each layer adds its number when it has computed."""
    run = []
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    return run


@every_damage
@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_no_layer_computes_once_a_file_has_changed(how, budget, folder):
    model = hookcore.load(Wide, folder, [DiskOffload(memory_budget=budget)])
    call(model)
    run = layers_run(model)
    damage(sorted(folder.glob("*.safetensors"))[1], how)
    with pytest.raises(CheckpointError):
        call(model)
    assert run == []


@pytest.mark.parametrize("how", ["append", "overwrite", "replace", "delete"])
@each_way
def test_no_later_layer_computes_once_a_file_has_changed_during_a_call(how, way, folder):
    with reading(way):
        model = hookcore.load(Wide, folder, [DiskOffload(read_ahead="1MiB")])
        call(model)
        run = layers_run(model)
        file = min(folder.glob("*.safetensors"))
        model.layers[1].register_forward_hook(lambda *_: damage(file, how) and None)
        with pytest.raises(CheckpointError):
            call(model)
    assert run == [0, 1]


@each_way
@pytest.mark.parametrize("step", ["place_of", "is_cached"])
def test_a_group_that_cannot_be_brought_is_let_go_and_brought_the_next_time(way, step, folder):
    expected = call(hookcore.load(Wide, folder))

    def failing_at_second(*args):
        asked.append(args)
        if len(asked) == 2:  # of a layer's two weights, or at its second layer
            raise BoomError
        return original(*args)

    with reading(way):
        original = getattr(disk, step)
        model = hookcore.load(Wide, folder, [DiskOffload(read_ahead=0)])
        shown = [it.data_ptr() for it in model.parameters()]
        for _ in range(3):
            asked = []
            with patch.object(disk, step, failing_at_second), pytest.raises(BoomError):
                call(model)
            assert not mover_of(model)._in_use
            assert [it.data_ptr() for it in model.parameters()] == shown
            assert torch.equal(call(model), expected)


@every_damage
def test_what_was_read_ahead_of_a_changed_file_is_never_used(how, folder):
    """Also when the file is put back before the call that would have used it, but after one that failed."""
    file = sorted(folder.glob("*.safetensors"))[1]
    expected = call(hookcore.load(Wide, folder))
    with reading("read"):
        model = hookcore.load(Wide, folder, [DiskOffload(read_ahead="1MiB")])
        call(model)
        read_ahead_done(model)
        for load in mover_of(model)._ahead.values():  # as if it had been read while the file was damaged
            load.read.tensor.fill_(7)
        put_back = damage(file, how)
        with pytest.raises(CheckpointError):
            call(model)
        put_back()
        assert torch.equal(call(model), expected)


@every_damage
def test_what_was_read_ahead_is_not_used_after_a_removal_that_found_a_changed_file(how, folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    model = wide()
    with reading("read"):
        applied = hookcore.apply(model, [DiskOffload(folder, read_ahead="1MiB")])
        expected = call(model)
        read_ahead_done(model)
        for load in mover_of(model)._ahead.values():  # as if it had been read while the file was damaged
            load.read.tensor.fill_(7)
        put_back = damage(file, how)
        with pytest.raises(CheckpointError):
            applied.remove()
        put_back()
        assert torch.equal(call(model), expected)


@every_damage
@pytest.mark.parametrize("budget", [None, "300KB", "1MiB"])
def test_removal_never_gives_a_model_the_values_of_a_changed_file(how, budget, folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    model = wide()
    snapshot = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [DiskOffload(folder, memory_budget=budget)])
    call(model)
    put_back = damage(file, how)
    with pytest.raises(CheckpointError, match=file.name):
        applied.remove()
    assert hookcore.status(model).techniques == ("disk_offload",)
    put_back()
    call(model)
    applied.remove()
    snapshot.assert_restored(model)


@every_damage
def test_removal_with_conversion_reads_no_changed_file(how, tmp_path):
    save(stored_tensors(wide(torch.bfloat16)), tmp_path)
    model = hookcore.load(Wide, tmp_path, ["disk_offload"], torch_dtype=torch.float32)
    expected = call(model)
    put_back = damage(tmp_path / "model.safetensors", how)
    with pytest.raises(CheckpointError):
        hookcore.remove(model)
    put_back()
    assert torch.equal(call(model), expected)
    hookcore.remove(model)
    torch.testing.assert_close(call(model), expected)


@pytest.mark.parametrize("how", ["truncate", "delete"])
def test_a_file_damaged_before_it_is_opened(how, folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    damage(file, how)
    for attempt in (
        lambda: hookcore.load(Wide, folder, ["disk_offload"]),
        lambda: hookcore.apply(wide(), [DiskOffload(folder)]),
    ):
        with pytest.raises(CheckpointError, match=rf"(?s){file.name}.*'layers\."):
            attempt()
