"""Models with random weights, of two sizes, made without ever holding their weights twice.

Where diffusers is not installed, plain transformers whose blocks have as many weights stand in.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FAMILIES = ("flux", "flux-single", "unet")
SIZES = ("small", "full")
_DEVIATION = 0.02
_PATTERN = 1 << 20
_HEAD = 64

_SMALL_FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 8,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
_FLUX: dict[tuple[str, str], dict[str, Any]] = {
    ("flux", "small"): _SMALL_FLUX | {"num_layers": 20, "num_single_layers": 0},
    ("flux-single", "small"): _SMALL_FLUX | {"num_layers": 0, "num_single_layers": 20},
    ("flux", "full"): {},  # diffusers' defaults are Flux.1: 19 + 38 blocks, 12 billion weights
}
_UNET = {
    "small": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    },
    "full": {  # SDXL: 2.6 billion weights
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    },
}
# Width and depth in square layers: 36 and 15 are a Flux double and single block, 16 one of SDXL's.
_PLAIN = {
    ("flux", "small"): [(128, 36)] * 20,
    ("flux-single", "small"): [(128, 15)] * 20,
    ("flux", "full"): [(3072, 36)] * 19 + [(3072, 15)] * 38,
    ("unet", "small"): [(32, 16)] * 2 + [(64, 16)] * 4 + [(128, 16)] * 10 + [(64, 16)] * 6,
    ("unet", "full"): [(640, 16)] * 4 + [(1280, 16)] * 95 + [(640, 16)] * 6,
}
_PLAIN_TOKENS = {("flux", "full"): 4608, ("unet", "full"): 2048}


@frozen
class Model:
    """A model and what it is called with.

    Attributes:
        title: What it is, for people.
        module: In evaluation mode, on the CPU.
        make_inputs: Gives keyword arguments that lie on a device; the same values each time.
    """

    title: str
    module: nn.Module
    make_inputs: Callable[[torch.device], dict[str, Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return sum(it.nbytes for it in (*self.module.parameters(), *self.module.buffers()))


def build(family: str, size: str) -> Model:
    """Builds one of the models: bfloat16 where it is of full size, float32 where it is small.

    Args:
        family: One of `FAMILIES`.
        size: One of `SIZES`.
    """
    dtype = torch.bfloat16 if size == "full" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            title, module, shapes = _describe(family, size)
    finally:
        torch.set_default_dtype(before)
    module = module.to_empty(device="cpu").eval().requires_grad_(requires_grad=False)
    _fill(module)

    def make_inputs(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        made = {
            name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()
        }
        if "text_embeds" in made:  # of SDXL
            added = {name: made.pop(name) for name in ("text_embeds", "time_ids")}
            made["added_cond_kwargs"] = added
        return made | ({} if "x" in made else {"return_dict": False})

    return Model(title, module, make_inputs)


def _describe(family: str, size: str) -> tuple[str, nn.Module, dict[str, tuple[int, ...]]]:
    """A title, a module, and the shapes of its inputs."""
    if find_spec("diffusers") is None:
        layout = _PLAIN[family, size]
        title = f"plain transformer of {len(layout)} blocks, in place of {family} as diffusers is missing"
        return (
            title,
            PlainTransformer(layout),
            {"x": (1, _PLAIN_TOKENS.get((family, size), 24), layout[0][0])},
        )
    import diffusers

    if family != "unet":
        flux: Any = diffusers.FluxTransformer2DModel(**_FLUX[family, size], guidance_embeds=False)
        tokens, text = (24, 8) if size == "small" else (4096, 512)
        shapes: dict[str, tuple[int, ...]] = {
            "hidden_states": (1, tokens, flux.config.in_channels),
            "encoder_hidden_states": (1, text, flux.config.joint_attention_dim),
            "pooled_projections": (1, flux.config.pooled_projection_dim),
            "timestep": (1,),
            "img_ids": (tokens, 3),
            "txt_ids": (text, 3),
        }
        count = len(flux.transformer_blocks) + len(flux.single_transformer_blocks)
        kind = "single " if family == "flux-single" else ""
        return f"Flux transformer of {count} {kind}blocks", flux, shapes
    unet: Any = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **_UNET[size])
    batch, text = (1, 8) if size == "small" else (2, 77)
    edge = unet.config.sample_size
    shapes = {
        "sample": (batch, 4, edge, edge),
        "timestep": (batch,),
        "encoder_hidden_states": (batch, text, unet.config.cross_attention_dim),
    }
    if size == "full":
        shapes |= {"text_embeds": (batch, 1280), "time_ids": (batch, 6)}
    return f"{'SDXL ' if size == 'full' else ''}UNet", unet, shapes


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Gives all weights random values, the same in each process. The values repeat: that is quicker."""
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0)) * _DEVIATION
    for parameter in module.parameters():
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), _PATTERN):
            part = flat[start : start + _PATTERN]
            part.copy_(pattern[: part.numel()])
    for name, buffer in module.named_buffers():
        raise NotImplementedError(f"{name} ({tuple(buffer.shape)}) would have to be computed")


class PlainBlock(nn.Module):
    """Attention and a feed-forward part that together have so many square layers' weights."""

    def __init__(self, entering: int, width: int, squares: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD)
        self.enter = nn.Linear(entering, width) if entering != width else nn.Identity()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        inner = width * (squares - 4) // 2
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        heads = (
            it.unflatten(-1, (self.heads, -1)).transpose(1, 2) for it in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class PlainTransformer(nn.Module):
    """A stack of blocks that may differ in width; gives a tuple, as diffusers' models do."""

    def __init__(self, layout: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        entering = [layout[0][0], *(width for width, _ in layout)]
        self.blocks = nn.ModuleList(
            PlainBlock(before, *here) for before, here in zip(entering, layout, strict=False)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)
