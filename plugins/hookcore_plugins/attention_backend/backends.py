"""The built-in attention backends: torch's own kernels, and the kernels of optional packages.

`torch.nn.attention.sdpa_kernel` chooses a kernel by flags of the whole process, which other threads would
see. The kernels are therefore called directly, with the preparations that torch's own function makes
(aten/src/ATen/native/transformers/attention.cpp).
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

from hookcore import AttentionCall, AttentionFunction, Objection
from hookcore_plugins.attention_backend.chunked import chunked_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def _with_torchs_signature(kernel: Callable[[AttentionCall], Tensor]) -> Callable[..., Tensor]:
    """Give a kernel the signature of `torch.nn.functional.scaled_dot_product_attention`."""

    @functools.wraps(kernel)
    def function(*args: Any, **kwargs: Any) -> Tensor:
        return kernel(AttentionCall(*args, **kwargs))

    return function


# torch's kernels


@_with_torchs_signature
def _math(call: AttentionCall) -> Tensor:
    """Compute plain products and a softmax; all scores are in memory at once."""
    mask, is_causal = call.attn_mask, call.is_causal
    if mask is not None:
        mask = _additive(mask, call.query)
        if is_causal:  # this kernel refuses both together, which torch's other kernels take
            size = call.query.shape[-2], call.key.shape[-2]
            rows = torch.ones(size, dtype=torch.bool, device=mask.device).tril()
            mask = mask.masked_fill(rows.logical_not(), -math.inf)
            is_causal = False
    return call._replace(attn_mask=mask, is_causal=is_causal).run(_math_kernel)


def _math_kernel(*args: Any, **kwargs: Any) -> Tensor:
    output: Tensor = _aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
    return output


@_with_torchs_signature
def _flash(call: AttentionCall) -> Tensor:
    """Run torch's FlashAttention."""
    query, mask = call.query, call.attn_mask
    output: Tensor
    if query.device.type == "cpu":
        if torch.compiler.is_compiling():
            able = _flash_of_cpu_can(call)
        else:
            able = call.run(torch._fused_sdp_choice) == SDPBackend.FLASH_ATTENTION.value
        if not able:
            raise NotImplementedError(_unsupported("flash", call))
        output = _aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            call.key,
            call.value,
            call.dropout_p,
            call.is_causal,
            attn_mask=None if mask is None else _additive(mask, query),
            scale=call.scale,
        )[0]
        return output
    if not can_use_flash_attention(_params(call)):
        raise NotImplementedError(_unsupported("flash", call))
    size = query.shape[-1]
    padded = (F.pad(tensor, (0, -size % 8)) for tensor in (query, call.key, call.value))
    scale = size**-0.5 if call.scale is None else call.scale
    output = _aten._scaled_dot_product_flash_attention(
        *padded, call.dropout_p, call.is_causal, False, scale=scale
    )[0]
    return output[..., :size]


def _flash_of_cpu_can(call: AttentionCall) -> bool:
    """Repeat torch's conditions for its flash kernel on the CPU, which compiled code cannot ask for.

    They are those of `use_flash_attention_cpp` in aten/src/ATen/native/transformers/sdp_utils_cpp.cpp.
    """
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    given = (query, key, value) if mask is None else (query, key, value, mask)
    return (
        call.dropout_p == 0
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and min(query.shape[-2], key.shape[-2]) > 0
        and all(tensor.stride(-1) == 1 for tensor in given)
        and (mask is None or (mask.dim() in {2, 4} and not mask.requires_grad))
    )


@_with_torchs_signature
def _efficient(call: AttentionCall) -> Tensor:
    """Run torch's memory-efficient attention, whose kernels come from xformers."""
    if not can_use_efficient_attention(_params(call)):
        raise NotImplementedError(_unsupported("efficient", call))
    mask = None if call.attn_mask is None else _aligned(_additive(call.attn_mask, call.query), call)
    output: Tensor = _aten._scaled_dot_product_efficient_attention(
        call.query,
        call.key,
        call.value,
        mask,
        call.needs_gradients,
        call.dropout_p,
        call.is_causal,
        scale=call.scale,
    )[0]
    return output


@_with_torchs_signature
def _cudnn(call: AttentionCall) -> Tensor:
    """Run cuDNN's attention."""
    if not can_use_cudnn_attention(_params(call)):
        raise NotImplementedError(_unsupported("cudnn", call))
    output: Tensor = _aten._scaled_dot_product_cudnn_attention(
        call.query,
        call.key,
        call.value,
        None if call.attn_mask is None else _additive(call.attn_mask, call.query),
        call.needs_gradients,
        call.dropout_p,
        call.is_causal,
        False,
        scale=call.scale,
    )[0]
    return output


@_with_torchs_signature
def _flex(call: AttentionCall) -> Tensor:
    """Run torch's FlexAttention, compiled except on the CPU."""
    query, key = call.query, call.key
    _require_four_dimensions(query)
    on_cpu = query.device.type == "cpu"
    if on_cpu and call.needs_gradients:
        raise NotImplementedError("it has no gradients on the CPU")
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    mask = None if call.attn_mask is None else call.attn_mask.expand(shape)

    def masked(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if mask is not None:
            found = mask[batch, head, row, column]
            score = torch.where(found, score, -math.inf) if found.dtype is torch.bool else score + found
        return torch.where(row >= column, score, -math.inf) if call.is_causal else score

    score_mod = None if mask is None and not call.is_causal else masked
    # In code that is compiled already, FlexAttention becomes part of that code's graph.
    function: Any = flex_attention if on_cpu or torch.compiler.is_compiling() else _compiled_flex()
    output: Tensor = function(
        query, key, call.value, score_mod=score_mod, scale=call.scale, enable_gqa=call.enable_gqa
    )
    return output


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = torch.compile(flex_attention)
    return function


def _params(call: AttentionCall) -> SDPAParams:
    return SDPAParams(*call[:6], call.enable_gqa)


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """Return a mask as numbers to add to scores."""
    if mask.dtype is not torch.bool:
        return mask
    zeros = torch.zeros_like(mask, dtype=query.dtype)
    return zeros.masked_fill_(mask.logical_not(), -math.inf)


def _aligned(mask: Tensor, call: AttentionCall) -> Tensor:
    """Expand a mask to all scores, with rows that begin where the kernel can load 16 numbers at a time."""
    length = call.key.shape[-2]
    if length % 16:
        mask = F.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(*call.query.shape[:-1], length)


def _unsupported(kernel: str, call: AttentionCall) -> str:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in call[:3])
    masked = "" if call.attn_mask is None else f" and a mask of {tuple(call.attn_mask.shape)}"
    on = f"{call.query.dtype}{masked} on {call.query.device}"
    return f"{shapes} of {on}, which torch's {kernel} kernel does not take"


# Packages


def _requires(module: str, package: str) -> Callable[[], Objection | None]:
    """Make an `unavailable` that objects when a package is missing or cannot be imported."""

    def unavailable() -> Objection | None:
        try:
            there = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            there = False
        if not there:
            return Objection(f"{package} is not installed", remedy=f"run `pip install {package}`")
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # mostly built for another version of torch
            return Objection(
                f"{package} cannot be imported ({error})",
                remedy=f"run `pip install --force-reinstall {package}`",
            )
        return None

    return unavailable


@_with_torchs_signature
def _xformers(call: AttentionCall) -> Tensor:
    """Run the memory-efficient attention of xformers, which chooses among several kernels."""
    query, key, value = call[:3]
    _require_four_dimensions(query)
    ops: Any = importlib.import_module("xformers.ops")
    bias: Any = None
    if call.is_causal:
        if call.attn_mask is not None:
            raise NotImplementedError("it takes a mask or is_causal, found both")
        bias = ops.LowerTriangularMask()
    elif call.attn_mask is not None:
        bias = _aligned(_additive(call.attn_mask, query).to(query.dtype), call)
    if call.enable_gqa:
        key, value = (it.repeat_interleave(query.shape[1] // it.shape[1], dim=1) for it in (key, value))
    inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output: Tensor = ops.memory_efficient_attention(
        *inputs, attn_bias=bias, p=call.dropout_p, scale=call.scale
    )
    return output.transpose(1, 2)


@_with_torchs_signature
def _flash_attn(call: AttentionCall) -> Tensor:
    """Run FlashAttention 2 of the package flash-attn, which always takes fewer heads of key and value."""
    _require_four_dimensions(call.query)
    _require_equal_lengths_if_causal(call)
    function: Any = importlib.import_module("flash_attn").flash_attn_func
    inputs = (tensor.transpose(1, 2) for tensor in call[:3])
    output: Tensor = function(
        *inputs, dropout_p=call.dropout_p, softmax_scale=call.scale, causal=call.is_causal
    )
    return output.transpose(1, 2)


@_with_torchs_signature
def _sage(call: AttentionCall) -> Tensor:
    """Run SageAttention, which rounds to eight bits and always takes fewer heads of key and value."""
    _require_four_dimensions(call.query)
    _require_equal_lengths_if_causal(call)
    function: Any = importlib.import_module("sageattention").sageattn
    output: Tensor = function(*call[:3], tensor_layout="HND", is_causal=call.is_causal, sm_scale=call.scale)
    return output


def _require_four_dimensions(query: Tensor) -> None:
    if query.dim() != 4:
        raise NotImplementedError(f"it takes tensors of 4 dimensions, found {query.dim()}")


def _require_equal_lengths_if_causal(call: AttentionCall) -> None:
    """Refuse causal attention of unequal lengths: these packages align the last positions, not the first."""
    queries, keys = call.query.shape[-2], call.key.shape[-2]
    if call.is_causal and queries != keys:
        raise NotImplementedError(
            f"is_causal with {queries} queries and {keys} keys, which it counts from the end"
        )


# The list

_CUDA = ("cuda",)

BACKENDS = (
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
        _requires("xformers", "xformers"),
        devices=_CUDA,
        dtypes=(*_HALF, torch.float32),
    ),
    AttentionFunction(
        "flash_attn",
        _flash_attn,
        _requires("flash_attn", "flash-attn"),
        devices=_CUDA,
        dtypes=_HALF,
        masks=(),
        max_head_size=256,
        head_size_multiple=8,
    ),
    AttentionFunction(
        "sage",
        _sage,
        _requires("sageattention", "sageattention"),
        devices=_CUDA,
        dtypes=_HALF,
        masks=(),
        dropout=False,
        gradients=False,
        max_head_size=128,
    ),
)
