"""Group offloading to files: what lies in one already is left there, the rest is written and goes away."""

from __future__ import annotations

import errno
import gc
import inspect
import io
import os
import stat
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checkpoints import Wide, damage, save, stored_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import hookcore
from hookcore import CheckpointError, PlanError
from hookcore.memory import find_mapping
from hookcore.memory.files import spill as written
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import GroupOffload, LayerwiseCasting

X = torch.linspace(-1, 1, 3 * 128).reshape(3, 128)
each_device = pytest.mark.parametrize("device", ["cpu", "sim"])


class Deep(Wide):
    def __init__(self):
        super().__init__(layers=8)


def wide(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Deep().to(dtype).eval()


def call(model, device="cpu", x=X):
    with torch.no_grad():
        return model(x.to(device)).cpu()


def written_files(folder):
    return sorted(Path(folder).glob("*"))


# What is written


@each_device
@pytest.mark.parametrize("level", ["auto", "block_level", "leaf_level"])
def test_weights_are_written_read_and_given_back(sim, device, level, tmp_path):
    model, folder = wide(), tmp_path / "not" / "there"
    before = ModelSnapshot.take(model)
    applied = hookcore.apply(model, [GroupOffload(device, offload_type=level, offload_to_disk_path=folder)])
    (file,) = written_files(folder)
    stored = load_file(file)  # which others can read
    assert all(same_bits(stored[name], it) for name, it in wide().named_parameters())
    assert all(find_mapping(it) for it in model.parameters())
    for _ in range(3):
        torch.testing.assert_close(call(model, device), call(wide()))
    assert written_files(folder) == [file]
    applied.remove()
    before.assert_restored(model)
    assert written_files(folder) == []
    assert sim.pinned_bytes() == 0


@settings(max_examples=25)
@given(module_trees(), st.sampled_from(["block_level", "leaf_level"]), st.integers(0, 9))
def test_any_tree_computes_the_same_and_comes_back(case, level, seed):
    with tempfile.TemporaryDirectory() as folder:
        model, twin = case.build(), case.build()
        before = ModelSnapshot.take(model, twin=twin)
        technique = GroupOffload("cpu", offload_type=level, offload_to_disk_path=folder)
        try:
            applied = hookcore.apply(model, [technique])
        except hookcore.UnsupportedModelError:
            before.assert_restored(model, same_storage=True)
            assert written_files(folder) == []
            return
        for entry in case.entries:
            with torch.no_grad():
                outputs = [case.call(it, entry, seed) for it in (model, twin)]
            torch.testing.assert_close(*outputs)
        applied.remove()
        for one in (model, twin):  # what calls did to buffers differs in the last bits
            for buffer in one.buffers():
                buffer.zero_()
        before.assert_restored(model)
        assert written_files(folder) == []


@each_device
@pytest.mark.parametrize("how", ["loaded", "named", "converted"])
def test_nothing_is_written_of_what_lies_in_a_file(sim, device, how, tmp_path):
    kept = torch.bfloat16 if how == "converted" else torch.float32
    save(stored_tensors(wide(kept)), tmp_path, shards=2)
    folder = tmp_path / "written"
    options = {"offload_to_disk_path": folder} | ({} if how == "loaded" else {"checkpoint": tmp_path})
    model = hookcore.load(Deep, tmp_path) if how == "loaded" else wide(kept).float()
    with patch.object(written, "_write", side_effect=AssertionError):
        applied = hookcore.apply(model, [GroupOffload(device, **options)])
        assert {find_mapping(it)[0].path.parent for it in model.parameters()} == {tmp_path}
        torch.testing.assert_close(call(model, device), call(wide(kept).float()))
        applied.remove()
    assert all(
        same_bits(*pair) for pair in zip(model.parameters(), wide(kept).float().parameters(), strict=True)
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_two_models_in_one_folder_have_files_of_their_own(tmp_path):
    models = [wide(), wide()]
    with torch.no_grad():
        models[1].layers[0].weight.mul_(2)
    expected = [call(model) for model in models]
    handles = [hookcore.apply(it, [GroupOffload("cpu", offload_to_disk_path=tmp_path)]) for it in models]
    assert len(written_files(tmp_path)) == 2
    for model, output in zip(models, expected, strict=True):
        torch.testing.assert_close(call(model), output)
    handles[0].remove()
    assert len(written_files(tmp_path)) == 1
    torch.testing.assert_close(call(models[1]), expected[1])


def test_adapters_are_written_too_and_the_base_is_not_written_again(tmp_path):
    peft = pytest.importorskip("peft")
    bare, model = wide(), wide()
    applied = hookcore.apply(model, [GroupOffload("cpu", offload_to_disk_path=tmp_path)])
    call(model)
    (first,) = written_files(tmp_path)
    for one in (bare, model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
            peft.inject_adapter_in_model(config, one)
    torch.testing.assert_close(call(model), call(bare))
    base, adapter = model.layers[2].base_layer.weight, model.layers[2].lora_A.default.weight
    assert find_mapping(base)[0].path == first
    assert find_mapping(adapter)[0].path != first
    applied.remove()
    assert written_files(tmp_path) == []
    assert all(same_bits(*pair) for pair in zip(model.parameters(), bare.parameters(), strict=True))


@each_device
def test_edits_survive(sim, device, tmp_path):
    model, bare = wide(), wide()
    applied = hookcore.apply(model, [GroupOffload(device, offload_to_disk_path=tmp_path)])
    for number in range(3):
        torch.testing.assert_close(call(model, device), call(bare))
        for one in (model, bare):
            with torch.no_grad():
                one.layers[number].weight.mul_(2)
                one.layers[number + 3].weight.data = torch.full((128, 128), 0.01)
    torch.testing.assert_close(call(model, device), call(bare))
    applied.remove()
    assert all(same_bits(*pair) for pair in zip(model.parameters(), bare.parameters(), strict=True))


def test_bytes_of_the_storage_dtype_travel(sim, tmp_path):
    model, cast = wide(), wide()
    casting = LayerwiseCasting(torch.float8_e4m3fn, skip_modules_pattern=())
    hookcore.apply(cast, [casting])
    hookcore.apply(model, [GroupOffload("sim", offload_to_disk_path=tmp_path), casting])
    for _ in range(3):
        assert same_bits(call(model, "sim"), call(cast))


@each_device
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read_what_is_written(sim, device, mask, tmp_path):
    before = os.umask(mask)
    try:
        hookcore.apply(model := wide(), [GroupOffload(device, offload_to_disk_path=tmp_path / "new")])
    finally:
        os.umask(before)
    (file,) = written_files(tmp_path / "new")
    assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) & 0o077 == 0
    hookcore.remove(model)


@each_device
@pytest.mark.parametrize("changes", [False, True])
def test_a_handle_keeps_no_space_on_the_disk(sim, device, changes, tmp_path):
    model = wide()
    applied = hookcore.apply(model, [GroupOffload(device, offload_to_disk_path=tmp_path)])
    call(model, device)
    mappings = [weakref.ref(find_mapping(it)[0]) for it in model.parameters()]
    if changes:  # the handle goes on showing the plan that it was made with
        model.layers[3] = nn.Linear(128, 128)
        call(model, device)
    plan = applied.plan
    applied.remove()
    for _ in range(200):  # a thread may look at it still
        gc.collect()
        if not any(mapping() for mapping in mappings):
            break
        time.sleep(0.01)
    assert not any(mapping() for mapping in mappings)
    assert plan.steps


# Failing


class Full(io.RawIOBase):
    """A file on a disk that has room for some writes only."""

    def __init__(self, file, left):
        self._file, self._left = file, left

    def write(self, data):
        self._left -= 1
        if self._left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def close(self):
        self._file.close()
        super().close()


@each_device
@pytest.mark.parametrize("left", [0, 1, 7])
def test_nothing_is_touched_if_the_disk_is_full(sim, device, left, tmp_path):
    model = wide()
    before = ModelSnapshot.take(model)
    opening = os.fdopen
    with (
        patch.object(os, "fdopen", lambda descriptor, mode: Full(opening(descriptor, mode), left)),
        pytest.raises(
            CheckpointError,
            match=r"516 KiB of weights cannot be written to .*: No space left on device\. Nothing was",
        ),
    ):
        hookcore.apply(model, [GroupOffload(device, offload_to_disk_path=tmp_path)])
    before.assert_restored(model, same_storage=True)
    assert written_files(tmp_path) == []
    assert not hookcore.status(model).techniques


@each_device
def test_a_file_that_changes_is_found(sim, device, tmp_path):
    model = wide()
    expected = call(model)
    applied = hookcore.apply(model, [GroupOffload(device, offload_to_disk_path=tmp_path)])
    (file,) = written_files(tmp_path)
    put_back = damage(file, "overwrite")
    with pytest.raises(CheckpointError, match=file.name):
        call(model, device)
    put_back()
    torch.testing.assert_close(call(model, device), expected)
    applied.remove()


@each_device
def test_each_of_several_files_is_looked_after(sim, device, tmp_path):
    """The base's checkpoint, and what was written beside it."""
    save(stored_tensors(wide()), tmp_path)
    model = hookcore.load(Deep, tmp_path)
    with torch.no_grad():
        model.layers[7].weight = nn.Parameter(torch.zeros(128, 128))
    expected = call(model)
    hookcore.apply(model, [GroupOffload(device, offload_to_disk_path=tmp_path / "written")])
    for folder in (tmp_path, tmp_path / "written"):
        (file,) = folder.glob("*.safetensors")
        torch.testing.assert_close(call(model, device), expected)
        put_back = damage(file, "overwrite")
        ran = []
        handle = model.layers[0].register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        with pytest.raises(CheckpointError, match=file.name):
            call(model, device)
        assert ran == []
        handle.remove()
        put_back()


def test_files_go_away_with_the_model_and_at_the_end_of_the_process(tmp_path):
    model = wide()
    hookcore.apply(model, [GroupOffload("cpu", offload_to_disk_path=tmp_path)])
    call(model)
    del model
    for _ in range(200):  # what is being read ahead keeps the model until it has been read
        gc.collect()
        if not written_files(tmp_path):
            break
        time.sleep(0.05)
    assert written_files(tmp_path) == []
    code = (
        "import os, sys, torch, hookcore; from hookcore_plugins import GroupOffload;"
        "model = torch.nn.Linear(4, 4);"
        "hookcore.apply(model, [GroupOffload('cpu', offload_to_disk_path=sys.argv[1])]);"
        "sys.argv[2:] and os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert written_files(tmp_path) == []
    subprocess.run([sys.executable, "-c", code, tmp_path, "killed"], check=False)
    (file,) = written_files(tmp_path)
    assert load_file(file).keys() == {"weight", "bias"}


def test_a_checkpoint_of_other_values_is_refused(tmp_path):
    save(stored_tensors(wide()), tmp_path)
    model = wide()
    with torch.no_grad():
        model.layers[3].weight[0, 0] += 1
    before = ModelSnapshot.take(model)
    with pytest.raises(CheckpointError, match=r"'layers\.3\.weight' in memory differs"):
        hookcore.apply(model, [GroupOffload("cpu", checkpoint=tmp_path)])
    before.assert_restored(model)


# Other options of diffusers


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(5))
        self.seen = None

    def forward(self, x, cache=None):
        self.seen = cache
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def pinned(model):
    return [number for number, it in enumerate(model.blocks) if it[0].weight.device.type == "sim"]


@pytest.mark.parametrize(
    ("pins", "found"),
    [
        ("first_last", [0, 4]),
        ("all", [0, 1, 2, 3, 4]),
        (lambda module: module is not None and "never" in vars(module), []),
        (lambda module, name: name in {"blocks.1", "blocks.3"}, [1, 3]),
        (lambda module, name, index: isinstance(module, nn.Sequential) and index % 2 == 1, None),
        (lambda *told: told[1] == "blocks.2", [2]),
    ],
)
@pytest.mark.parametrize("use_stream", [True, False])
def test_groups_can_be_pinned(sim, pins, found, use_stream):
    model = Blocks()
    bare = Blocks()
    bare.load_state_dict(model.state_dict())
    options = {"offload_type": "block_level", "use_stream": use_stream, "pin_groups": pins}
    applied = hookcore.apply(model, [GroupOffload("sim", **options)])
    there = pinned(model)
    assert there == found if found is not None else len(there) in {2, 3}
    x = torch.randn(2, 8)
    for _ in range(3):
        assert same_bits(call(model, "sim", x), call(bare, "cpu", x))
        assert set(there) <= set(pinned(model))
    applied.remove()
    assert pinned(model) == []


def test_pinned_groups_count_in_the_budget(sim):
    model = Blocks()
    with pytest.raises(hookcore.BudgetError):
        hookcore.apply(model, [GroupOffload("sim", memory_budget=600, pin_groups="all")])
    assert not hookcore.status(model).techniques


def test_keyword_inputs_can_stay_where_they_are(sim):
    cache = [torch.zeros(2)]
    for options, stay in [({}, False), ({"exclude_kwargs": "cache"}, True), ({"exclude_kwargs": ()}, False)]:
        model = Blocks()
        with hookcore.apply(model, [GroupOffload("sim", **options)]), torch.no_grad():
            model(torch.randn(2, 8), cache=cache)
            assert (model.seen is cache) == stay


def test_what_diffusers_says_of_inputs_that_stay_is_kept_to(sim):
    models = pytest.importorskip("diffusers.models")
    mixin = models.modeling_utils.ModelMixin

    class Caching(mixin, Blocks):
        _skip_keys = ("cache",)

        def __init__(self):
            mixin.__init__(self)
            Blocks.__init__(self)

    model, cache = Caching(), [torch.zeros(2)]
    with hookcore.apply(model, [GroupOffload("sim")]), torch.no_grad():
        model(torch.randn(2, 8), cache=cache)
        assert model.seen is cache


def test_blocks_can_be_named(sim):
    plan = hookcore.plan(Blocks(), [GroupOffload("sim", offload_type="block_level", block_modules=["stem"])])
    bindings = [binding for step in plan.steps for binding in step.bindings]
    assert {binding.fqn for binding in bindings if not binding.hook.outermost_only} == {"", "stem"}
    with pytest.raises(PlanError, match="no module named 'blocs'; near matches are 'blocks'"):
        hookcore.plan(Blocks(), [GroupOffload("sim", offload_type="block_level", block_modules="blocs")])


def test_pins_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="pin_groups is 'last'; choose 'first_last' or 'all'"):
        GroupOffload("cpu", pin_groups="last")


def test_any_option_of_diffusers_is_taken():
    hooks = pytest.importorskip("diffusers.hooks")
    theirs = set(inspect.signature(hooks.apply_group_offloading).parameters) - {"module"}
    assert theirs <= set(inspect.signature(GroupOffload).parameters)


class Rotating(nn.Module):
    """A layer, and a complex parameter that turns what comes out of it."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.turn = nn.Parameter(torch.ones(4, dtype=dtype) * (1 + 1j))

    def forward(self, x):
        return (self.layer(x) * self.turn).real.float()


@each_device
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_a_parameter_that_no_file_can_hold_stays_on_the_device(sim, device, dtype, level, tmp_path):
    model = Rotating(dtype)
    before, expected = ModelSnapshot.take(model), model(torch.ones(1, 4))
    technique = GroupOffload(device, offload_type=level, offload_to_disk_path=tmp_path)
    applied = hookcore.apply(model, [technique])
    stays = dtype == torch.complex128  # which safetensors has no name for
    assert ("cannot hold its dtype" in str(applied)) == stays
    for _ in range(2):
        torch.testing.assert_close(model(torch.ones(1, 4)).cpu(), expected)
    applied.remove()
    before.assert_restored(model)
