"""Scaled dot product attention: the CPU's choice of kernel, also where gradients are wanted.

torch chooses the kernel by the type of device, and for one that it doesn't know takes another than on the
CPU, which gives other bits. These lines are those of torch's own function for the CPU
(aten/src/ATen/native/transformers/attention.cpp).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.attention import SDPBackend

from hookcore.testing.simulator import state
from hookcore.testing.simulator.tensors import block_of, on_cpu

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_math = torch.ops.aten._scaled_dot_product_attention_math.default


def attention(  # noqa: PLR0917 -- torch's own signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return what `scaled_dot_product_attention` does with simulated tensors; all as there."""
    # As torch.compile looks what would come of a call, there are no numbers; the choice needs none.
    with unset_fake_temporarily():
        mask = None if attn_mask is None else _stand_in(attn_mask)
        three = (_stand_in(query), _stand_in(key), _stand_in(value))
        choice = torch._fused_sdp_choice(
            *three, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
            attn_mask.logical_not(), float("-inf")
        )
    outputs: Any
    if choice == SDPBackend.FLASH_ATTENTION.value:
        outputs = _flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    else:
        outputs = _math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
    return cast("torch.Tensor", outputs[0])


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor by which torch can choose a kernel."""
    if isinstance(tensor, FakeTensor):
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return like.requires_grad_(tensor.requires_grad)
    if tensor.device.type != state.DEVICE_TYPE:
        return tensor
    return on_cpu(tensor.detach(), block_of(tensor)).requires_grad_(tensor.requires_grad)
