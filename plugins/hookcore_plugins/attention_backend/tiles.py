"""Cuts the scores of an attention into tiles: some queries by some keys of some heads."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MOST_KEYS = 1024
"""The most keys in a tile: more of them leave room for few queries, and narrow products are slow."""


class Options(NamedTuple):
    """The options of tiled attention.

    Attributes:
        causal: Whether keys after the query's own position are masked.
        scale: The factor of scores.
        tile_bytes: The most bytes that the scores of one tile take.
    """

    causal: bool
    scale: float
    tile_bytes: int


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of scores and sums: at least float32."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


@frozen(slots=False)
class Rows:
    """Some queries of some heads, with all the keys that they may attend to.

    Attributes:
        batch: Their range in the batch.
        heads: Their range of heads of key and value.
        group: Heads of the query that share one of these.
        queries: Their range of queries.
        reach: Number of keys that any of the queries may attend to, counted from the first.
        width: The most keys in a tile.
    """

    batch: slice
    heads: slice
    group: int
    queries: slice
    reach: int
    width: int

    @property
    def of_query(self) -> tuple[slice, ...]:
        """The index of these rows in `(B, H, G, L, ...)`."""
        return self.batch, self.heads, slice(None), self.queries

    def by_head(self, tensor: Tensor) -> Tensor:
        """View `(B, H, G * L, ...)` as `(B, H, G, L, ...)`."""
        length = self.queries.stop - self.queries.start
        return tensor.view(*tensor.shape[:2], self.group, length, *tensor.shape[3:])

    def tiles(self) -> Iterator[Tile]:
        """Yield the tiles of these rows, from the first key on."""
        for start in range(0, self.reach, self.width):
            keys = slice(start, min(start + self.width, self.reach))
            yield Tile(self.batch, self.heads, self.group, self.queries, self.reach, self.width, keys)


@frozen(slots=False)
class Tile(Rows):
    """Some queries and some keys of some heads.

    Attributes:
        keys: The range of keys.
    """

    keys: slice

    @property
    def of_key(self) -> tuple[slice, ...]:
        """The index of the keys in `(B, H, S, ...)`."""
        return self.batch, self.heads, self.keys

    def within(self, mask: Tensor) -> tuple[slice, ...]:
        """Return the index of the tile in a mask, of which any dimension may be 1."""
        whole = slice(None)
        places = (self.batch, self.heads, whole, self.queries, self.keys)
        return tuple(whole if size == 1 else place for size, place in zip(mask.shape, places, strict=True))


def blocks_of_rows(q: Tensor, k: Tensor, options: Options) -> Iterator[Rows]:
    """Cut the rows of all scores `(B, H, G, L, S)` so that no tile exceeds `tile_bytes`."""
    batch, heads, group, length, _ = q.shape
    keys = k.shape[2]
    numbers = max(options.tile_bytes // accumulation_dtype(q).itemsize, 1)
    width = max(min(keys, MOST_KEYS, numbers), 1)
    height = max(min(length, numbers // (width * group)), 1)
    heads_at_once = max(min(heads, numbers // (width * group * height)), 1)
    batch_at_once = max(min(batch, numbers // (width * group * height * max(heads, 1))), 1)
    if heads_at_once < heads:
        batch_at_once = 1
    for items, some_heads, queries in itertools.product(
        even_slices(batch, batch_at_once), even_slices(heads, heads_at_once), even_slices(length, height)
    ):
        reach = min(keys, queries.stop) if options.causal else keys
        yield Rows(items, some_heads, group, queries, reach, width)


def even_slices(size: int, most: int) -> list[slice]:
    """Cut a range into slices of sizes that differ by one at most, of `most` at most."""
    count = -(-size // most)
    return [slice(index * size // count, (index + 1) * size // count) for index in range(count)]
