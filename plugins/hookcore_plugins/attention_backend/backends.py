"""The backends that hookcore brings: torch's own kernels, and packages that need not be there.

torch's way to choose a kernel, `torch.nn.attention.sdpa_kernel`, sets flags of the whole process, which
threads would see of each other. So the kernels are called directly, with the preparations that torch's own
function makes (aten/src/ATen/native/transformers/attention.cpp).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from hookcore import AttentionFunction, Objection
from hookcore_plugins.attention_backend.chunked import chunked_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


# torch's kernels


def _math(  # noqa: PLR0917 -- torch's own signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Plain products and a softmax; all scores are in memory at once."""
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, query)
        if is_causal:  # torch's other kernels take both
            rows = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            attn_mask = attn_mask.masked_fill(rows.logical_not(), -math.inf)
            is_causal = False
    output: Tensor = _aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )[0]
    return output


def _flash(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """FlashAttention as torch has it."""
    output: Tensor
    if query.device.type == "cpu":
        if torch.compiler.is_compiling():
            able = _flash_of_cpu_can(query, key, value, attn_mask, dropout_p)
        else:
            choice = torch._fused_sdp_choice(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            able = choice == SDPBackend.FLASH_ATTENTION.value
        if not able:
            raise NotImplementedError(_cannot("flash", query, key, value, attn_mask))
        mask = None if attn_mask is None else _additive(attn_mask, query)
        output = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
        return output
    asked = SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if not can_use_flash_attention(asked):
        raise NotImplementedError(_cannot("flash", query, key, value, attn_mask))
    size = query.shape[-1]
    padded = (F.pad(tensor, (0, -size % 8)) for tensor in (query, key, value))
    output = _aten._scaled_dot_product_flash_attention(
        *padded, dropout_p, is_causal, False, scale=size**-0.5 if scale is None else scale
    )[0]
    return output[..., :size]


def _flash_of_cpu_can(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
) -> bool:
    """What torch says of its flash kernel on the CPU, where torch.compile cannot ask (sdp_utils_cpp.cpp)."""
    given = (query, key, value) if mask is None else (query, key, value, mask)
    return (
        dropout_p == 0
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and min(query.shape[-2], key.shape[-2]) > 0
        and all(tensor.stride(-1) == 1 for tensor in given)
        and (mask is None or (mask.dim() in {2, 4} and not mask.requires_grad))
    )


def _efficient(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Memory-efficient attention as torch has it, with kernels of xformers."""
    asked = SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if not can_use_efficient_attention(asked):
        raise NotImplementedError(_cannot("efficient", query, key, value, attn_mask))
    mask = None if attn_mask is None else _aligned(_additive(attn_mask, query), query, key)
    output: Tensor = _aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, _has_gradients(query, key, value), dropout_p, is_causal, scale=scale
    )[0]
    return output


def _cudnn(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of cuDNN."""
    asked = SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if not can_use_cudnn_attention(asked):
        raise NotImplementedError(_cannot("cudnn", query, key, value, attn_mask))
    output: Tensor = _aten._scaled_dot_product_cudnn_attention(
        query,
        key,
        value,
        None if attn_mask is None else _additive(attn_mask, query),
        _has_gradients(query, key, value),
        dropout_p,
        is_causal,
        False,
        scale=scale,
    )[0]
    return output


def _flex(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 -- declared, so it is 0
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """FlexAttention of torch, compiled except on the CPU."""
    _take_four(query)
    on_cpu = query.device.type == "cpu"
    if on_cpu and _has_gradients(query, key, value):
        raise NotImplementedError("it has no gradients on the CPU")
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    mask = None if attn_mask is None else attn_mask.expand(shape)

    def changed(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if mask is not None:
            found = mask[batch, head, row, column]
            score = torch.where(found, score, -math.inf) if found.dtype is torch.bool else score + found
        return torch.where(row >= column, score, -math.inf) if is_causal else score

    scored = None if mask is None and not is_causal else changed
    # Where it is compiled with what is around, it is part of that.
    whole = on_cpu or torch.compiler.is_compiling()
    function: Any = flex_attention if whole else _compiled_flex()
    output: Tensor = function(query, key, value, score_mod=scored, scale=scale, enable_gqa=enable_gqa)
    return output


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = torch.compile(flex_attention)
    return function


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as numbers to add to scores."""
    if mask.dtype is not torch.bool:
        return mask
    zeros = torch.zeros_like(mask, dtype=query.dtype)
    return zeros.masked_fill_(mask.logical_not(), -math.inf)


def _aligned(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask for all scores, with rows that begin where the kernel can load 16 numbers at a time."""
    length = key.shape[-2]
    if length % 16:
        mask = F.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(*query.shape[:-1], length)


def _has_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _cannot(kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
    masked = "" if mask is None else f" and a mask of {tuple(mask.shape)}"
    return f"{shapes} of {query.dtype}{masked} on {query.device}, which torch's {kernel} kernel does not take"


# Packages


def _missing(module: str, package: str) -> Callable[[], Objection | None]:
    """Makes what says whether a package is there."""

    def unavailable() -> Objection | None:
        try:
            there = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            there = False
        if not there:
            return Objection(f"{package} is not installed", remedy=f"run `pip install {package}`")
        try:
            importlib.import_module(module)
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # built for another version of torch, most often
            return Objection(
                f"{package} cannot be imported ({error})",
                remedy=f"run `pip install --force-reinstall {package}`",
            )
        return None

    return unavailable


def _xformers(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Memory-efficient attention of xformers, which chooses among several kernels."""
    _take_four(query)
    ops: Any = importlib.import_module("xformers.ops")
    bias: Any = None
    if is_causal:
        if attn_mask is not None:
            raise NotImplementedError("it takes a mask or is_causal, found both")
        bias = ops.LowerTriangularMask()
    elif attn_mask is not None:
        bias = _aligned(_additive(attn_mask, query).to(query.dtype), query, key)
    if enable_gqa:
        key, value = (_repeated(tensor, query) for tensor in (key, value))
    inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output: Tensor = ops.memory_efficient_attention(*inputs, attn_bias=bias, p=dropout_p, scale=scale)
    return output.transpose(1, 2)


def _flash_attn(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,  # noqa: ARG001 -- declared, so there is none
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001 -- it always takes fewer heads of key and value
) -> Tensor:
    """FlashAttention 2 from its own package."""
    _take_four(query)
    _take_square(query, key, is_causal=is_causal)
    function: Any = importlib.import_module("flash_attn").flash_attn_func
    inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output: Tensor = function(*inputs, dropout_p=dropout_p, softmax_scale=scale, causal=is_causal)
    return output.transpose(1, 2)


def _sage(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,  # noqa: ARG001 -- declared, so there is none
    dropout_p: float = 0.0,  # noqa: ARG001 -- declared, so it is 0
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001 -- it always takes fewer heads of key and value
) -> Tensor:
    """SageAttention, whose products are in eight bits."""
    _take_four(query)
    _take_square(query, key, is_causal=is_causal)
    function: Any = importlib.import_module("sageattention").sageattn
    output: Tensor = function(query, key, value, tensor_layout="HND", is_causal=is_causal, sm_scale=scale)
    return output


def _take_four(query: Tensor) -> None:
    if query.dim() != 4:
        raise NotImplementedError(f"it takes tensors of 4 dimensions, found {query.dim()}")


def _take_square(query: Tensor, key: Tensor, *, is_causal: bool) -> None:
    """Refuses causal attention of unequal lengths: these packages count from the last key, not the first."""
    if is_causal and query.shape[-2] != key.shape[-2]:
        raise NotImplementedError(
            f"is_causal with {query.shape[-2]} queries and {key.shape[-2]} keys, which it counts from the end"
        )


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    """Key or value with as many heads as the query has."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


# All

_CUDA = ("cuda",)

FUNCTIONS = (
    AttentionFunction("sdpa", F.scaled_dot_product_attention),
    AttentionFunction("math", _math),
    AttentionFunction("flash", _flash, devices=("cpu", "cuda")),
    AttentionFunction("efficient", _efficient, devices=_CUDA, gqa=False),
    AttentionFunction("cudnn", _cudnn, devices=_CUDA, dtypes=_HALF),
    AttentionFunction("flex", _flex, devices=("cpu", "cuda", "xpu"), dropout=False),
    AttentionFunction("chunked", chunked_attention, dropout=False),
    AttentionFunction(
        "xformers",
        _xformers,
        _missing("xformers", "xformers"),
        devices=_CUDA,
        dtypes=(*_HALF, torch.float32),
    ),
    AttentionFunction(
        "flash_attn",
        _flash_attn,
        _missing("flash_attn", "flash-attn"),
        devices=_CUDA,
        dtypes=_HALF,
        masks=(),
        max_head_size=256,
        head_size_multiple=8,
    ),
    AttentionFunction(
        "sage",
        _sage,
        _missing("sageattention", "sageattention"),
        devices=_CUDA,
        dtypes=_HALF,
        masks=(),
        dropout=False,
        gradients=False,
        max_head_size=128,
    ),
)
