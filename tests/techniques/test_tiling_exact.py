"""Exact tiling: the untiled image up to rounding, or refused when planned, whatever a model consists of."""

from __future__ import annotations

import pytest
import torch
from autoencoders import PointwiseAutoencoder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

import hookcore
from hookcore import PlanError
from hookcore_plugins import Tiling


class Wave(nn.Module):
    """A convolution that is padded on some sides only, by an amount of its own on each."""

    def __init__(self, kernel, left, top):
        super().__init__()
        self.pads = (left, kernel - 1 - left, top, kernel - 1 - top)
        self.conv = nn.Conv2d(4, 4, kernel)

    def forward(self, x):
        return torch.tanh(self.conv(F.pad(x, self.pads)))


class Rolled(nn.Module):
    """Looks across the borders of the image."""

    def forward(self, x):
        return x + torch.roll(x, 1, dims=-1)


class Windows(nn.Module):
    """Has all pixels of a window see each other, as attention in windows has."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        rows, columns = (-(-it // self.size) * self.size for it in x.shape[-2:])
        padded = F.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2]))
        mean = F.interpolate(F.avg_pool2d(padded, self.size), scale_factor=self.size)
        return x + mean[..., : x.shape[-2], : x.shape[-1]]


class Positions(nn.Module):
    """Adds where rows lie."""

    def forward(self, x):
        return x + torch.linspace(0, 1, x.shape[-2])[:, None]


class Residual(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        hidden = x.clone()
        hidden[:, :2] = self.inside(x)[:, :2]  # in place, through a view
        return hidden + x


class ByChannel(nn.Module):
    """Normalizes with channels last."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


LOCAL = {
    "point": lambda: nn.Conv2d(4, 4, 1),
    "even kernel": lambda: nn.Conv2d(4, 4, 2, padding="same"),
    "wide": lambda: nn.Conv2d(4, 4, 3, padding=4, dilation=4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "larger": lambda: nn.Upsample(scale_factor=2),
    "larger, smooth": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1),
    "by channel": ByChannel,
    "block": lambda: Residual(nn.Sequential(nn.GroupNorm(1, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))),
    "reflecting": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "maximum": lambda: nn.MaxPool2d(3, stride=1, padding=1),
}
NOT_LOCAL = {
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "rolled": Rolled,
    "windows": lambda: Windows(3),
    "positions": Positions,
    "pooled": lambda: Residual(nn.AdaptiveAvgPool2d(1)),
}


@st.composite
def layers(draw):
    """Names of layers, each with what makes it."""
    if draw(st.integers(0, 2)):
        name = draw(st.sampled_from(list(LOCAL)))
        return name, LOCAL[name]
    kernel = draw(st.integers(1, 9))
    left, top = draw(st.integers(0, kernel - 1)), draw(st.integers(0, kernel - 1))
    return f"padded {left} and {top} of {kernel}", lambda: Wave(kernel, left, top)


def decoder(made):
    torch.manual_seed(0)
    model = PointwiseAutoencoder(4)
    model.decoder = nn.Sequential(*(it() for it in made))
    return model.eval()


@settings(deadline=None, max_examples=15)
@given(
    drawn=st.lists(layers(), min_size=1, max_size=4),
    tile=st.tuples(st.integers(8, 64), st.integers(8, 64)),
    size=st.tuples(st.integers(12, 40), st.integers(12, 40)),
)
@example(drawn=[("one side", lambda: Wave(7, 6, 0))], tile=(8, 8), size=(30, 30))
@example(drawn=[("far", lambda: Wave(9, 4, 4))] * 4, tile=(8, 16), size=(40, 25))
@example(drawn=[("transposed", LOCAL["transposed"])] * 3, tile=(16, 16), size=(20, 20))
def test_local_layers_are_exact_in_tiles_of_any_size(drawn, tile, size):
    model = decoder([LOCAL["point"], *(make for _, make in drawn)])
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.decode(latents)["sample"]
        with hookcore.apply(model, [Tiling(tile, 2, context="exact")]):
            got = model.decode(latents)["sample"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_layers_that_look_at_everything_or_not_alike_are_refused_when_planned(name):
    model = decoder([LOCAL["point"], LOCAL["larger"], NOT_LOCAL[name], LOCAL["point"]])
    with pytest.raises(
        PlanError, match=r"'decoder\.2' of its decode\(\) looks at the whole image, or not alike"
    ):
        hookcore.apply(model, [Tiling(16, 4, context="exact")])


class Skipping(nn.Module):
    """Adds what an early stage has put out to what a later one has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.attention = nn.Conv2d(4, 4, 3, padding=1)
        self.larger = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        early = self.first(x)
        return self.last(
            self.larger(torch.tanh(self.attention(early))) + F.interpolate(early, scale_factor=2)
        )


@pytest.mark.parametrize("context", ["global", "exact"])
def test_what_a_later_stage_takes_from_an_earlier_one_is_not_lost(context):
    """A pass that goes on from a stage has nothing of those before it."""
    torch.manual_seed(0)
    model = PointwiseAutoencoder(4)
    model.decoder = Skipping()
    latents = torch.randn(1, 4, 40, 40)
    with torch.no_grad():
        expected = model.decode(latents)["sample"]
        with hookcore.apply(model.eval(), [Tiling(48, 24, context=context)]):
            got = model.decode(latents)["sample"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=12)
@given(
    channels=st.lists(st.sampled_from([2, 4, 8, 16, 32, 64]), min_size=1, max_size=3),
    context=st.sampled_from(["tile", "global", "exact"]),
)
@example(channels=[8, 32, 8], context="exact")
@example(channels=[16, 64, 16], context="exact")
@example(channels=[4, 16, 4], context="global")
def test_channels_are_not_taken_for_an_image_whatever_their_number(channels, context):
    """A stage that puts out channels last may have as many as would be a width."""

    class ChannelsLast(nn.Module):
        def __init__(self, given, made):
            super().__init__()
            self.linear = nn.Linear(given, made)

        def forward(self, x):
            return self.linear(x)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            widths = [4, *channels]
            self.conv_in = nn.Conv2d(4, 4, 1)
            self.layers = nn.ModuleList(map(ChannelsLast, widths, widths[1:]))
            self.larger = nn.ConvTranspose2d(widths[-1], 3, 2, stride=2)

        def forward(self, x):
            x = self.conv_in(x).movedim(1, -1)
            for layer in self.layers:
                x = layer(x)
            return self.larger(x.movedim(-1, 1))

    model = PointwiseAutoencoder(4)
    model.decoder = Decoder()
    latents = torch.randn(1, 4, 24, 24)
    with torch.no_grad():
        expected = model.decode(latents)["sample"]
        with hookcore.apply(model, [Tiling(16, 4, context=context)]):
            torch.testing.assert_close(model.decode(latents)["sample"], expected)
