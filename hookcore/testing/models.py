"""Small models to test on: real architectures with tiny configurations, and strategies for random ones.

`real_models()` has the functions that make a case of each real one, by name. All are in eval mode, have
seeded weights, hold fewer than a million parameters and take milliseconds a call. Those of diffusers and
transformers import these libraries when they are called, not before.

`module_trees()` draws random ones; what it draws from is in `hookcore.testing.modules`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import nn

from hookcore.testing.cases import ModelCase
from hookcore.testing.modules import module_trees

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookcore.testing.cases import Arguments

__all__ = [
    "ModelCase",
    "RealModel",
    "autoencoder",
    "bert",
    "clip_text",
    "cnn",
    "flux",
    "gpt2",
    "module_trees",
    "real_models",
    "sd3",
    "t5",
    "unet",
]


@frozen
class RealModel:
    """The blueprint of a real model.

    Attributes:
        builder: Builds the model.
        arguments: `(entry, generator)` to the keyword arguments of one call.
        entries: The methods that can be called.
    """

    builder: Callable[[], nn.Module]
    arguments: Callable[[str, torch.Generator], dict[str, Any]]
    entries: tuple[str, ...] = ("forward",)

    def make(self) -> nn.Module:
        """Build the model, in eval mode."""
        return self.builder().eval()

    def make_inputs(self, entry: str, generator: torch.Generator) -> Arguments:
        """Make the keyword arguments of one call."""
        return (), self.arguments(entry, generator)


def real_models() -> dict[str, Callable[[], ModelCase]]:
    """Name to the function that makes the case; functions, since each imports its own library."""
    makers = (flux, sd3, unet, autoencoder, bert, t5, clip_text, gpt2, cnn)
    return {maker.__name__: maker for maker in makers}


def flux() -> ModelCase:
    """Flux: 2 double and 3 single blocks, rotary embeddings, guidance."""
    from diffusers import FluxTransformer2DModel

    def builder() -> Any:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )

    def arguments(_entry: str, generator: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, 4, generator=generator),
            "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator),
            "pooled_projections": torch.randn(1, 32, generator=generator),
            "timestep": torch.rand(1, generator=generator),
            "guidance": torch.rand(1, generator=generator),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "txt_ids": torch.zeros(6, 3),
            "return_dict": False,
        }

    return ModelCase(RealModel(builder, arguments))


def sd3() -> ModelCase:
    """Stable Diffusion 3: joint attention, a position table as a buffer."""
    from diffusers import SD3Transformer2DModel

    def builder() -> Any:
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        )

    def arguments(_entry: str, generator: torch.Generator) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
            "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator),
            "pooled_projections": torch.randn(1, 32, generator=generator),
            "timestep": torch.randint(1000, (1,), generator=generator),
            "return_dict": False,
        }

    return ModelCase(RealModel(builder, arguments))


def unet() -> ModelCase:
    """A UNet with cross attention: unequal blocks, skip connections."""
    from diffusers import UNet2DConditionModel

    def builder() -> Any:
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )

    def arguments(_entry: str, generator: torch.Generator) -> dict[str, Any]:
        return {
            "sample": torch.randn(1, 4, 8, 8, generator=generator),
            "timestep": torch.randint(1000, (), generator=generator),
            "encoder_hidden_states": torch.randn(1, 6, 16, generator=generator),
            "return_dict": False,
        }

    return ModelCase(RealModel(builder, arguments))


def autoencoder() -> ModelCase:
    """A variational autoencoder, called through `encode` and `decode` as pipelines do."""
    from diffusers import AutoencoderKL

    def builder() -> Any:
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )

    def arguments(entry: str, generator: torch.Generator) -> dict[str, Any]:
        image = torch.randn(2, 3, 32, 32, generator=generator)
        latents = torch.randn(2, 4, 16, 16, generator=generator)
        value = {"forward": {"sample": image}, "encode": {"x": image}, "decode": {"z": latents}}[entry]
        return value | {"return_dict": False}

    return ModelCase(RealModel(builder, arguments, entries=("forward", "encode", "decode")))


VOCABULARY = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
TEXT = VOCABULARY | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def tokens(_entry: str, generator: torch.Generator) -> dict[str, Any]:
    """Two texts of 7 tokens, the second with 2 of padding."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    ids = torch.randint(3, 99, (2, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "return_dict": False}


def bert() -> ModelCase:
    """BERT: integer buffers that are in no state dict."""
    from transformers import BertConfig, BertModel

    def builder() -> Any:
        return BertModel(BertConfig(**TEXT, num_hidden_layers=2))

    return ModelCase(RealModel(builder, tokens))


def t5() -> ModelCase:
    """T5's encoder: tied embeddings, modules that must stay in float32."""
    from transformers import T5Config, T5EncoderModel

    def builder() -> Any:
        return T5EncoderModel(
            T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, use_cache=False)
        )

    return ModelCase(RealModel(builder, tokens))


def clip_text() -> ModelCase:
    """CLIP's text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    def builder() -> Any:
        return CLIPTextModel(CLIPTextConfig(**TEXT, num_hidden_layers=2, max_position_embeddings=16))

    return ModelCase(RealModel(builder, tokens))


def gpt2() -> ModelCase:
    """GPT-2: the head's weight is the embedding's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def builder() -> Any:
        return GPT2LMHeadModel(
            GPT2Config(**VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=16, use_cache=False)
        )

    return ModelCase(RealModel(builder, tokens))


def cnn() -> ModelCase:
    """A plain image classifier with BatchNorm."""

    def builder() -> Any:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )

    def arguments(_entry: str, generator: torch.Generator) -> dict[str, Any]:
        return {"input": torch.randn(2, 3, 16, 16, generator=generator)}

    return ModelCase(RealModel(builder, arguments))
