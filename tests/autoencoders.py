"""Small autoencoders to split: one that computes each pixel by itself, and those of diffusers."""

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
        channels, height, width = (4, 11, 9) if entry == "decode" else (3, 22, 18)
        return (torch.randn(2, channels, height, width, generator=generator),), {}
