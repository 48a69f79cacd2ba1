"""Which tiles of keys a tile of queries has to read."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from attention.masks import Mask
from attention.tiles import Tiles


class Span(NamedTuple):
    """The key tiles of one query tile: [first, end) hold a visible key, [open, shut) nothing but visible keys."""

    first: Int[Array, ""] | int
    open: Int[Array, ""] | int
    shut: Int[Array, ""] | int
    end: Int[Array, ""] | int


def banded(mask: Mask) -> bool:
    """Whether causality, a window or lengths may leave whole tiles unseen."""
    lengths = mask.query_lengths is not None or mask.key_lengths is not None
    return mask.causal or mask.window is not None or lengths


def irregular(mask: Mask) -> bool:
    """Whether any tile may be masked in part."""
    return mask.query_segments is not None or mask.dense is not None


def span(mask: Mask, i, queries: Tiles, keys: Tiles) -> Span:
    """What query tile i reads, for all the batch elements of the mask. Dense masks skip nothing."""
    if not banded(mask) and mask.query_segments is None:
        return Span(0, 0, 0 if irregular(mask) else keys.length // keys.size, keys.count)
    first, last = (lax.dynamic_slice_in_dim(x, queries.start(i), queries.size, axis=1) for x in mask.key_range())
    seeing = first <= last
    lowest = jnp.where(seeing, first, keys.length).min() // keys.size
    end = jnp.where(seeing, last, -1).max() // keys.size + 1
    if mask.query_segments is not None and mask.key_segments is not None:
        mine = lax.dynamic_slice_in_dim(mask.query_segments, queries.start(i), queries.size, axis=1)
        shared = _within_range(mine, keys.split(mask.key_segments, 1))
        lowest = jnp.maximum(lowest, shared.argmax())
        end = jnp.where(shared.any(), jnp.minimum(end, keys.count - shared[::-1].argmax()), 0)
    if irregular(mask):
        return Span(lowest, lowest, lowest, end)
    opened = jnp.clip(-(-first.max() // keys.size), lowest, end)
    return Span(lowest, opened, jnp.clip((last.min() + 1) // keys.size, opened, end), end)


def _within_range(mine: Int[Array, "b R"], theirs: Int[Array, "count b C"]) -> Bool[Array, " count"]:
    """Which key tiles have a segment id between the least and the greatest of the queries, in any batch element."""
    low, high = mine.min(1)[None], mine.max(1)[None]
    return ((theirs.min(2) <= high) & (theirs.max(2) >= low)).any(1)
