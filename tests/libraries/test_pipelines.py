"""Whole pipelines of diffusers under each technique: the bare pipeline's bits, on CPU and simulator."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref

import diffusers
import pytest
import torch
import transformers
from torch import nn

import hookcore
from hookcore import ConflictError, PlanError
from hookcore.testing import pipelines
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins import GroupOffload, LayerwiseCasting, ModelOffload, SequentialOffload, Slicing
from hookcore_plugins.diffusers_pipelines import hookcore_open_target
from hookcore_plugins.model_offload import offload

CASES = pipelines.real_pipelines()
TECHNIQUES = {
    "model": ModelOffload,
    "sequential": SequentialOffload,
    "groups": GroupOffload,
    "blocks": functools.partial(GroupOffload, offload_type="block_level", use_stream=False),
}
OFFLOADS = pytest.mark.parametrize("technique", ["model", "groups", "blocks"])
STREAMED = pytest.mark.parametrize("technique", ["model", "groups"])


@pytest.fixture(autouse=True, scope="module")
def _libraries():
    """Their progress bars and advice are not looked at, and their objects not each time garbage is."""
    for name in CASES:
        CASES[name]().build()
    gc.collect()
    gc.freeze()
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    yield
    gc.unfreeze()


@functools.cache
def expected(name, seed=0):
    """What the bare pipeline gives."""
    case = CASES[name]()
    return case.run(case.build(), seed)


def on_simulator():
    return torch.get_device_module("sim")


def allocated():
    gc.collect()  # pipelines are in cycles
    return on_simulator().memory_allocated()


def models_of(pipe):
    return {name: it for name, it in pipe.components.items() if isinstance(it, nn.Module)}


def weights_of(model):
    return sum(it.nbytes for it in (*model.parameters(), *model.buffers()))


def devices_of(pipe):
    return {it.device.type for model in models_of(pipe).values() for it in model.parameters()}


def snapshots(pipe):
    return {name: ModelSnapshot.take(model) for name, model in models_of(pipe).items()}


def changes(before, model):
    """What is not as it was; an autoencoder of Wan notes where its cache is when it runs."""
    return [it for it in before.differences(model) if not it.startswith(WANS_OWN)]


WANS_OWN = tuple(f"(root): '{name}'" for name in ("_conv_idx", "_feat_map", "_enc_conv_idx", "_enc_feat_map"))


def is_plain(pipe, kind):
    return type(pipe) is kind and {"maybe_free_model_hooks", "__reduce_ex__"}.isdisjoint(vars(pipe))


# The same pictures


@functools.cache
def memory_of(name):
    """Of the bare pipeline on the device: bytes of weights, and what a run takes besides."""
    case = CASES[name]()
    pipe = case.build().to("sim")
    before = allocated()
    on_simulator().reset_peak_memory_stats()
    case.run(pipe)
    return sum(map(weights_of, models_of(pipe).values())), on_simulator().max_memory_allocated() - before


PLACES = [(technique, "sim") for technique in TECHNIQUES] + [("model", "cpu"), ("groups", "cpu")]
SHARE = {"model": 1, "sequential": 0.25, "groups": 0.3, "blocks": 0.45}
"""Of the weights, which may be on the device at once; the tests' layers are as large as their blocks."""


@pytest.mark.parametrize(("technique", "device"), PLACES)
@pytest.mark.parametrize("name", CASES)
def test_runs_have_the_bits_of_the_bare_pipeline(sim, name, technique, device):
    case = CASES[name]()
    weights, beside = memory_of(name)
    pipe = case.build()
    case.run(pipe)  # in the first call, transformers installs hooks of its own
    before, kind = snapshots(pipe), type(pipe)
    start = allocated()
    applied = hookcore.apply(pipe, [TECHNIQUES[technique](device)])
    assert pipe.device.type == pipe._execution_device.type == device
    on_simulator().reset_peak_memory_stats()
    for seed in (0, 1):
        found = case.run(pipe, seed)
        assert found.device.type == device
        assert same_bits(found.cpu(), expected(name, seed))
        del found
    assert on_simulator().max_memory_allocated() - start < beside + SHARE[technique] * weights
    sim.check()
    applied.remove()
    assert pipe.device.type == "cpu"
    assert is_plain(pipe, kind)
    for component, model in models_of(pipe).items():
        assert not changes(before[component], model)
    assert not same_bits(expected(name, 0), expected(name, 1))


@pytest.mark.parametrize("name", CASES)
def test_the_largest_component_is_all_that_has_to_fit(sim, name):
    """On a device with no more memory, the bare pipeline does not fit."""
    _, beside = memory_of(name)
    start = allocated()
    case = CASES[name]()
    pipe, bare = case.build(), case.build()
    sizes = {
        model: sum(-(-it.nbytes // 64) * 64 for it in model.parameters())
        for model in models_of(pipe).values()
    }
    buffers = sum(it.nbytes for model in sizes for it in model.buffers())
    with sim.limited(memory=start + max(sizes.values()) + buffers + beside):
        with pytest.raises(torch.OutOfMemoryError):
            case.run(bare.to("sim"))
        del bare
        gc.collect()
        hookcore.apply(pipe, [ModelOffload("sim")])
        for _ in range(2):
            assert same_bits(case.run(pipe).cpu(), expected(name))


def copies_of_a_run(sim, case, pipe):
    with sim.traced() as trace:
        case.run(pipe, guidance_scale=1.0)  # one text, so that each text encoder runs once
    return [span.engine for span in trace.spans if span.engine.startswith("copy")]


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "wan"])
def test_components_are_copied_once_a_run_and_inputs_no_more_often_than_without(sim, name):
    case = CASES[name]()
    bare = copies_of_a_run(sim, case, case.build().to("sim"))
    pipe = case.build()
    hookcore.apply(pipe, [ModelOffload("sim")])
    for _ in range(2):
        found = copies_of_a_run(sim, case, pipe)
        assert sorted(found) == sorted([*bare, *["copy in"] * len(models_of(pipe))])


# When a run ends


def test_model_offload_goes_off_at_the_end_of_a_run(sim):
    case = pipelines.stable_diffusion()
    pipe = case.build()
    applied = hookcore.apply(pipe, [ModelOffload("sim", memory_budget="1MiB")])
    pipe.encode_prompt("a cat", pipe.device, 1, do_classifier_free_guidance=False)
    assert {it.device.type for it in pipe.text_encoder.parameters()} == {"sim"}
    case.run(pipe)
    assert devices_of(pipe) == {"cpu"}
    pipe.vae.decode(torch.zeros(1, 4, 8, 8))
    assert devices_of(pipe) == {"cpu", "sim"}
    applied.remove()
    assert "maybe_free_model_hooks" not in vars(pipe)


def test_the_order_of_a_pipeline_is_known_before_its_first_run(sim):
    case = pipelines.stable_diffusion_xl()
    pipe = case.build()
    applied = hookcore.apply(pipe, [ModelOffload("sim", memory_budget="1MiB")])
    with torch.no_grad():
        pipe.text_encoder_2(torch.zeros(1, 12, dtype=torch.int64))
        assert {it.device.type for it in pipe.text_encoder_2.parameters()} == {"sim"}
        with sim.traced() as trace:
            pipe.unet(
                torch.zeros(1, 4, 8, 8),
                torch.zeros(1),
                torch.zeros(1, 12, 32),
                added_cond_kwargs={"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)},
            )
    inputs_and_what_comes_next = 5 + 1
    assert [it.engine for it in trace.spans].count("copy in") == inputs_and_what_comes_next
    report = {entry.component: entry.counted for entry in applied.run_report().entries}
    assert [report[name].copies for name in ("text_encoder", "text_encoder_2", "unet", "vae")] == [0, 1, 1, 1]
    assert (report["unet"].hits, report["unet"].on_demand) == (1, 0)  # it was copied ahead


def test_a_run_inside_of_a_call_leaves_everything_on(sim):
    """As when a component's own hook runs another pipeline of the same components."""
    case = pipelines.stable_diffusion()
    pipe = case.build()
    there = []

    def run_another(decoder, _):
        pipe.maybe_free_model_hooks()
        there.append(next(decoder.parameters()).device.type)

    pipe.vae.decoder.register_forward_pre_hook(run_another)
    hookcore.apply(pipe, [ModelOffload("sim")])
    with torch.no_grad():
        pipe.vae(torch.zeros(1, 3, 16, 16))
    assert there == ["sim"]


def test_two_that_want_to_know_of_the_end_and_go_in_any_order(sim):
    case = pipelines.stable_diffusion()
    pipe = case.build()
    kind = type(pipe)
    first = hookcore.apply(pipe, {"vae": [ModelOffload("sim")]})
    second = hookcore.apply(
        pipe, [ModelOffload("sim")], components=["unet", "text_encoder", "safety_checker"]
    )
    assert same_bits(case.run(pipe).cpu(), expected("stable_diffusion"))
    assert devices_of(pipe) == {"cpu"}
    first.remove()
    pipe.vae.to("sim")
    case.run(pipe)
    there = {name for name, it in models_of(pipe).items() if next(it.parameters()).device.type == "sim"}
    assert there == {"vae"}
    second.remove()
    assert is_plain(pipe, kind)


@OFFLOADS
def test_a_callback_that_stops_a_run(sim, technique):
    """What it is given lies on the device; the next run is right, and `offload` frees what is still there."""
    case = pipelines.stable_diffusion()
    pipe = case.build()
    seen = []

    def stop(_pipe, step, _timestep, tensors):
        seen.append((step, tensors["latents"].device.type))
        raise KeyboardInterrupt

    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    with pytest.raises(KeyboardInterrupt):
        case.run(pipe, callback_on_step_end=stop)
    assert seen == [(0, "sim")]
    assert same_bits(case.run(pipe).cpu(), expected("stable_diffusion"))
    with pytest.raises(KeyboardInterrupt):
        case.run(pipe, callback_on_step_end=stop)
    offload(pipe)
    if technique == "model":
        assert devices_of(pipe) == {"cpu"}


# What people do with a pipeline


@OFFLOADS
def test_parts_of_a_run_that_users_call_themselves(sim, technique):
    """Device of `encode_prompt`, and autoencoders by `encode` and `decode` (huggingface/diffusers#11041)."""
    case = pipelines.stable_diffusion()
    pipe, bare = case.build(), case.build()
    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])

    def parts(pipe):
        with torch.no_grad():
            embeds, _ = pipe.encode_prompt("a cat", pipe.text_encoder.device, 1, False)
            latents = pipe.vae.encode(torch.ones(1, 3, 16, 16)).latent_dist.mode()
            return embeds, latents, pipe.vae.decode(latents).sample

    for found, wanted in zip(parts(pipe), parts(bare), strict=True):
        assert found.device.type == "sim"
        assert same_bits(found.cpu(), wanted)


@OFFLOADS
def test_moving(sim, technique):
    """To where it runs: there is nothing to do. Elsewhere: refused, also for others that begin with it."""
    case = pipelines.stable_diffusion()
    pipe = case.build()
    bare = case.build().unet
    applied = hookcore.apply(pipe, [TECHNIQUES[technique]("sim")], components=["unet", "text_encoder"])
    pipe.to("sim")  # what is not offloaded goes there
    pipe.unet.to(torch.device("sim:0"))
    assert {it.device.type for it in pipe.vae.parameters()} == {"sim"}
    assert {it.device.type for it in pipe.unet.parameters()} == {"cpu"}
    assert same_bits(case.run(pipe).cpu(), expected("stable_diffusion"))
    for move in (
        lambda: pipe.unet.to("cpu"),
        lambda: pipe.unet.to(torch.zeros(1)),
        lambda: pipe.unet.to(device="sim:1"),
        lambda: pipe.to("cpu"),
        lambda: pipe.enable_model_cpu_offload(device="sim"),
        lambda: pipe.enable_sequential_cpu_offload(device="sim"),
    ):
        with pytest.raises(
            ConflictError, match=r"cannot move .* it is offloaded, and runs on 'sim:0'.*remove"
        ):
            move()
    for model in (pipe.vae, pipe.safety_checker):
        model.to("sim")
    assert same_bits(case.run(pipe).cpu(), expected("stable_diffusion"))
    applied.remove()
    pipe.unet.to("sim").to("cpu")
    assert type(pipe.unet) is type(bare)


@OFFLOADS
def test_another_dtype(sim, technique):
    case = pipelines.stable_diffusion_xl()
    wanted = case.run(case.build().to(torch.bfloat16))
    pipe = case.build()
    applied = hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    case.run(pipe)
    pipe.to(torch.bfloat16)
    pipe.to("sim", torch.bfloat16)
    assert same_bits(case.run(pipe).cpu(), wanted)
    applied.remove()
    assert {it.dtype for it in pipe.unet.parameters()} == {torch.bfloat16}
    assert same_bits(case.run(pipe), wanted)


@OFFLOADS
def test_an_autoencoder_that_the_pipeline_decodes_with_in_float32(sim, technique):
    """Stable Diffusion XL converts its autoencoder before it decodes, and back after it."""
    case = pipelines.stable_diffusion_xl()
    pipe, bare = case.build(), case.build()
    for it in (pipe, bare):
        it.vae.to(torch.float16)
        assert it.vae.config.force_upcast
    wanted = case.run(bare)
    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    for _ in range(2):
        assert same_bits(case.run(pipe).cpu(), wanted)
        assert {it.dtype for it in pipe.vae.parameters()} == {torch.float16}


@STREAMED
def test_pipelines_of_the_same_components(sim, technique):
    """By `from_pipe`, or of their `components` (huggingface/diffusers#7448)."""
    text, picture = pipelines.stable_diffusion_xl(), pipelines.stable_diffusion_image_to_image()
    pipe, bare = text.build(), text.build()
    wanted = picture.run(diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(bare))
    applied = hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    made = [
        diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe),
        diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components),
    ]
    for other in made:
        assert other.unet is pipe.unet
        assert other._execution_device.type == "sim"
        assert same_bits(picture.run(other).cpu(), wanted)
    assert same_bits(text.run(pipe).cpu(), expected("stable_diffusion_xl"))
    assert hookcore.status(made[0]).techniques == hookcore.status(pipe).techniques
    hookcore.remove(made[0])
    assert repr(applied) == "<Applied: removed>"
    pipe.scheduler = bare.scheduler  # which keeps a table where it last ran
    assert same_bits(text.run(pipe), expected("stable_diffusion_xl"))


def test_a_cast_model_goes_into_pipelines_made_of_its_pipeline():
    """`from_pipe` leaves out what is not of the very class that it expects."""
    pipe = pipelines.stable_diffusion_xl().build()
    hookcore.apply(pipe, [LayerwiseCasting()])
    assert type(pipe.unet) is not diffusers.UNet2DConditionModel
    assert type(pipe.unet) in (diffusers.AutoencoderKL, diffusers.UNet2DConditionModel)
    assert type(pipe.unet) not in (diffusers.AutoencoderKL, diffusers.ControlNetModel)
    assert diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet


@STREAMED
def test_saving_and_loading(sim, technique, tmp_path):
    case = pipelines.stable_diffusion_xl()
    pipe, bare = case.build(), case.build()
    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    case.run(pipe)
    case.run(bare)  # tokenizers are saved with what they did last
    pipe.save_pretrained(tmp_path / "offloaded")
    bare.save_pretrained(tmp_path / "bare")
    files = [it.relative_to(tmp_path / "bare") for it in (tmp_path / "bare").rglob("*") if it.is_file()]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "offloaded" / file).read_bytes() == (tmp_path / "bare" / file).read_bytes()
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "offloaded")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is diffusers.StableDiffusionXLPipeline
    wanted = case.run(loaded)  # from mapped weights, which lie otherwise: the last bits differ
    torch.testing.assert_close(wanted, expected("stable_diffusion_xl"))
    hookcore.apply(loaded, [TECHNIQUES[technique]("sim")])
    torch.testing.assert_close(case.run(loaded).cpu(), wanted)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
@STREAMED
def test_copies_are_bare(sim, technique, way):
    case = pipelines.stable_diffusion()
    pipe = case.build()
    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    case.run(pipe)
    copied = way(pipe)
    assert is_plain(copied, type(pipe))
    assert type(copied.unet) is diffusers.UNet2DConditionModel
    assert hookcore.status(copied).techniques == ()
    assert same_bits(case.run(copied.to("sim")).cpu(), expected("stable_diffusion"))


@OFFLOADS
def test_another_model_in_the_place_of_a_component(sim, technique):
    case = pipelines.stable_diffusion()
    pipe, other = case.build(), case.build().unet
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    bare = case.build()
    bare.unet = copy.deepcopy(other)
    wanted = case.run(bare)
    old = pipe.unet
    before = ModelSnapshot.take(old)
    applied = hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    case.run(pipe)
    pipe.unet = other
    assert pipe.device.type == "sim"
    with pytest.warns(UserWarning, match=r"StableDiffusionPipeline\.unet is another module now"):
        pipe.encode_prompt("a red cat", "sim", 1, do_classifier_free_guidance=False)
    with warnings.catch_warnings(action="error"):  # once is enough
        pipe.encode_prompt("a red cat", "sim", 1, do_classifier_free_guidance=False)
    with pytest.raises(ConflictError, match="it has already been applied there"):
        hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    applied.remove()
    before.assert_restored(old)
    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    with warnings.catch_warnings(action="error"):
        assert same_bits(case.run(pipe).cpu(), wanted)


@OFFLOADS
def test_a_component_that_was_let_go_is_free_and_was_not_replaced(sim, technique):
    """As large text encoders are once they have run."""
    pipe = pipelines.stable_diffusion().build()
    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    embeds, _ = pipe.encode_prompt("a red cat", pipe.device, 1, do_classifier_free_guidance=False)
    encoder = weakref.ref(pipe.text_encoder)
    pipe.text_encoder = None
    kept, pipe.safety_checker = pipe.safety_checker, None
    gc.collect()
    assert encoder() is None
    assert hookcore.status(kept).techniques
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}
    with warnings.catch_warnings(action="error"):
        pipe(prompt_embeds=embeds, guidance_scale=1.0, **options)
    hookcore.remove(pipe)


def test_a_replaced_component_without_techniques_is_nobodys_business():
    pipe = pipelines.stable_diffusion().build()
    applied = hookcore.apply(pipe, {"text_encoder": [GroupOffload("cpu")], "vae": [GroupOffload("cpu")]})
    pipe.unet = copy.deepcopy(pipe.unet)
    hookcore.remove(pipe.vae)
    pipe.vae = copy.deepcopy(pipe.vae)
    with warnings.catch_warnings(action="error"):
        pipe.encode_prompt("a red cat", "cpu", 1, do_classifier_free_guidance=False)
    applied.remove()


@STREAMED
def test_applying_twice_is_refused_and_leaves_the_first(sim, technique):
    """huggingface/diffusers#2907"""
    case = pipelines.stable_diffusion()
    pipe = case.build()
    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    with pytest.raises(ConflictError):
        hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    assert same_bits(case.run(pipe).cpu(), expected("stable_diffusion"))


@STREAMED
def test_loras(sim, technique, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    case = pipelines.stable_diffusion()
    donor, pipe, bare = (case.build() for _ in range(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        donor.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        donor.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    layers = [
        convert_state_dict_to_diffusers(get_peft_model_state_dict(it))
        for it in (donor.unet, donor.text_encoder)
    ]
    type(donor).save_lora_weights(tmp_path, unet_lora_layers=layers[0], text_encoder_lora_layers=layers[1])
    hookcore.apply(pipe, [TECHNIQUES[technique]("sim")])
    case.run(pipe)
    pictures = []
    for step in (
        lambda it: it.load_lora_weights(tmp_path),
        lambda it: it.fuse_lora(),
        lambda it: it.unfuse_lora(),
        lambda it: it.unload_lora_weights(),
    ):
        step(pipe)
        step(bare)
        pictures.append(case.run(bare))
        assert same_bits(case.run(pipe).cpu(), pictures[-1])
    assert not same_bits(pictures[0], expected("stable_diffusion"))


def test_modular_pipelines(sim):
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    components = pipelines.stable_diffusion_xl().build().components
    pipe = StableDiffusionXLAutoBlocks().get_workflow("text2image").init_pipeline()
    with pytest.raises(PlanError, match=r"there is no component .* 'unet' is None"):
        hookcore.apply(pipe, [ModelOffload("sim")])
    pipe.update_components(**{name: components[name] for name in pipe.components if components.get(name)})
    pipe.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
        return pipe(prompt="a red cat", generator=generator, output="images", **options)

    wanted = run()
    for technique in TECHNIQUES.values():
        with hookcore.apply(pipe, [technique("sim")]):
            assert pipe._execution_device.type == "sim"
            assert same_bits(run().cpu(), wanted)
    assert pipe._execution_device.type == "cpu"


# What a pipeline's components are


def test_only_modules_are_components_and_each_once(sim):
    case = pipelines.stable_diffusion_xl()
    parts = case.build().components
    shared = {"text_encoder": parts["text_encoder_2"], "image_encoder": None, "feature_extractor": None}
    pipe = diffusers.StableDiffusionXLPipeline(**(parts | shared), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    opened = hookcore_open_target(pipe)
    assert set(opened.components) == {"text_encoder", "unet", "vae"}
    assert opened.sequence == ("text_encoder", "unet", "vae")
    assert opened.denoisers == ("unet",)
    assert opened.absent["text_encoder_2"] == "is the same module as 'text_encoder'"
    assert opened.absent["image_encoder"] == "is None"
    assert opened.absent["scheduler"] == "is a DDIMScheduler, not a torch.nn.Module"
    wanted = case.run(pipe)
    with pytest.raises(
        PlanError, match=r"no component named 'text_encoder_2'.*\('text_encoder_2' is the same"
    ):
        hookcore.apply(pipe, [ModelOffload("sim")], components=["text_encoder_2"])
    with pytest.raises(
        PlanError, match=r"techniques are given for 'scheduler'.*\('scheduler' is a DDIMSched"
    ):
        hookcore.apply(pipe, {"scheduler": [ModelOffload("sim")]})
    hookcore.apply(pipe, [ModelOffload("sim")])
    assert same_bits(case.run(pipe).cpu(), wanted)


@pytest.mark.parametrize(
    ("target", "known"),
    [
        (object(), False),
        (type("Engine", (), {"components": ["unet"]})(), False),
        (type("Engine", (), {"components": {"unet": nn.Identity(), "name": "x"}})(), True),
    ],
)
def test_what_has_components_by_name_is_a_pipeline(target, known):
    opened = hookcore_open_target(target)
    assert (opened is not None) == known
    if known:
        assert list(opened.components) == ["unet"]
        assert opened.absent == {"name": "is a str, not a torch.nn.Module"}
        assert (opened.sequence, opened.denoisers, opened.run_end) == ((), (), None)


@pytest.mark.parametrize(
    ("name", "denoises"),
    [
        ("UNet2DConditionModel", True),
        ("FluxTransformer2DModel", True),
        ("WanTransformer3DModel", True),
        ("ZImageTransformer2DModel", True),
        ("StableCascadeUNet", True),
        ("PriorTransformer", True),
        ("HiDreamImageTransformer2DModel", True),
        ("ControlNetModel", True),
        ("FluxControlNetModel", True),
        ("UniDiffuserModel", True),
        ("AutoencoderKL", False),
        ("AutoencoderKLLTXVideo", False),  # its decoder is told a noise level
        ("ConsistencyDecoderVAE", False),
        ("T2IAdapter", False),
        ("MotionAdapter", False),
    ],
)
def test_denoisers_are_told_the_noise_level(name, denoises):
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip("not in this diffusers")
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    opened = hookcore_open_target(type("Engine", (), {"components": {"it": model}})())
    assert opened.denoisers == (("it",) if denoises else ())


def test_a_component_that_is_a_trace_of_torch_is_in_nobodys_way():
    """Its class has no forward to look at."""
    pipe = pipelines.stable_diffusion().build()
    trace = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    pipe.register_modules(safety_checker=trace)
    applied = hookcore.apply(pipe, [Slicing()])
    assert hookcore_open_target(pipe).components["safety_checker"] is trace
    assert "safety_checker" in str(applied).rpartition("skipped by slicing")[2]
    applied.remove()


# Casting is for denoisers


CASTING = LayerwiseCasting("bfloat16", keep_originals=True)


def test_casting_a_pipeline_casts_its_denoisers():
    pipe = pipelines.stable_diffusion_controlnet().build()
    line = (
        "skipped by layerwise_casting: vae, text_encoder: casting is for 'unet' and 'controlnet' unless "
        "others are named"
    )
    plan = hookcore.plan(pipe, [CASTING])
    assert str(plan).splitlines()[-1] == line
    assert [step.component.name for step in plan.steps] == ["unet", "controlnet"]
    applied = hookcore.apply(pipe, [CASTING])
    assert repr(applied).splitlines()[-1] == line
    assert torch.bfloat16 not in {it.dtype for it in pipe.vae.parameters()}
    for model in (pipe.unet, pipe.controlnet):
        assert torch.bfloat16 in {it.dtype for it in model.parameters()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([CASTING], {"components": ["vae", "unet"]}), {"vae", "unet"}),
        (({"text_encoder": [CASTING], "unet": [CASTING]}, {}), {"text_encoder", "unet"}),
    ],
)
def test_what_is_named_is_cast(arguments, named):
    pipe = pipelines.stable_diffusion_image_to_image().build()
    techniques, options = arguments
    applied = hookcore.apply(pipe, techniques, **options)
    assert "skipped by layerwise_casting: vae:" not in repr(applied)
    cast = {
        name for name, it in models_of(pipe).items() if torch.bfloat16 in {p.dtype for p in it.parameters()}
    }
    assert cast == named


def test_what_was_left_alone_stays_so_when_it_changes(sim):
    """Casting binds anew what has changed; an autoencoder that nobody named must not come in that way."""
    pipe = pipelines.stable_diffusion_image_to_image().build()
    hookcore.apply(pipe, [CASTING, SequentialOffload("sim")])
    pipe.vae.decoder.conv_out = nn.Conv2d(4, 3, 3, padding=1)
    with torch.no_grad():
        pipe.vae.decode(torch.zeros(1, 4, 8, 8))
    assert {it.dtype for it in pipe.vae.parameters()} == {torch.float32}


@STREAMED
def test_casting_and_offloading_a_pipeline(sim, technique):
    case = pipelines.stable_diffusion()
    pipe, cast = case.build(), case.build()
    hookcore.apply(cast, [CASTING])
    before = snapshots(pipe)
    applied = hookcore.apply(pipe, [TECHNIQUES[technique]("sim"), CASTING])
    assert same_bits(case.run(pipe).cpu(), case.run(cast))
    applied.remove()
    for component, model in models_of(pipe).items():
        assert not changes(before[component], model)


def test_different_techniques_for_different_components(sim):
    case = pipelines.stable_diffusion_3()
    pipe = case.build()
    hookcore.apply(
        pipe,
        {
            "transformer": [GroupOffload("sim")],
            "text_encoder_3": [SequentialOffload("sim")],
            "text_encoder": [ModelOffload("sim")],
            "text_encoder_2": [ModelOffload("sim")],
        },
    )
    pipe.to("sim")
    assert same_bits(case.run(pipe).cpu(), expected("stable_diffusion_3"))
    assert {it.device.type for it in pipe.vae.parameters()} == {"sim"}
    hookcore.remove(pipe)
    assert hookcore.status(pipe).attachments == ()
