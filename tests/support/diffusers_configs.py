"""A tiny configuration and inputs for each class of diffusers' models, or why there is none.

Weights are drawn by the classes themselves from a seed. Batches have two rows, which slicing splits.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from attrs import frozen
from autoencoders import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable

CROSS_2D = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CROSS_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
UNET = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "cross_attention_dim": 8}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


@frozen
class SweepCase:
    """A model of a class and a call of it.

    Attributes:
        name: Name of the class.
        config: What it is made with.
        inputs: Makes what it is called with.
        own: Makes the model, where that is not the class with the configuration.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    own: Callable[[], torch.nn.Module] | None = None

    def make(self) -> torch.nn.Module:
        """Makes the model: weights are drawn, and rounded to what casting to bfloat16 keeps."""
        torch.manual_seed(0)
        model = (self.own or partial(getattr(diffusers, self.name), **self.config))().eval()
        with torch.no_grad():
            for tensor in model.parameters():
                if not tensor.any():  # a gate that begins closed would hide what is behind it
                    tensor.normal_(std=0.02)
                tensor.copy_(tensor.bfloat16())
        return model

    def arguments(self) -> dict[str, Any]:
        """Makes the inputs, the same each time."""
        torch.manual_seed(1)
        return self.inputs()


def r(*shape: int) -> torch.Tensor:
    """Draws floating-point numbers."""
    return torch.randn(shape)


def i(stop: int, *shape: int) -> torch.Tensor:
    """Draws integers."""
    return torch.randint(stop, shape)


def ones(*shape: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """A mask that masks nothing."""
    return torch.ones(shape, dtype=dtype)


def steps() -> torch.Tensor:
    """Two steps of denoising."""
    return torch.tensor([3.0, 7.0])


def video(channels: int = 4, size: int = 8, text: int = 16) -> dict[str, Any]:
    """Latents of a video, a step and text."""
    return {
        "hidden_states": r(2, channels, 2, size, size),
        "timestep": steps(),
        "encoder_hidden_states": r(2, 5, text),
    }


def image(channels: int = 4, size: int = 8, text: int = 16) -> dict[str, Any]:
    """Latents of an image, a step and text."""
    return {
        "hidden_states": r(2, channels, size, size),
        "timestep": steps(),
        "encoder_hidden_states": r(2, 5, text),
    }


def tokens(channels: int = 4, text: int = 16, ids: int = 3) -> dict[str, Any]:
    """Latents of an image as tokens with positions, a step and text."""
    return {
        "hidden_states": r(2, 16, channels),
        "timestep": steps() / 10,
        "encoder_hidden_states": r(2, 5, text),
        "img_ids": i(4, 16, ids).float(),
        "txt_ids": torch.zeros(5, ids),
    }


def sample(channels: int = 4, size: int = 16, text: int = 8) -> dict[str, Any]:
    """The same for a UNet."""
    return {
        "sample": r(2, channels, size, size),
        "timestep": steps(),
        "encoder_hidden_states": r(2, 5, text),
    }


_TABLE: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    # UNets
    "UNet1DModel": (
        {
            "block_out_channels": (8, 8, 16),
            "in_channels": 4,
            "out_channels": 4,
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1.0,
            "out_block_type": "OutConv1DBlock",
            "mid_block_type": "MidResTemporalBlock1D",
            "down_block_types": ("DownResnetBlock1D",) * 3,
            "up_block_types": ("UpResnetBlock1D",) * 2,
            "act_fn": "swish",
        },
        lambda: {"sample": r(2, 4, 16), "timestep": steps()},
    ),
    "UNet2DModel": (
        {
            "block_out_channels": (4, 8),
            "norm_num_groups": 2,
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda: {"sample": r(2, 3, 16, 16), "timestep": steps()},
    ),
    "UNet2DConditionModel": ({**UNET, **CROSS_2D, "attention_head_dim": 2}, sample),
    "UNet3DConditionModel": (
        {**UNET, **CROSS_3D, "attention_head_dim": 2},
        lambda: {**sample(), "sample": r(2, 4, 2, 8, 8)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "num_attention_heads": (2, 4),
            "in_channels": 4,
            "out_channels": 4,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        lambda: {
            "sample": r(2, 2, 4, 8, 8),
            "timestep": torch.tensor(3.0),
            "encoder_hidden_states": r(2, 1, 8),
            "added_time_ids": r(2, 3),
        },
    ),
    "Kandinsky3UNet": (
        {
            "in_channels": 4,
            "time_embedding_dim": 4,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 3,
            "block_out_channels": (32, 64),
            "cross_attention_dim": 4,
            "encoder_hid_dim": 8,
        },
        lambda: {**sample(), "encoder_attention_mask": ones(2, 5)},
    ),
    "ControlNetModel": (
        {
            **UNET,
            "attention_head_dim": 2,
            "down_block_types": CROSS_2D["down_block_types"],
            "conditioning_embedding_out_channels": (4, 8),
        },
        lambda: {**sample(), "controlnet_cond": r(2, 3, 32, 32)},
    ),
    "T2IAdapter": (
        {"in_channels": 3, "channels": [8, 8], "num_res_blocks": 1, "downscale_factor": 8},
        lambda: {"x": r(2, 3, 32, 32)},
    ),
    # Transformers of images
    "FluxTransformer2DModel": (
        {**FLUX, "pooled_projection_dim": 8},
        lambda: {**tokens(), "pooled_projections": r(2, 8)},
    ),
    "FluxControlNetModel": (
        {**FLUX, "pooled_projection_dim": 8},
        lambda: {**tokens(), "pooled_projections": r(2, 8), "controlnet_cond": r(2, 16, 4)},
    ),
    "ChromaTransformer2DModel": (
        {
            **FLUX,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        tokens,
    ),
    "Flux2Transformer2DModel": (
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: {**tokens(ids=4), "guidance": torch.ones(2)},
    ),
    "BriaTransformer2DModel": (
        {**FLUX, "pooled_projection_dim": None, "axes_dims_rope": (0, 8, 8)},
        tokens,
    ),
    "BriaFiboTransformer2DModel": (
        {
            **FLUX,
            "text_encoder_dim": 8,
            "axes_dims_rope": (0, 8, 8),
        },
        lambda: {**tokens(), "text_encoder_layers": [r(2, 5, 8), r(2, 5, 8)]},
    ),
    "OvisImageTransformer2DModel": (FLUX, tokens),
    "LongCatImageTransformer2DModel": (
        {**FLUX, "pooled_projection_dim": 8},
        tokens,
    ),
    "SD3Transformer2DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "out_channels": 4,
        },
        lambda: {**image(), "pooled_projections": r(2, 8)},
    ),
    "SD3ControlNetModel": (
        {
            **HEADS,
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "out_channels": 4,
        },
        lambda: {**image(), "pooled_projections": r(2, 8), "controlnet_cond": r(2, 4, 8, 8)},
    ),
    "AuraFlowTransformer2DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pos_embed_max_size": 16,
        },
        image,
    ),
    "PixArtTransformer2DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "num_layers": 1,
            "caption_channels": 16,
            "cross_attention_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
        },
        lambda: {**image(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "DiTTransformer2DModel": (
        {**HEADS, "sample_size": 8, "num_layers": 1, "in_channels": 4, "num_embeds_ada_norm": 8},
        lambda: {
            "hidden_states": r(2, 4, 8, 8),
            "timestep": torch.tensor([3, 7]),
            "class_labels": i(8, 2),
        },
    ),
    "HunyuanDiT2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "sample_size": 8,
            "patch_size": 2,
            "hidden_size": 16,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 8,
            "text_len": 5,
            "text_len_t5": 5,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: {
            **image(text=8),
            "text_embedding_mask": ones(2, 5, dtype=torch.float32),
            "encoder_hidden_states_t5": r(2, 5, 8),
            "text_embedding_mask_t5": ones(2, 5, dtype=torch.float32),
            "image_rotary_emb": (r(16, 8), r(16, 8)),
        },
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 1,
            "out_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        lambda: {
            **image(),
            "original_size": torch.full((2, 2), 8.0),
            "target_size": torch.full((2, 2), 8.0),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    "CogView4Transformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 1,
            "out_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "sample_size": 8,
        },
        lambda: {
            **image(),
            "original_size": torch.full((2, 2), 8.0),
            "target_size": torch.full((2, 2), 8.0),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    "SanaTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
        },
        image,
    ),
    "SanaControlNetModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
        },
        lambda: {**image(), "controlnet_cond": r(2, 4, 8, 8)},
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 16,
        },
        lambda: {**image(), "encoder_attention_mask": ones(2, 5)},
    ),
    "QwenImageTransformer2DModel": (
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": r(2, 16, 16),
            "encoder_hidden_states": r(2, 5, 16),
            "encoder_hidden_states_mask": ones(2, 5, dtype=torch.int64),
            "timestep": steps() / 10,
            "img_shapes": [(1, 4, 4)] * 2,
        },
    ),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "context_in_dim": 16,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        image,
    ),
    "Transformer2DModel": (
        {**HEADS, "in_channels": 16, "norm_num_groups": 4, "cross_attention_dim": 16},
        lambda: {"hidden_states": r(2, 16, 8, 8), "encoder_hidden_states": r(2, 5, 16)},
    ),
    "TransformerTemporalModel": (
        {**HEADS, "in_channels": 16, "norm_num_groups": 4},
        lambda: {"hidden_states": r(4, 16, 8, 8), "num_frames": 2},
    ),
    "PriorTransformer": (
        {**HEADS, "num_layers": 1, "embedding_dim": 8, "num_embeddings": 5, "additional_embeddings": 4},
        lambda: {
            "hidden_states": r(2, 8),
            "timestep": steps(),
            "proj_embedding": r(2, 8),
            "encoder_hidden_states": r(2, 5, 8),
            "attention_mask": ones(2, 5),
        },
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        lambda: {**image(), "encoder_attention_mask": ones(2, 5)},
    ),
    # Transformers of videos
    "WanTransformer3DModel": (WAN, video),
    "ChronoEditTransformer3DModel": (WAN, video),
    "SkyReelsV2Transformer3DModel": (WAN, video),
    "WanVACETransformer3DModel": (
        {**WAN, "vace_layers": [0], "vace_in_channels": 8},
        lambda: {**video(), "control_hidden_states": r(2, 8, 2, 8, 8)},
    ),
    "CogVideoXTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 16,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 5,
        },
        lambda: {**video(), "hidden_states": r(2, 2, 4, 8, 8)},
    ),
    "LatteTransformer3DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "caption_channels": 16,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 10,
            "video_length": 2,
        },
        lambda: {**video(), "timestep": torch.tensor([3, 7])},
    ),
    "LTXVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": r(2, 32, 4),
            "timestep": steps(),
            "encoder_hidden_states": r(2, 5, 16),
            "encoder_attention_mask": ones(2, 5),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "MochiTransformer3DModel": (
        {
            **HEADS,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 5,
        },
        lambda: {**video(), "encoder_attention_mask": ones(2, 5)},
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "guidance_embeds": False,
            "rope_axes_dim": (2, 2, 4),
        },
        lambda: {**video(size=4), "encoder_attention_mask": ones(2, 5), "pooled_projections": r(2, 8)},
    ),
    "EasyAnimateTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 4,
            "text_embed_dim": 16,
            "text_embed_dim_t5": None,
            "num_layers": 1,
            "mmdit_layers": 1,
            "patch_size": 2,
        },
        video,
    ),
    "SanaVideoTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        video,
    ),
    # Others
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 2,
        },
        lambda: {
            "hidden_states": r(2, 16, 4),
            "timestep": steps() / 10,
            "timestep_r": steps() / 20,
            "encoder_hidden_states": r(2, 3, 16),
            "context_latents": r(2, 16, 8),
        },
    ),
    "ReduxImageEncoder": ({"redux_dim": 8, "txt_in_features": 8}, lambda: {"x": r(2, 5, 8)}),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        lambda: {"sample": r(2, 3, 32, 32)},
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 2],
            "channel_multiples": [1, 2],
            "decoder_channels": 8,
            "decoder_input_channels": 4,
            "audio_channels": 2,
        },
        lambda: {"sample": r(2, 2, 32)},
    ),
    "AnyFlowTransformer3DModel": (
        {key: value for key, value in WAN.items() if key != "qk_norm"},
        lambda: {
            "hidden_states": r(2, 2, 4, 8, 8),
            "timestep": r(2, 2),
            "r_timestep": r(2, 2),
            "encoder_hidden_states": r(2, 5, 16),
        },
    ),
    "AutoencoderKLQwenImage": (
        {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        lambda: {"sample": r(2, 3, 1, 32, 32)},
    ),
    "AutoencoderKLFlux2": (
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
        },
        lambda: {"sample": r(2, 3, 32, 32)},
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
        },
        lambda: {"sample": r(2, 3, 32, 32)},
    ),
    "AutoencoderKLHunyuanVideo15": (
        {
            "latent_channels": 16,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "temporal_compression_ratio": 2,
        },
        lambda: {"sample": r(1, 3, 5, 16, 16)},
    ),
    "AutoencoderKLHunyuanImageRefiner": (
        {
            "latent_channels": 16,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "temporal_compression_ratio": 2,
        },
        lambda: {"sample": r(2, 3, 5, 16, 16)},
    ),
    "AutoencoderKLKVAE": (
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)},
        lambda: {"sample": r(2, 3, 32, 32)},
    ),
    "CLIPImageProjection": ({"hidden_size": 8}, lambda: {"x": r(2, 8)}),
    "Flux3Transformer2DModel": (
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: tokens(ids=4),
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 16,
            "ff_dim": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 2, 2),
        },
        lambda: {
            "hidden_states": r(1, 2, 8, 8, 4),
            "encoder_hidden_states": r(1, 5, 16),
            "timestep": torch.tensor([3.0]),
            "pooled_projections": r(1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {
            "in_channels": 4,
            "condition_dim": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 16,
            "rotary_dim": 4,
            "fourier_embedding_dim": 16,
        },
        lambda: {"hidden_states": r(2, 4, 6), "timestep": steps() / 10, "encoder_hidden_states": r(2, 6, 16)},
    ),
    "MotifVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (2, 2, 4),
        },
        lambda: {**video(), "encoder_attention_mask": ones(2, 5)},
    ),
    "QwenImageControlNetModel": (
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": r(2, 16, 16),
            "controlnet_cond": r(2, 16, 16),
            "encoder_hidden_states": r(2, 5, 16),
            "encoder_hidden_states_mask": ones(2, 5, dtype=torch.int64),
            "timestep": steps() / 10,
            "img_shapes": [(1, 4, 4)] * 2,
        },
    ),
    "StableAudio3DurationEmbedder": ({"output_dim": 8, "fourier_dim": 8}, lambda: {"seconds": steps()}),
    "StableAudioProjectionModel": (
        {"text_encoder_dim": 8, "conditioning_dim": 4, "min_value": 0, "max_value": 10},
        lambda: {"text_hidden_states": r(2, 5, 8), "start_seconds": steps(), "end_seconds": steps()},
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 4,
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 4,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 4,
        },
        lambda: {
            "hidden_states": r(2, 4, 6),
            "timestep": steps(),
            "encoder_hidden_states": r(2, 5, 4),
            "global_hidden_states": r(2, 1, 8),
            "rotary_embedding": (r(7, 4), r(7, 4)),
        },
    ),
    "AudioLDM2ProjectionModel": (
        {"text_encoder_dim": 8, "text_encoder_1_dim": 6, "langauge_model_dim": 8},
        lambda: {
            "hidden_states": r(2, 5, 8),
            "hidden_states_1": r(2, 4, 6),
            "attention_mask": ones(2, 5, dtype=torch.int64),
            "attention_mask_1": ones(2, 4, dtype=torch.int64),
        },
    ),
    "AudioLDM2UNet2DConditionModel": (
        {**UNET, **CROSS_2D, "block_out_channels": (8, 16), "attention_head_dim": 4, "norm_num_groups": 4},
        sample,
    ),
    "GlmImageTransformer2DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 16,
        },
        lambda: {
            **image(),
            "prior_token_id": i(16, 2, 16),
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
            "target_size": torch.full((2, 2), 8.0),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 1,
            "rope_dim_list": [4, 2, 2],
        },
        video,
    ),
    "Ideogram4PromptEnhancerHead": (
        {"hidden_size": 8, "vocab_size": 16},
        lambda: {"hidden_states": r(2, 5, 8)},
    ),
    "AceStepAudioTokenDetokenizer": (
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "audio_acoustic_hidden_dim": 4,
            "num_attention_pooler_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": 2,
        },
        lambda: {"hidden_states": r(2, 3, 16)},
    ),
    "AnimaTextConditioner": (
        {
            "source_dim": 16,
            "target_dim": 16,
            "model_dim": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "target_vocab_size": 16,
            "min_sequence_length": 4,
        },
        lambda: {"source_hidden_states": r(2, 5, 16), "target_input_ids": i(16, 2, 4)},
    ),
    "UVit2DModel": (
        {
            "hidden_size": 16,
            "cond_embed_dim": 8,
            "micro_cond_encode_dim": 2,
            "micro_cond_embed_dim": 10,
            "encoder_hidden_size": 8,
            "vocab_size": 32,
            "codebook_size": 32,
            "in_channels": 8,
            "block_out_channels": 8,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "sample_size": 4,
        },
        lambda: {
            "input_ids": i(32, 2, 4, 4),
            "encoder_hidden_states": r(2, 5, 8),
            "pooled_text_emb": r(2, 8),
            "micro_conds": r(2, 5),
        },
    ),
    "T5FilmDecoder": (
        {
            "input_dims": 8,
            "targets_length": 6,
            "d_model": 16,
            "num_layers": 1,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 16,
        },
        lambda: {
            "encodings_and_masks": [(r(2, 5, 16), ones(2, 5, dtype=torch.float32))],
            "decoder_input_tokens": r(2, 6, 8),
            "decoder_noise_time": torch.tensor([0.2, 0.4]),
        },
    ),
    "HunyuanVideo15Transformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 8,
        },
        lambda: {
            **video(size=4),
            "encoder_attention_mask": ones(2, 5),
            "encoder_hidden_states_2": r(2, 3, 8),
            "encoder_attention_mask_2": ones(2, 3),
            "image_embeds": r(2, 3, 8),
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [16, 16],
            "text_emb_dim": 8,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1],
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": r(2, 4, 8, 8),
            "timesteps": steps(),
            "encoder_hidden_states_t5": r(2, 5, 16),
            "encoder_hidden_states_llama3": r(2, 2, 5, 16),
            "pooled_embeds": r(2, 8),
        },
    ),
    "UNetControlNetXSModel": (
        {
            "sample_size": 16,
            **CROSS_2D,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "num_attention_heads": 2,
            "ctrl_conditioning_embedding_out_channels": (4, 4),
            "ctrl_block_out_channels": (4, 8),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
        },
        lambda: {**sample(), "controlnet_cond": r(2, 3, 32, 32)},
    ),
}

_AUTOENCODERS = {
    "kl": "AutoencoderKL",
    "asymmetric": "AsymmetricAutoencoderKL",
    "vq": "VQModel",
    "temporal decoder": "AutoencoderKLTemporalDecoder",
    "dc": "AutoencoderDC",
    "cogvideox": "AutoencoderKLCogVideoX",
    "wan": "AutoencoderKLWan",
    "hunyuanvideo": "AutoencoderKLHunyuanVideo",
    "ltx": "AutoencoderKLLTXVideo",
    "mochi": "AutoencoderKLMochi",
    "cosmos": "AutoencoderKLCosmos",
    "magvit": "AutoencoderKLMagvit",
}


def _of_autoencoder(family: str) -> SweepCase:
    make, shape, _, _ = FAMILIES[family]
    frames = {"num_frames": 2} if family == "temporal decoder" else {}
    shape = 2, *shape[1:-2], 32, 32
    return SweepCase(_AUTOENCODERS[family], {}, lambda: {"sample": r(*shape), **frames}, make)


CASES = {name: SweepCase(name, *parts) for name, parts in _TABLE.items()} | {
    name: _of_autoencoder(family) for family, name in _AUTOENCODERS.items()
}

_PARTS = ("ControlNetXSAdapter", "MotionAdapter")
_LISTS = (
    "FluxMultiControlNetModel",
    "HunyuanDiT2DMultiControlNetModel",
    "MultiAdapter",
    "MultiControlNetModel",
    "QwenImageMultiControlNetModel",
    "SD3MultiControlNetModel",
)
_NOT_YET = (
    "AceStepAudioTokenizer",
    "AceStepConditionEncoder",
    "AllegroTransformer3DModel",
    "AnyFlowFARTransformer3DModel",
    "AutoencoderKLKVAEAudio",
    "AutoencoderKLKVAEVideo",
    "AutoencoderKLLTX2Audio",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLMiniMaxH3",
    "AutoencoderKLMiniMaxH3Audio",
    "AutoencoderKLQwenImage21",
    "AutoencoderRAE",
    "AutoencoderSAME",
    "AutoencoderVidTok",
    "BriaFibo2Transformer2DModel",
    "ConsisIDTransformer3DModel",
    "ConsistencyDecoderVAE",
    "ControlNetUnionModel",
    "Cosmos3AVAEAudioTokenizer",
    "Cosmos3OmniTransformer",
    "DreamLiteTransformer2DModel",
    "DreamLiteUNetModel",
    "ErnieImageTransformer2DModel",
    "HeliosTransformer3DModel",
    "HunyuanDiT2DControlNetModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "I2VGenXLUNet",
    "Ideogram4Transformer2DModel",
    "JoyImageEditPlusTransformer3DModel",
    "Kandinsky6SRLatentUpscalerBank",
    "Kandinsky6SRTransformer3DModel",
    "Kandinsky6SRVAE",
    "Kandinsky6Transformer3DModel",
    "Krea2Transformer2DModel",
    "LTX2VideoDiffusionDecoderModel",
    "LTX2VideoTransformer3DModel",
    "LongCatAudioDiTTransformer",
    "LongCatAudioDiTVae",
    "MMAudioVAE",
    "MMAudioVocoder",
    "MiniMaxH3Transformer3DModel",
    "MiniMaxMusic3ConditionEncoder",
    "MiniMaxMusic3RVQDepthDecoder",
    "MiniMaxMusic3Vocoder",
    "NucleusMoEImageTransformer2DModel",
    "OmniGenTransformer2DModel",
    "QwenImage21Transformer2DModel",
    "RFD4ProteinaAutoencoder",
    "RFD4ProteinaTransformer",
    "SanaWMLTX2RefinerTransformer3DModel",
    "SanaWMTransformer3DModel",
    "SparseControlNetModel",
    "StableAudio3DiTModel",
    "StableCascadeUNet",
    "UNetMotionModel",
    "UniDiffuserModel",
    "UniDiffuserTextDecoder",
    "WanAnimate2Transformer3DModel",
    "WanAnimateTransformer3DModel",
    "ZImageControlNetModel",
    "ZImageTransformer2DModel",
)

NOT_MADE: dict[str, str] = {
    "AutoencoderKLAllegro": "it works only with its own tiling",
    "CosmosControlNetModel": "it needs torchvision",
    "CosmosTransformer3DModel": "it needs torchvision",
    "LuminaNextDiT2DModel": "its last bits differ now and then in a long process, for a reason not yet known",
    **dict.fromkeys(_PARTS, "it is a part of other models, and cannot be called"),
    **dict.fromkeys(_LISTS, "it is a list of other models"),
    **dict.fromkeys(_NOT_YET, "no small configuration of it is known here yet"),
}
