"""Small autoencoders to split: one that computes each pixel by itself, and those of diffusers."""

import diffusers
import torch
from attrs import frozen
from torch import nn


class PointwiseAutoencoder(nn.Module):
    """Images `(B, 3, H, W)` to latents `(B, 4, H / 2, W / 2)` and back, without looking at neighbours."""

    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 1), nn.PixelUnshuffle(2), nn.SiLU(), nn.Conv2d(4 * width, 4, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 4 * width, 1), nn.SiLU(), nn.PixelShuffle(2), nn.Conv2d(width, 3, 1)
        )

    def encode(self, x):
        return (self.encoder(x),)

    def decode(self, z):
        return {"sample": self.decoder(z)}

    def forward(self, x):
        return self.decode(self.encode(x)[0])


@frozen
class Pointwise:
    """The blueprint of a `PointwiseAutoencoder`.

    Attributes:
        width: Channels inside.
    """

    width: int
    entries = ("forward", "encode", "decode")

    def make(self):
        return PointwiseAutoencoder(self.width).eval()

    def make_inputs(self, entry, generator):
        channels, height, width = (4, 7, 6) if entry == "decode" else (3, 14, 12)
        return (torch.randn(2, channels, height, width, generator=generator),), {}


DOWN, UP = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
THREE = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "latent_channels": 4}
FRAMES = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}

# Name to what makes it, the shapes of an image and of latents, and what `decode` is given besides. VQModel's
# norms have a group for each channel: in fewer latents it is by chance how close their statistics come.
FAMILIES = {
    "kl": (
        lambda: diffusers.AutoencoderKL(**THREE, down_block_types=DOWN, up_block_types=UP),
        (1, 3, 96, 96),
        (1, 4, 24, 24),
        {},
    ),
    "asymmetric": (
        lambda: diffusers.AsymmetricAutoencoderKL(
            down_block_types=DOWN,
            down_block_out_channels=(8, 16, 16),
            up_block_types=UP,
            up_block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            layers_per_up_block=1,
        ),
        (1, 3, 96, 96),
        (1, 4, 24, 24),
        {},
    ),
    "vq": (
        lambda: diffusers.VQModel(
            block_out_channels=(32,) * 3,
            down_block_types=DOWN,
            up_block_types=UP,
            latent_channels=4,
            norm_type="spatial",
        ),
        (1, 3, 96, 96),
        (1, 4, 36, 36),
        {"force_not_quantize": True},
    ),
    "temporal decoder": (
        lambda: diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,) * 3, down_block_types=DOWN),
        (2, 3, 96, 96),
        (2, 4, 24, 24),
        {"num_frames": 2},
    ),
    "dc": (
        lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
        ),
        (1, 3, 96, 96),
        (1, 4, 24, 24),
        {},
    ),
    "cogvideox": (
        lambda: diffusers.AutoencoderKLCogVideoX(
            **FRAMES,
            block_out_channels=(8, 16, 16),
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
        ),
        (1, 3, 17, 96, 96),
        (1, 4, 5, 24, 24),
        {},
    ),
    "wan": (
        lambda: diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        (1, 3, 9, 96, 96),
        (1, 4, 3, 12, 12),
        {},
    ),
    "hunyuanvideo": (
        lambda: diffusers.AutoencoderKLHunyuanVideo(**FRAMES, block_out_channels=(8, 8, 16, 16)),
        (1, 3, 5, 96, 96),
        (1, 4, 2, 12, 12),
        {},
    ),
    "ltx": (
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        (1, 3, 9, 96, 96),
        (1, 8, 3, 24, 24),
        {},
    ),
    "mochi": (
        lambda: diffusers.AutoencoderKLMochi(
            latent_channels=4,
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        ),
        (1, 3, 7, 96, 96),
        (1, 4, 2, 12, 12),
        {},
    ),
    "cosmos": (
        lambda: diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8,) * 4,
            decode_block_out_channels=(8,) * 4,
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        ),
        (1, 3, 9, 96, 96),
        (1, 4, 3, 12, 12),
        {},
    ),
    "magvit": (
        lambda: diffusers.AutoencoderKLMagvit(
            **FRAMES,
            block_out_channels=[8, 8, 16, 16],
            down_block_types=["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3],
            up_block_types=["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3],
        ),
        (1, 3, 5, 96, 96),
        (1, 4, 2, 12, 12),
        {},
    ),
}
