# ruff: noqa: ARG001 -- the rules of operations share one signature
"""Tensors without data that carry which rows of an image each of their numbers is computed from.

Running a model with them shows how far every layer looks, on both sides, whatever it consists of: padding of
one side only, windows, attention, and operations of which nothing is known, which count as looking at
everything. Rows stand here for either axis of the image.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from fractions import Fraction

    Extent = tuple[Tensor, Tensor]
    """For each number the first row that it depends on, and the negative of the row after the last; both
    infinite where it depends on none. What depends on two numbers has the minimum of both."""

    Bound = Callable[[Any], Tensor]
    """One of the two of a tensor; infinite for a tensor that depends on no row."""

_POINTWISE = {"native_group_norm", "_native_batch_norm_legit_no_training", "native_dropout"}
"""These look at one number, or (group norms) are given the statistics of the whole image."""

_FACTORIES = ("new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand")

_COPIES = {"_to_copy", "copy", "lift_fresh", "contiguous"}

_REDUCTIONS = {
    *("mean", "sum", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "logsumexp"),
    *("var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "topk", "sort", "cumsum"),
    *("_softmax", "_log_softmax"),
}
_NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm"}
_MOVES = {
    *("cat", "stack", "constant_pad_nd", "index_select", "flip", "roll", "repeat", "pixel_shuffle"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "pixel_unshuffle", "_unsafe_view"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "_reshape_alias", "repeat_interleave"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
}
_TAPS = {"upsample_bilinear2d": 1, "upsample_trilinear3d": 1, "upsample_linear1d": 1, "upsample_bicubic2d": 2}
_POOLS = {"avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"}


class Traced(Tensor):
    """A tensor without data, or a constant, within `Tracing`.

    Attributes:
        plain: The tensor on the meta device; with its data where it depends on no input.
        sources: Numbers of the stages whose output is in it, as they were seeded.
        viewed: The tensor that it is a view of, and how it is taken from one; None if it is no view.
    """

    plain: Tensor
    sources: frozenset[int]
    viewed: tuple[Traced, Callable[[Tensor], Tensor]] | None
    _extent: Extent | None
    _changes: int

    @staticmethod
    def of(
        inner: Tensor,
        extent: Extent | None = None,
        sources: frozenset[int] = frozenset(),
        viewed: tuple[Traced, Callable[[Tensor], Tensor]] | None = None,
    ) -> Traced:
        """Wrap a tensor."""
        made = Tensor._make_wrapper_subclass(
            Traced, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=torch.device("meta")
        )
        assert isinstance(made, Traced)  # noqa: S101 -- that is what it makes
        made.plain, made.sources, made.viewed = inner, sources, viewed
        made._extent, made._changes = extent, 0 if viewed is None else -1
        return made

    @property
    def extent(self) -> Extent | None:
        """The rows that each number depends on; None: no number depends on any."""
        if self.viewed is not None and self._changes != self.root._changes:
            base, view = self.viewed
            known = base.extent
            self._extent = None if known is None else (view(known[0]), view(known[1]))
            self._changes = self.root._changes
        return self._extent

    @property
    def root(self) -> Traced:
        """The tensor that this is a view of, and no view itself."""
        return self if self.viewed is None else self.viewed[0].root

    def write(self, extent: Extent | None, sources: frozenset[int]) -> None:
        """Record what is written into the memory of this tensor, and so of all that are views of it."""
        self.sources |= sources
        if self.viewed is None:
            self._extent = extent
            self._changes += 1
            return
        base, view = self.viewed
        if extent is None and base.extent is None:
            base.write(None, sources)
            return
        whole = [_bound(base, side).clone(memory_format=torch.contiguous_format) for side in (0, 1)]
        for side in (0, 1):
            written = torch.tensor(math.inf) if extent is None else extent[side]
            view(whole[side]).copy_(written)
        base.write((whole[0], whole[1]), sources)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take attention as one operation, whatever kernel a device has for it."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub has it as a method
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what is done with it outside of `Tracing`."""
        raise RuntimeError(f"{func} was called with a tensor without data after its pass had ended")


class Tracing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows a pass. What is made while this is active is `Traced`.

    Attributes:
        unknown: Names of operations that count as looking at everything because nothing is known of them.
        positions: Names of operations that add to rows what depends on where they lie.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unknown: set[str] = set()
        self.positions: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [it for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor)]
        if name == "_to_copy" and given[0].is_floating_point():
            kwargs.pop("dtype", None)  # all is float32
        inner = [_inner(it) for it in given]
        device = "meta" if any(it.is_meta for it in inner) else "cpu"
        if "device" in kwargs:
            kwargs["device"] = torch.device(device if inner else "cpu")
        kwargs.pop("pin_memory", None)
        plain = tree_map_only(Tensor, lambda it: _inner(it).to(device), (args, kwargs))
        output = func(*plain[0], **plain[1])
        sources = frozenset().union(*(it.sources for it in given if isinstance(it, Traced)))
        if func.is_view and isinstance(args[0], Traced):
            return self._views(func, args, kwargs, output)
        is_written = func._schema.is_mutable and args and isinstance(args[0], Traced)
        extent = self._extent(func, name.rstrip("_") if is_written else name, args, kwargs, output)
        if is_written:
            args[0].plain = args[0].plain.to(device)
            args[0].write(extent, sources)
            return args[0]
        return tree_map_only(Tensor, lambda it: Traced.of(it, _fitting(extent, it), sources), output)

    def _views(self, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Wrap what is taken from a tensor, and how: what is written into one is in the other."""

        def taken(number: int, shape: torch.Size, bound: Tensor) -> Tensor:
            if "view" in func.overloadpacket.__name__ and bound.numel() == math.prod(shape):
                return bound.reshape(shape)
            found: Tensor = tree_leaves(func(bound, *args[1:], **kwargs))[number]
            return found

        leaves, form = tree_flatten(output)
        made = [
            Traced.of(it, None, args[0].sources, (args[0], functools.partial(taken, number, it.shape)))
            for number, it in enumerate(leaves)
        ]
        return tree_unflatten(made, form)

    def _extent(self, func: Any, name: str, args: Any, kwargs: Any, output: Any) -> Extent | None:
        leaves = tree_leaves((args, kwargs))
        tracked = [it for it in leaves if isinstance(it, Traced) and it.extent is not None]
        first = next((it for it in tree_leaves(output) if isinstance(it, Tensor)), None)
        if not tracked or first is None or name in ("zero", "fill") or name.startswith(_FACTORIES):
            return None
        if torch.Tag.pointwise in func.tags and _adds_positions(tracked, leaves):
            self.positions.add(name)
        rule = self._rule(func, name)
        bounds = [functools.partial(_bound, side=side) for side in (0, 1)]
        try:
            one, other = (rule(func, bound, args, kwargs, first) for bound in bounds)
        except (RuntimeError, TypeError, IndexError, NotImplementedError):
            self.unknown.add(name)
            one, other = (_everything(func, bound, args, kwargs, first) for bound in bounds)
        return one, other

    def _rule(self, func: Any, name: str) -> Callable[..., Tensor]:
        if name in _RULES:
            return _RULES[name]
        if torch.Tag.pointwise in func.tags or name in _POINTWISE:
            return _pointwise
        if name in _MOVES:
            return _moved
        if name in _REDUCTIONS:
            return _reduced
        self.unknown.add(name)
        return _everything


def seed(
    inner: Tensor, dim: int | None, pixels: float = 1.0, sources: frozenset[int] = frozenset()
) -> Traced:
    """A tensor each of whose numbers depends on its own row.

    Args:
        inner: The tensor whose shape it has.
        dim: The dimension of the rows; None: it depends on none.
        pixels: Rows of the image that one of its own is made of.
        sources: What it comes from.
    """
    with _disable_current_modes():
        inner = _inner(inner).to("meta")
        if dim is None:
            return Traced.of(inner, None, sources)
        shape = [1] * inner.ndim
        shape[dim] = inner.shape[dim]
        rows = torch.arange(inner.shape[dim], dtype=torch.float64).mul_(pixels).reshape(shape)
        return Traced.of(inner, (rows.expand(inner.shape), -(rows + pixels).expand(inner.shape)), sources)


def cells_away(tensor: Traced, dim: int, pixels: Fraction, cell: int, length: int) -> float:
    """To how many cells away the rows of a tensor look, at most; infinite if not alike in every cell.

    Args:
        tensor: The tensor.
        dim: The dimension of its rows.
        pixels: Rows of the image that make one row of it.
        cell: Rows of the image in a cell.
        length: Rows of the image.
    """
    per_cell = cell / pixels
    if per_cell.denominator != 1 or tensor.shape[dim] != length / pixels:
        return math.inf
    with _disable_current_modes():
        first, last = (_bound(tensor, side).movedim(dim, 0).flatten(1).amin(1) for side in (0, 1))
        at = torch.arange(len(first), dtype=first.dtype) * float(pixels)
        sides = at - first, -last - (at + float(pixels))
        back, ahead = (side.max() for side in sides)
        inside = ((at >= back) & (at + float(pixels) <= length - ahead)).reshape(-1, int(per_cell))
        for side in sides:
            for phase, known in zip(side.reshape(-1, int(per_cell)).T, inside.T, strict=True):
                seen = phase[known]
                if len(seen) < 2 or seen.min() != seen.max() or (phase > seen.max()).any():
                    return math.inf
        farthest = max(0.0, back.item(), ahead.item())
    return farthest / cell


def _inner(tensor: Tensor) -> Tensor:
    return tensor.plain if isinstance(tensor, Traced) else tensor


def _bound(value: Any, side: int) -> Tensor:
    if isinstance(value, Traced) and value.extent is not None:
        return value.extent[side]
    return torch.full((), math.inf, dtype=torch.float64).expand(value.shape)


def _fitting(extent: Extent | None, output: Tensor) -> Extent | None:
    """The extent for one of several outputs; what has another shape than the first counts as all of it."""
    if extent is None or extent[0].shape == output.shape:
        return extent
    one, other = (side.min().expand(output.shape) for side in extent)
    return one, other


def _compact(bounds: Sequence[Tensor], keep: Sequence[int] = ()) -> list[Tensor]:
    """Bounds of one number of dimensions, with one entry along dimensions where all are the same."""
    dims = [
        slice(None) if dim in keep or any(it.stride(dim) for it in bounds) else slice(0, 1)
        for dim in range(bounds[0].ndim)
    ]
    return [it[tuple(dims)] for it in bounds]


def _pointwise(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    tracked = [it for it in tree_leaves((args, kwargs)) if isinstance(it, Traced) and it.extent is not None]
    bounds = _compact([bound(it).expand(output.shape) for it in tracked])
    return functools.reduce(torch.minimum, bounds).expand(output.shape)


def _copied(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return bound(args[1] if func.overloadpacket.__name__ == "copy_" else args[0]).expand(output.shape)


def _moved(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    name = func.overloadpacket.__name__
    if name == "constant_pad_nd":
        args = (*args[:2], math.inf)
    affected = _affected(name, args, kwargs)
    if affected is None:
        if name == "_unsafe_view":
            return bound(args[0]).reshape(output.shape)
        moved = tree_map_only(Tensor, lambda it: bound(it) if _has_rows(it) else _inner(it), (args, kwargs))
        return tree_leaves(func(*moved[0], **moved[1]))[0]  # type: ignore[no-any-return]
    several = args[0] if name == "cat" else [args[0]]
    bounds = _compact([bound(it) for it in several if it.numel()], [dim % output.ndim for dim in affected])
    moved = func(bounds if name == "cat" else bounds[0], *args[1:], **kwargs)
    return moved.expand(output.shape)  # type: ignore[no-any-return]


def _has_rows(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or (isinstance(tensor, Traced) and tensor.extent is not None)


def _affected(name: str, args: Any, kwargs: Any) -> list[int] | None:
    """Dimensions along which an operation moves numbers; None: any."""
    if name == "cat":
        return [args[1] if len(args) > 1 else kwargs.get("dim", 0)]
    if "_pad" in name:
        return [-1 - it for it in range(len(args[1]) // 2)]
    if "nearest" in name:
        return [-1 - it for it in range(args[0].ndim - 2)]
    return [args[1]] if name == "index_select" else None


def _reduced(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    named = {it.name: value for it, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    dims = named.get("dim", named.get("dims"))
    whole = bound(args[0])
    dims = list(range(whole.ndim)) if dims is None or dims == [] else dims
    dims = [dims] if isinstance(dims, int) else dims
    least = whole.amin(dims, keepdim=True)
    if output.ndim < whole.ndim:
        least = least.squeeze([it for it in dims if whole.ndim])
    return least.expand(output.shape)


def _normalized(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    dims = [-1 - it for it in range(len(args[1]))]
    return bound(args[0]).amin(dims, keepdim=True).expand(output.shape)


def _batch_normalized(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    takes_statistics = args[5]  # as an instance norm does
    return (_everything if takes_statistics else _pointwise)(func, bound, args, kwargs, output)


def _product(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """Matrix products, with something added or not."""
    *added, left, right = args[:3] if func.overloadpacket.__name__ in ("addmm", "baddbmm") else args[:2]
    found = [
        bound(left).amin(-1, keepdim=True).expand(output.shape),
        bound(right).amin(-2, keepdim=True).expand(output.shape),
        *(bound(it).expand(output.shape) for it in added),
    ]
    return functools.reduce(torch.minimum, _compact(found)).expand(output.shape)


def _looked_up(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return bound(args[1])[..., None].expand(output.shape)


def _distances(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    one, other = (bound(it).amin(-1) for it in args[:2])
    return torch.minimum(one[..., :, None], other[..., None, :]).expand(output.shape)


def _everything(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    leaves = [it for it in tree_leaves((args, kwargs)) if isinstance(it, Traced) and it.extent is not None]
    return torch.stack([bound(it).min() for it in leaves]).min().expand(output.shape)


def _convolved(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    image, weight, _, stride, padding, dilation, transposed, *_ = args
    if isinstance(weight, Traced) and weight.extent is not None:
        return _everything(func, bound, args, kwargs, output)
    windows = [
        _window(size, kernel, *step, transposed=transposed)
        for size, kernel, *step in zip(
            output.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    (least,) = _compact([bound(image)])
    return _looking(least.amin(1, keepdim=True), windows).expand(output.shape)


def _pooled(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    kernel, given = args[1], list(args[2:4])
    stride = (given[0] if given else kwargs.get("stride")) or kernel
    padding = (given[1] if len(given) > 1 else kwargs.get("padding")) or [0] * len(kernel)
    windows = [
        _window(*it, 1, transposed=False)
        for it in zip(output.shape[-len(kernel) :], kernel, stride, padding, strict=True)
    ]
    (least,) = _compact([bound(args[0])])
    return _looking(least, windows).expand(output.shape)


def _interpolated(func: Any, bound: Bound, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    taps = _TAPS[func.overloadpacket.__name__]
    (least,) = _compact([bound(args[0])])
    is_aligned = bool(args[2])
    windows = []
    for size, before in zip(output.shape[2:], args[0].shape[2:], strict=True):
        at = torch.arange(size, dtype=torch.float64)
        at = at * ((before - 1) / max(1, size - 1)) if is_aligned else (at + 0.5) * (before / size) - 0.5
        at = at.floor().long()[:, None] + torch.arange(1 - taps, taps + 1)
        windows.append(at.clamp(0, before - 1))
    return _looking(least, windows).expand(output.shape)


def _window(size: int, kernel: int, stride: int, padding: int, dilation: int, *, transposed: bool) -> Tensor:
    """The rows `(size, kernel)` that each row of a convolution's output is computed from."""
    at, taps = torch.arange(size)[:, None], torch.arange(kernel) * dilation
    if not transposed:
        return at * stride - padding + taps
    from_ = at + padding - taps
    return torch.where(from_ % stride == 0, from_ // stride, -1)


def _looking(bound: Tensor, windows: Sequence[Tensor]) -> Tensor:
    """The minimum over a window of the last dimensions; nothing is outside of them."""
    for dim, rows in enumerate(reversed(windows), 1):
        length = bound.shape[-dim]
        if length == 1 and len(rows) > 1:
            continue  # the same all along
        known = (rows >= 0) & (rows < length)
        picked = bound.index_select(-dim, rows.clamp(0, length - 1).flatten())
        after = bound.shape[bound.ndim - dim + 1 :]
        picked = picked.reshape(*bound.shape[:-dim], *rows.shape, *after)
        shape = *rows.shape, *[1] * (dim - 1)
        bound = picked.masked_fill(~known.reshape(shape), math.inf).amin(-dim)
    return bound


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Traced:
    """Return what is computed for a query depends on it and on all keys."""
    given = [it for it in (query, key, value, attn_mask) if isinstance(it, Traced)]
    sources = frozenset().union(*(it.sources for it in given))
    with _disable_current_modes():
        output = torch.empty((*query.shape[:-1], value.shape[-1]), device="meta")
        if all(it.extent is None for it in given):
            return Traced.of(output, None, sources)
        one, other = (
            functools.reduce(
                torch.minimum,
                (
                    _bound(query, side).amin(-1, keepdim=True),
                    _bound(key, side).amin((-2, -1), keepdim=True),
                    _bound(value, side).amin((-2, -1), keepdim=True),
                ),
            ).expand(output.shape)
            for side in (0, 1)
        )
    return Traced.of(output, (one, other), sources)


def _adds_positions(tracked: Sequence[Traced], leaves: Sequence[Any]) -> bool:
    """Return whether a constant that is not the same in all rows is combined with what depends on rows."""
    for it in leaves:
        if not isinstance(it, Tensor) or (isinstance(it, Traced) and it.extent is not None) or it.ndim == 0:
            continue
        inner = _inner(it)
        for other in tracked:
            assert other.extent is not None  # noqa: S101 -- that is what tracked means
            bound = other.extent[0]
            for dim in range(1, min(inner.ndim, bound.ndim) + 1):
                if inner.shape[-dim] > 1 and _varies(bound, -dim) and (inner.is_meta or _varies(inner, -dim)):
                    return True
    return False


def _varies(tensor: Tensor, dim: int) -> bool:
    return bool(tensor.stride(dim)) and bool((tensor != tensor.narrow(dim, 0, 1)).any())


_RULES: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(_COPIES, _copied),
    **dict.fromkeys(_NORMS, _normalized),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _product),
    **dict.fromkeys(_POOLS, _pooled),
    **dict.fromkeys(_TAPS, _interpolated),
    "convolution": _convolved,
    "native_batch_norm": _batch_normalized,
    "embedding": _looked_up,
    "_cdist_forward": _distances,
}
