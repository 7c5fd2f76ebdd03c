"""What the plugins know of torch, diffusers, transformers and accelerate, held against those libraries."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import accelerate.big_modeling
import accelerate.hooks
import diffusers
import pluggy
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import build_glob_alternation

from hookcore import CheckpointError, PlanError, hookspecs
from hookcore.testing.models import real_models
from hookcore_plugins import accelerate_hooks, diffusers_models, torch_modules, transformers_models

PLUGINS = (torch_modules, diffusers_models, transformers_models, accelerate_hooks)
DIFFUSERS = ("flux", "sd3", "unet", "autoencoder")
TRANSFORMERS = ("bert", "t5", "clip_text", "gpt2")
CASES = {name: make() for name, make in real_models().items()}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    """The four plugins behind hookcore's own hookspecs."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for plugin in PLUGINS:
        manager.register(plugin)
    manager.check_pending()
    return manager.hook


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name to (bare model, the folder it was saved in)."""
    root = tmp_path_factory.mktemp("saved")
    saved = {}
    for name in DIFFUSERS + TRANSFORMERS:
        saved[name] = CASES[name].build(), root / name
        saved[name][0].save_pretrained(saved[name][1])
    return saved


def describe(hooks, model):
    """The one answer there is, or None."""
    answers = hooks.hookcore_describe_model(model=model, modules=dict(model.named_modules()))
    assert len(answers) <= 1
    return answers[0] if answers else None


def find(hooks, model):
    answers = hooks.hookcore_find_foreign(model=model, modules=dict(model.named_modules()))
    return [mechanism for found in answers for mechanism in found]


def build(hooks, model_class, folder, overrides=None):
    return hooks.hookcore_build_model(
        model_class=model_class, folder=folder, config_overrides=overrides or {}
    )


def follow(remedy, model):
    """Runs the first code in a remedy."""
    names = {"model": model, "diffusers": diffusers, "accelerate": accelerate, "torch": torch}
    exec(re.search("`(.*?)`", remedy)[1], names)  # noqa: S102 - a remedy is code, and has to run


def follow_all(hooks, model):
    """Runs the remedy of everything found, as a user would: one after the other until nothing is left."""
    for _ in range(100):
        found = find(hooks, model)
        if not found:
            return
        follow(found[0].remedy, model)
    pytest.fail(f"still there: {found}")


def outputs_equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


# What models declare


def test_nothing_is_imported_for_a_model_that_needs_none_of_it():
    code = """
import sys
from torch import nn
from hookcore_plugins import accelerate_hooks, diffusers_models, torch_modules, transformers_models
model = nn.Linear(2, 2)
modules = {"": model}
assert diffusers_models.hookcore_describe_model(model, modules) is None
assert transformers_models.hookcore_describe_model(model, modules) is None
for plugin in (accelerate_hooks, diffusers_models, torch_modules):
    assert list(plugin.hookcore_find_foreign(modules)) == []
for plugin in (diffusers_models, transformers_models):
    assert plugin.hookcore_build_model(nn.Linear, None, {}) is None
loaded = {"accelerate", "diffusers", "peft", "transformers", "torch._dynamo", "torch.distributed.fsdp"}
assert not loaded & set(sys.modules), loaded & set(sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'plugins'}"},
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", DIFFUSERS + TRANSFORMERS)
def test_declared_names_are_those_of_modules(hooks, name):
    model = CASES[name].build()
    conventions = describe(hooks, model)
    classes = {type(module).__name__ for module in model.modules()}
    assert classes & set(conventions.block_classes)
    assert set(conventions.group_modules) <= dict(model.named_modules()).keys()
    assert set(conventions.entries) == set(CASES[name].entries)


def test_blocks_of_diffusers(hooks):
    assert describe(hooks, CASES["flux"].build()).block_classes == (
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    )
    assert "T5Block" in describe(hooks, CASES["t5"].build()).block_classes


@pytest.mark.parametrize("convolution", [True, False])
def test_block_holders_that_a_config_leaves_out_are_not_named(hooks, convolution):
    vae = diffusers.AutoencoderKL(use_quant_conv=convolution, use_post_quant_conv=convolution)
    expected = {"encoder", "decoder"} | ({"quant_conv", "post_quant_conv"} if convolution else set())
    assert set(describe(hooks, vae).group_modules) == expected


@pytest.mark.parametrize("name", ["flux", "gpt2"])
def test_a_model_inside_another_module_is_still_known(hooks, name):
    model = CASES[name].build()
    inner, outer = describe(hooks, model), describe(hooks, nn.ModuleDict({"inner": model}))
    assert outer.block_classes == inner.block_classes
    assert outer.keep_dtype_patterns == inner.keep_dtype_patterns
    assert outer.entries == ("forward",)


def test_a_plain_model_has_no_conventions(hooks):
    assert describe(hooks, CASES["cnn"].build()) is None


def test_entries_besides_forward_of_transformers(hooks):
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision = text | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text | {"vocab_size": 9}, vision_config=vision)
    clip = transformers.CLIPModel(config)
    assert set(describe(hooks, clip).entries) == {"forward", "get_text_features", "get_image_features"}
    assert describe(hooks, CASES["gpt2"].build()).entries == ("forward",)


# Which weights keep their dtype


class Declaring(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A diffusers model with names in which patterns can go wrong."""

    config_name = "config.json"

    def __init__(self):
        super().__init__()
        for name in ("proj", "proj_in", "norm", "norm1", "wo", "word", "time.embed"):
            holder = nn.Module()
            holder.inner = nn.Linear(1, 1)
            holder.norm = nn.LayerNorm(1)
            self.add_module(name.replace(".", "_"), holder)
        self.proj_out = nn.Linear(1, 1)


def kept(model, patterns, leaves):
    """Names of the leaves that patterns keep: with a module, all below it."""

    def parents(fqn):
        parts = fqn.split(".")
        return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]

    return {
        fqn
        for fqn in leaves
        if any(re.search(pattern, parent) for pattern in patterns for parent in parents(fqn))
    }


def diffusers_kept(model, leaves):
    """The leaves that diffusers' own casting leaves alone, its defaults aside."""
    twin = copy.deepcopy(model)
    twin.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())
    modules = dict(twin.named_modules())
    return {fqn for fqn in leaves if "_diffusers_hook" not in vars(modules[fqn])}


def castable(model):
    from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS as SUPPORTED

    return {fqn for fqn, module in model.named_modules() if isinstance(module, SUPPORTED)}


PATTERNS = st.sampled_from(
    [
        "proj",
        "^proj$",
        "^proj_in$",
        "^proj_out$",
        "norm",
        "norm1",
        "wo",
        "embed",
        "inner",
        r"n.rm\d",
        "time_.*r$",
        "x",
    ]
)


@settings(deadline=None, max_examples=60)
@given(skipped=st.none() | st.lists(PATTERNS, max_size=3), kept32=st.none() | st.lists(PATTERNS, max_size=2))
def test_kept_dtypes_are_those_that_diffusers_keeps(hooks, skipped, kept32):
    model = Declaring()
    model._skip_layerwise_casting_patterns, model._keep_in_fp32_modules = skipped, kept32
    leaves = castable(model)
    assert kept(model, describe(hooks, model).keep_dtype_patterns, leaves) == diffusers_kept(model, leaves)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_kept_dtypes_of_real_diffusers_models(hooks, name):
    model = CASES[name].build()
    leaves = castable(model)
    assert kept(model, describe(hooks, model).keep_dtype_patterns, leaves) == diffusers_kept(model, leaves)


NAMES = st.sampled_from(
    ["wo", "wi", "layer", "shared", "block.*.wo", "q", "layer_norm", "wo.weight", "k.weight"]
)


@settings(deadline=None, max_examples=60)
@given(half=st.sets(NAMES, max_size=2), both=st.sets(NAMES, max_size=2))
@example(half={"wo.weight"}, both=set())
def test_kept_dtypes_are_those_that_transformers_keeps(hooks, half, both):
    model = CASES["t5"].build()
    for part in (model, model.encoder):  # each is a model of transformers and declares for itself
        part._keep_in_fp32_modules, part._keep_in_fp32_modules_strict = half, both
    plan = model._get_dtype_plan(torch.float16)
    searched = build_glob_alternation(list(plan))[0] if plan else re.compile("(?!)")
    expected = {fqn.rpartition(".")[0] for fqn, _ in model.named_parameters() if searched.search(fqn)}
    patterns = describe(hooks, model).keep_dtype_patterns
    holders = {fqn.rpartition(".")[0] for fqn, _ in model.named_parameters()}
    assert {fqn for fqn in holders if any(re.search(pattern, fqn) for pattern in patterns)} == expected


def test_kept_dtypes_of_a_loaded_t5(hooks, folders):
    loaded = transformers.T5EncoderModel.from_pretrained(folders["t5"][1], dtype=torch.float16)
    patterns = describe(hooks, loaded).keep_dtype_patterns
    for fqn, parameter in loaded.named_parameters():
        keeps = any(re.search(pattern, fqn) for pattern in patterns)
        assert parameter.dtype is (torch.float32 if keeps else torch.float16)
        assert keeps == fqn.endswith("wo.weight")


# Hooks of diffusers


def offload(model, folder, kind, **options):
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **options)


def any_timestep():
    return 1


DIFFUSERS_HOOKS = {
    "block_level": lambda model, folder: offload(model, folder, "block_level", num_blocks_per_group=1),
    "leaf_level": lambda model, folder: offload(model, folder, "leaf_level"),
    "first_block_cache": lambda model, folder: model.enable_cache(
        diffusers.FirstBlockCacheConfig(threshold=0.0)
    ),
    "pyramid_attention_broadcast": lambda model, folder: model.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=any_timestep
        )
    ),
    "faster_cache": lambda model, folder: model.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=any_timestep
        )
    ),
    "layer_skip": lambda model, folder: diffusers.hooks.apply_layer_skip(
        model, diffusers.hooks.LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    ),
}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", DIFFUSERS_HOOKS)
def test_remedies_for_hooks_of_diffusers_work(hooks, tmp_path, name, wrap):
    case = CASES["flux"]
    model = case.build()
    target = nn.ModuleDict({"inner": model}) if wrap else model
    assert find(hooks, target) == []
    DIFFUSERS_HOOKS[name](model, tmp_path)
    found = find(hooks, target)
    hooked = {fqn for fqn, module in target.named_modules() if "_diffusers_hook" in vars(module)}
    assert {mechanism.fqn for mechanism in found} == {
        fqn for fqn in hooked if target.get_submodule(fqn)._diffusers_hook.hooks
    }
    assert all("diffusers hook" in mechanism.what for mechanism in found)
    follow_all(hooks, target)
    assert not getattr(model, "is_cache_enabled", False)
    with torch.no_grad():
        assert outputs_equal(case.call(model), case.call(case.build()))


def test_casting_by_diffusers_means_loading_again(hooks):
    model = CASES["flux"].build()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    remedies = {mechanism.remedy for mechanism in find(hooks, model)}
    assert len(remedies) == 1
    assert "load the model again without enable_layerwise_casting()" in remedies.pop()


def test_offloading_to_disk_by_diffusers_means_loading_again(hooks, tmp_path):
    model = CASES["flux"].build()
    offload(model, tmp_path, "block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    remedies = {mechanism.remedy for mechanism in find(hooks, model)}
    assert len(remedies) == 1
    remedy = remedies.pop()
    assert "load the model again without enable_group_offload()" in remedy
    assert str(tmp_path) in remedy


def test_an_empty_registry_of_diffusers_is_nothing(hooks):
    model = CASES["flux"].build()
    with model.cache_context("cond"):
        assert "_diffusers_hook" in vars(model)
        assert find(hooks, model) == []


# Hooks of accelerate


class Doubling(accelerate.hooks.ModelHook):
    """A hook of accelerate that changes the output."""

    def post_forward(self, module, output):
        return output * 2


CPU = torch.device("cpu")
ACCELERATE_HOOKS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, CPU),
    "cpu_offload_with_hook": lambda model, folder: accelerate.cpu_offload_with_hook(model, CPU),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
    "sequential": lambda model, folder: accelerate.hooks.add_hook_to_module(
        model[1], accelerate.hooks.SequentialHook(Doubling(), Doubling())
    ),
}


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("name", ACCELERATE_HOOKS)
def test_remedies_for_hooks_of_accelerate_work(hooks, tmp_path, name):
    model, inputs = two_layers(), torch.ones(1, 3)
    expected = two_layers()(inputs)
    ACCELERATE_HOOKS[name](model, tmp_path)
    found = find(hooks, model)
    assert {mechanism.fqn for mechanism in found} == {
        fqn for fqn, module in model.named_modules() if hasattr(module, "_hf_hook")
    }
    follow(found[0].remedy, model)
    assert find(hooks, model) == []
    assert torch.equal(model(inputs), expected)


def test_hooks_in_a_sequence_are_named(hooks):
    model = two_layers()
    ACCELERATE_HOOKS["sequential"](model, None)
    assert [mechanism.what for mechanism in find(hooks, model)] == ["an accelerate hook (Doubling, Doubling)"]


def test_weights_that_accelerate_cannot_give_back_mean_loading_again(hooks, tmp_path):
    cast = two_layers()
    accelerate.big_modeling.attach_layerwise_casting_hooks(cast, torch.float8_e4m3fn, torch.float32)
    assert all("load the model again without casting" in found.remedy for found in find(hooks, cast))

    torch.save(two_layers().state_dict(), tmp_path / "weights.bin")
    with accelerate.init_empty_weights():
        empty = two_layers()
    model = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "weights.bin"), {"0": "cpu", "1": "disk"}, offload_folder=tmp_path / "offload"
    )
    remedies = {mechanism.fqn: mechanism.remedy for mechanism in find(hooks, model)}
    assert "load the model again without `device_map`" in remedies["1.0"]
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert model[1][0].weight.is_meta  # which is why


# Mechanisms of torch


def at(model, path, change):
    """Changes one module in a tree."""
    if not path:
        return change(model)
    model.set_submodule(path, change(model.get_submodule(path)))
    return model


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


TORCH_MECHANISMS = {
    "TorchScript": torch.jit.script,
    "torch.compile(model)": lambda module: torch.compile(module, backend="eager"),
    "module.compile()": compiled_in_place,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", ["", "1", "1.0"])
@pytest.mark.parametrize("name", TORCH_MECHANISMS)
def test_mechanisms_of_torch_are_found_where_they_are(hooks, name, path):
    model = at(two_layers(), path, TORCH_MECHANISMS[name])
    found = find(hooks, model)
    assert [mechanism.fqn for mechanism in found] == [path]
    assert name in found[0].what


@pytest.mark.parametrize("path", ["", "1"])
@pytest.mark.parametrize("name", ["torch.compile(model)", "DataParallel"])
def test_remedies_name_the_module_inside_a_wrapper(hooks, name, path):
    bare = two_layers()
    inside = bare.get_submodule(path)
    model = at(bare, path, TORCH_MECHANISMS[name])
    expression = re.search("apply to `(.*?)`", find(hooks, model)[0].remedy)[1]
    assert eval(expression, {"model": model}) is inside  # noqa: S307 - our own text


def test_the_remedy_for_compiling_in_place_works(hooks):
    model = compiled_in_place(two_layers())
    follow(find(hooks, model)[0].remedy, model)
    assert find(hooks, model) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_modules_are_found_once(hooks):
    traced = torch.jit.trace(two_layers(), torch.ones(1, 3))
    assert [mechanism.fqn for mechanism in find(hooks, nn.ModuleList([nn.ReLU(), traced]))] == ["1"]


REPARAMETRIZED = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "prune": lambda module: torch.nn.utils.prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("path", ["0", "1.0"])
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_weights_computed_before_the_call_are_found_and_the_remedy_works(hooks, name, path):
    model = at(two_layers(), path, REPARAMETRIZED[name]).eval()
    expected = model(torch.ones(1, 3))
    found = find(hooks, model)
    assert [mechanism.fqn for mechanism in found] == [path]
    follow(found[0].remedy, model)
    assert find(hooks, model) == []
    torch.testing.assert_close(model(torch.ones(1, 3)), expected)


def test_weights_computed_inside_the_call_are_fine(hooks):
    model = two_layers()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    torch.nn.utils.parametrizations.spectral_norm(model[1][0])
    assert find(hooks, model) == []


def test_the_remedy_for_a_lazy_module_works(hooks):
    model = nn.Sequential(nn.LazyLinear(2))
    assert [mechanism.fqn for mechanism in find(hooks, model)] == ["0"]
    model(torch.ones(1, 3))
    assert find(hooks, model) == []


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_sharded_and_replicated_modules_are_found(hooks, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = two_layers()
        fully_shard(sharded[1], mesh=mesh)
        assert [(found.fqn, "fully_shard()" in found.what) for found in find(hooks, sharded)] == [("1", True)]
        for wrapper in (nn.parallel.DistributedDataParallel, FullyShardedDataParallel):
            options = {"device_id": torch.device("cpu")} if wrapper is FullyShardedDataParallel else {}
            found = find(hooks, wrapper(two_layers(), **options))
            assert [mechanism.fqn for mechanism in found] == [""]
            assert wrapper.__name__ in found[0].what
    finally:
        torch.distributed.destroy_process_group()


# Building models


@contextlib.contextmanager
def parameters_on_meta():
    """Puts each new parameter on the meta device, and one that is registered twice only once."""
    made = {}

    def replace(module, name, parameter):
        if parameter is None or parameter.is_meta:
            return None
        # The real one is held too, so that no other parameter gets its id.
        return made.setdefault(
            id(parameter), (parameter, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
        )[1]

    handle = nn.modules.module.register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def shape_of(model):
    """Everything but values: names, shapes, dtypes, gradients, ties."""
    first = {}
    return {
        fqn: (tensor.shape, tensor.dtype, tensor.requires_grad, first.setdefault(id(tensor), fqn))
        for fqn, tensor in model.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("name", DIFFUSERS + TRANSFORMERS)
def test_a_model_built_on_meta_is_the_one_that_from_pretrained_makes(hooks, folders, name):
    model, folder = folders[name]
    random_state = torch.get_rng_state()
    with parameters_on_meta():
        built = build(hooks, type(model), folder)
    assert torch.equal(random_state, torch.get_rng_state())
    loaded = type(model).from_pretrained(folder)
    assert type(built) is type(loaded)
    assert all(parameter.is_meta for parameter in built.parameters())
    assert shape_of(built) == shape_of(loaded)
    buffers, expected = dict(built.named_buffers()), dict(loaded.named_buffers())
    assert buffers.keys() == expected.keys()
    for fqn, buffer in buffers.items():
        assert buffer.dtype == expected[fqn].dtype
        assert torch.equal(buffer, expected[fqn])
    assert not built.training
    if name in DIFFUSERS:
        assert dict(built.config) == dict(loaded.config) | {"_name_or_path": str(folder)}
    else:
        assert built.config.to_dict() == loaded.config.to_dict() | {"_name_or_path": str(folder)}
        assert built.config._attn_implementation == loaded.config._attn_implementation


@pytest.mark.parametrize("name", DIFFUSERS + TRANSFORMERS)
def test_a_built_model_computes_the_same_with_the_saved_weights(hooks, folders, name):
    model, folder = folders[name]
    with parameters_on_meta():
        built = build(hooks, type(model), folder)
    (file,) = folder.glob("*.safetensors")
    built.load_state_dict(load_file(file), strict=False, assign=True)
    if name in TRANSFORMERS:
        built.tie_weights()
    assert not any(parameter.is_meta for parameter in built.parameters())
    loaded = type(model).from_pretrained(folder)
    with torch.no_grad():
        for entry in CASES[name].entries:
            assert outputs_equal(CASES[name].call(built, entry), CASES[name].call(loaded, entry))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_transformers_models_are_built_in_the_checkpoints_dtype(hooks, tmp_path, name, dtype):
    model = CASES[name].build().to(dtype)
    model.save_pretrained(tmp_path)
    built = build(hooks, type(model), tmp_path)
    assert {parameter.dtype for parameter in built.parameters()} == {dtype}


def test_generation_settings_come_from_the_folder(hooks, folders, tmp_path):
    model = CASES["gpt2"].build()
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path)
    built = build(hooks, type(model), tmp_path)
    assert (
        built.generation_config.to_dict() == type(model).from_pretrained(tmp_path).generation_config.to_dict()
    )
    assert built.generation_config.max_new_tokens == 5


@settings(deadline=None, max_examples=10)
@given(layers=st.integers(1, 3))
@pytest.mark.parametrize(("name", "option"), [("flux", "num_single_layers"), ("bert", "num_hidden_layers")])
def test_overrides_win_over_the_config(hooks, folders, name, option, layers):
    model, folder = folders[name]
    built = build(hooks, type(model), folder, {option: layers})
    assert getattr(built.config, option) == layers
    assert len(built.single_transformer_blocks if name == "flux" else built.encoder.layer) == layers


@settings(deadline=None, max_examples=25)
@given(option=st.from_regex(r"[a-z]{1,6}_zz", fullmatch=True))
@pytest.mark.parametrize("name", ["flux", "bert"])
def test_an_unknown_option_is_refused_by_name(hooks, folders, name, option):
    model, folder = folders[name]
    with pytest.raises(PlanError, match=f"has no option '{option}'"):
        build(hooks, type(model), folder, {option: 1})


@pytest.mark.parametrize("name", ["flux", "bert"])
def test_a_folder_without_a_config_is_refused(hooks, tmp_path, name):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        build(hooks, type(CASES[name].build()), tmp_path)


@pytest.mark.parametrize("name", ["flux", "bert"])
def test_a_quantized_checkpoint_is_refused(hooks, folders, tmp_path, name):
    model, folder = folders[name]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds a quantized model"):
        build(hooks, type(model), tmp_path)


@settings(deadline=None, max_examples=20)
@given(inputs=st.integers(1, 9), outputs=st.integers(1, 9))
def test_a_plain_class_is_called_with_the_overrides(hooks, inputs, outputs):
    options = {"in_features": inputs, "out_features": outputs}
    built = build(hooks, nn.Linear, Path("none"), options)
    assert built.weight.shape == (outputs, inputs)


@pytest.mark.parametrize(
    "options", [{}, {"in_features": 1}, {"in_features": 1, "out_features": 1, "width": 2}]
)
def test_a_plain_class_that_cannot_be_called_is_refused(hooks, options):
    with pytest.raises(PlanError, match="Linear cannot be made with config_overrides"):
        build(hooks, nn.Linear, Path("none"), options)
