"""Attention masks over all pixels, made a few rows at a time, when attention needs them.

Such a mask has the square of the pixels: over 33 frames of 90 x 160 latents it takes 900 GB. A video model
makes one (each frame attends to those up to it) by comparing the frames of all pixels with each other. From
there on its rows can be made one by one. It is handed on as a tensor without memory, until attention is given
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name that all of torch's users know
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = Callable[[int, int], Tensor]

_COMPARISONS = (Tensor.le, Tensor.lt, Tensor.ge, Tensor.gt, Tensor.eq, Tensor.ne)
_SHAPED = (Tensor.unsqueeze, Tensor.expand, Tensor.view, Tensor.reshape)


class Deferring(TorchFunctionMode):
    """While this is active, what compares all pixels with each other is a `Mask`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _COMPARISONS and len(args) == 2 and all(map(_is_repeated, args)):
            one, other = args
            if one.shape == other.shape:
                return Mask.of(
                    one,
                    one.shape,
                    torch.bool,
                    lambda start, stop: func(one[start:stop], other[start:stop]),
                )
        return func(*args, **(kwargs or {}))


def _is_repeated(value: Any) -> bool:
    """Return whether it is one row or column, shown as a matrix."""
    return isinstance(value, Tensor) and value.ndim == 2 and 0 in value.stride()


class Mask(Tensor):
    """A mask `(..., queries, keys)` of which any rows can be made.

    What is done with its numbers or its leading dimensions is done with the rows when they are made. For
    anything else all rows are made.
    """

    rows: Rows
    """Makes the rows from one number up to another."""

    @classmethod
    def of(cls, like: Tensor, shape: torch.Size, dtype: torch.dtype, rows: Rows) -> Self:
        """A mask whose rows are made by a function, on the device of a tensor."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=like.device)
        assert isinstance(made, cls)  # noqa: S101 -- that is what it makes
        made.rows = rows
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the rows, later or now."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # its shape, device and so on
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func is F.scaled_dot_product_attention:
            return _attended(*args, **kwargs)
        later = _later(func, args, kwargs)
        return func(*_made(args), **_made(kwargs)) if later is None else later

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub has it as a method
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return where it is handed to a kernel, all rows are made."""
        return func(*_made(args), **_made(kwargs or {}))


def _later(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Mask | None:
    """Return what comes out, to be computed row by row; None if that cannot be."""
    mask, rest = args[0], args[1:]
    if not isinstance(mask, Mask) or any(isinstance(it, Tensor) for it in (*rest, *kwargs.values())):
        return None
    one_by_one = func is torch.where or (func is Tensor.to and kwargs.keys() <= {"dtype"} and not rest)
    if not one_by_one and func not in _SHAPED and not _repeats(func, mask, kwargs):
        return None
    # Without memory, to see what becomes of the shape and of the dtype.
    seen = func(torch.empty(mask.shape, dtype=mask.dtype, device="meta"), *rest, **kwargs)
    if seen.shape[-2:] != mask.shape[-2:]:
        return None

    def rows(start: int, stop: int) -> Tensor:
        own = mask.rows(start, stop)
        shape = *seen.shape[:-2], *own.shape[-2:]
        if func in _SHAPED:
            return own.expand(shape) if func is Tensor.expand else own.reshape(shape)
        made: Tensor = func(own, *rest, **kwargs)
        return made

    return Mask.of(mask, seen.shape, seen.dtype, rows)


def _repeats(func: Callable[..., Any], mask: Mask, kwargs: dict[str, Any]) -> bool:
    """Return whether it is the mask of each row of a batch that is repeated, for heads."""
    return func is Tensor.repeat_interleave and mask.ndim > 2 and kwargs.get("dim") == 0


def _made(value: Any) -> Any:
    """A value with all rows of the masks in it, which are their own from now on, also if they are changed."""
    return tree_map_only(Mask, _all_rows, value)


def _all_rows(mask: Mask) -> Tensor:
    whole = mask.rows(0, mask.shape[-2])
    mask.rows = lambda start, stop: whole[..., start:stop, :]
    return whole


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Attention for some queries at a time: those whose rows take no more memory than what they look at."""
    if not isinstance(attn_mask, Mask) or attn_mask.shape[-2] != query.shape[-2]:
        given = _made((query, key, value, attn_mask, *args))
        return F.scaled_dot_product_attention(*given, **_made(kwargs))
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    count = query.shape[-1]
    for start in range(0, query.shape[-2], count):
        rows = slice(start, min(start + count, query.shape[-2]))
        output[..., rows, :] = F.scaled_dot_product_attention(
            query[..., rows, :], key, value, attn_mask.rows(rows.start, rows.stop), *args, **kwargs
        )
    return output
