"""Small pipelines to test on: diffusers' real classes with tiny configurations; nothing is downloaded.

`real_pipelines()` has the functions that make a case of each, by name. Weights are seeded, tokenizers are
made on the spot, and a run of two steps takes a fraction of a second. diffusers and transformers are imported
when a pipeline is built, not before.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "PipelineCase",
    "real_pipelines",
    "stable_diffusion",
    "stable_diffusion_3",
    "stable_diffusion_controlnet",
    "stable_diffusion_image_to_image",
    "stable_diffusion_xl",
    "wan",
]

_LENGTH = 12
"""Tokens in a text."""
_WIDTH = 16
"""Channels of text encoders."""


@frozen
class PipelineCase:
    """A small pipeline that can be built again and again, each time the same, and run.

    Attributes:
        builder: Builds the pipeline; draws weights from torch's global random state.
        arguments: Makes the keyword arguments of a run, without generator and kind of output.
        seed: Seeds the weights.
    """

    builder: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    seed: int = 0

    def build(self) -> Any:
        """Return a fresh pipeline without a progress bar; torch's random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            pipeline = self.builder()
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(self, pipeline: Any, seed: int = 0, **options: Any) -> torch.Tensor:
        """Run the pipeline.

        Args:
            pipeline: The pipeline.
            seed: Seeds the noise, which is made on the CPU.
            **options: Further arguments, or others than the case's own.

        Returns:
            The pictures `(B, C, H, W)` or videos `(B, F, C, H, W)`, where the pipeline left them.
        """
        generator = torch.Generator().manual_seed(seed)
        options = {"output_type": "pt"} | self.arguments() | options
        outputs: torch.Tensor = pipeline(generator=generator, return_dict=False, **options)[0]
        return outputs


def real_pipelines() -> dict[str, Callable[[], PipelineCase]]:
    """Name to the function that makes the case."""
    makers = (
        stable_diffusion,
        stable_diffusion_xl,
        stable_diffusion_3,
        stable_diffusion_image_to_image,
        stable_diffusion_controlnet,
        wan,
    )
    return {maker.__name__: maker for maker in makers}


def stable_diffusion() -> PipelineCase:
    """Stable Diffusion, with the safety checker that its owners often leave out."""

    def builder() -> Any:
        from diffusers import StableDiffusionPipeline
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        return StableDiffusionPipeline(
            **_first_generation(),
            safety_checker=StableDiffusionSafetyChecker(_vision_config()),
            feature_extractor=_image_processor(),
        )

    return PipelineCase(builder, _prompt)


def stable_diffusion_image_to_image() -> PipelineCase:
    """Stable Diffusion that begins with a picture: the autoencoder runs first and last."""

    def builder() -> Any:
        from diffusers import StableDiffusionImg2ImgPipeline

        return StableDiffusionImg2ImgPipeline(**_first_generation(), **_unchecked())

    def arguments() -> dict[str, Any]:
        options = _prompt() | {"image": _picture(), "strength": 1.0}
        return {name: value for name, value in options.items() if name not in ("height", "width")}

    return PipelineCase(builder, arguments)


def stable_diffusion_controlnet() -> PipelineCase:
    """Stable Diffusion with a ControlNet, which takes turns with the UNet at each step."""

    def builder() -> Any:
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

        components = _first_generation()
        controlnet = ControlNetModel.from_unet(
            components["unet"], conditioning_embedding_out_channels=(4, 8), load_weights_from_unet=False
        )
        with torch.no_grad():  # zeros, as it begins its training with, would control nothing
            for parameter in controlnet.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return StableDiffusionControlNetPipeline(**components, controlnet=controlnet, **_unchecked())

    return PipelineCase(builder, lambda: _prompt() | {"image": _picture()})


def stable_diffusion_xl() -> PipelineCase:
    """Stable Diffusion XL: two text encoders, of which one has a projection."""

    def builder() -> Any:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=_autoencoder(),
            text_encoder=_clip_text(),
            text_encoder_2=_clip_text(projects=True),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_clip_tokenizer(),
            unet=_unet(
                cross_attention_dim=2 * _WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + _WIDTH,
            ),
            scheduler=_noise_scheduler(),
            add_watermarker=False,
        )

    return PipelineCase(builder, _prompt)


def stable_diffusion_3() -> PipelineCase:
    """Stable Diffusion 3: three text encoders, one of them T5, and a transformer."""

    def builder() -> Any:
        from diffusers import (
            FlowMatchEulerDiscreteScheduler,
            SD3Transformer2DModel,
            StableDiffusion3Pipeline,
        )

        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * _WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * _WIDTH,
            pos_embed_max_size=8,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_autoencoder(shift_factor=0.1),
            text_encoder=_clip_text(projects=True),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip_text(projects=True),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(2 * _WIDTH),
            tokenizer_3=_t5_tokenizer(),
        )

    return PipelineCase(builder, lambda: _prompt() | {"max_sequence_length": _LENGTH})


def wan() -> PipelineCase:
    """Wan: a video from a text, by a transformer and a causal autoencoder with a cache."""

    def builder() -> Any:
        from diffusers import (
            AutoencoderKLWan,
            UniPCMultistepScheduler,
            WanPipeline,
            WanTransformer3DModel,
        )
        from transformers import UMT5Config, UMT5EncoderModel

        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=_WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
        config = UMT5Config(vocab_size=64, d_model=_WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        return WanPipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=UMT5EncoderModel(config),
            vae=vae,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=transformer,
        )

    def arguments() -> dict[str, Any]:
        return _prompt() | {"num_frames": 5, "num_inference_steps": 3, "max_sequence_length": _LENGTH}

    return PipelineCase(builder, arguments)


# What they are made of


def _prompt() -> dict[str, Any]:
    return {
        "prompt": "a red cat",
        "negative_prompt": "a dog",
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
    }


def _picture() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _first_generation() -> dict[str, Any]:
    """The components that pipelines of Stable Diffusion 1 have in common."""
    return {
        "vae": _autoencoder(),
        "text_encoder": _clip_text(),
        "tokenizer": _clip_tokenizer(),
        "unet": _unet(cross_attention_dim=_WIDTH),
        "scheduler": _noise_scheduler(),
    }


def _unchecked() -> dict[str, Any]:
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _noise_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def _unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def _autoencoder(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        **options,
    )


def _clip_text(*, projects: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=_WIDTH,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=_LENGTH,
        projection_dim=_WIDTH,
        bos_token_id=52,
        eos_token_id=53,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def _vision_config() -> Any:
    from transformers import CLIPConfig

    vision = {
        "hidden_size": _WIDTH,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    return CLIPConfig(vision_config=vision, projection_dim=_WIDTH)


def _image_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    size = {"height": 16, "width": 16}
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def _clip_tokenizer() -> Any:
    """Knows lower case letters, each a token."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: at for at, word in enumerate(words)}, [], model_max_length=_LENGTH)


def _t5_tokenizer() -> Any:
    """Knows lower case letters, each a token."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    pieces += [(letter, -2.0) for letter in string.ascii_lowercase]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=_LENGTH)
