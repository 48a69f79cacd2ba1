"""Tokens of packed sequences, each segment after another, with pages and tiles that count from its own first token."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.masks import Mask
from attention.sparse.selection import Tile


class Sorted(NamedTuple):
    """Queries and keys in the order of segment and position, each by its index in the sequence.

    A segment is all tokens of one id, in one run or more. A tile is queries of one segment whose ranks have the same
    quotient by the size of a tile, and no more of them than that.

    Attributes:
        query, key: the indices; keys beyond the length come last.
        first, end: where the keys of a query's segment begin and end.
        rank: of each query, the keys of its segment up to its own position, its own excepted, where attention is
            causal or has a window; otherwise the queries of its segment before it.
        tile: the number of its tile.
        begins: whether it is the first of its tile.
        start: where the keys of a key's segment begin.
    """

    query: Int[Array, " T"]
    key: Int[Array, " S"]
    first: Int[Array, " T"]
    end: Int[Array, " T"]
    rank: Int[Array, " T"]
    tile: Int[Array, " T"]
    begins: Bool[Array, " T"]
    start: Int[Array, " S"]


def sort(mask: Mask, R: int) -> Sorted:
    """The order of one batch element with segments, for tiles of R queries.

    Cost: two sorts, and log2 S comparisons a query.
    """
    assert mask.query_segments is not None, "a mask with segments"
    assert mask.key_segments is not None, "a mask with segments"
    T, S, mine, theirs = mask.num_queries, mask.num_keys, mask.query_segments[0], mask.key_segments[0]
    count = jnp.asarray(S, jnp.int32) if mask.key_lengths is None else mask.key_lengths[0]
    beyond = jnp.arange(S) >= count
    query, key = jnp.argsort(mine, stable=True), jnp.lexsort((theirs, beyond))
    mine = mine[query]
    theirs = jnp.where(beyond[key], jnp.iinfo(theirs.dtype).max, theirs[key])
    first, end = (jnp.minimum(jnp.searchsorted(theirs, mine, side=side), count) for side in ("left", "right"))
    rank = jnp.arange(T) - _starts(mine)
    if mask.causal or mask.window is not None:
        position = query if mask.offset is None else query + mask.offset[0]
        rank = (_up_to(key, position, first, end) - first - 1).clip(0)
    groups = _starts(mine, rank // R)
    begins = (jnp.arange(T) - groups) % R == 0
    return Sorted(query, key, first, end, rank, jnp.cumsum(begins), begins, _starts(theirs))


class Alone(NamedTuple):
    """A tile of queries of one segment, as if that were all there is.

    Attributes:
        at: the places of its rows in the order, the last of them twice where they would lie beyond its end.
        mine: which rows are the tile's.
        position: its first position, counted in the segment.
        first, length: the place of the segment's first key, and how many it has.
        mask: band and length of the segment.
        who: its rows, and who chooses pages for it.
    """

    at: Int[Array, " R"]
    mine: Bool[Array, " R"]
    position: Int[Array, ""]
    first: Int[Array, ""]
    length: Int[Array, ""]
    mask: Mask
    who: Tile

    def boxes(self, growing: Float[Array, "S X"], C: int) -> Float[Array, "P X"]:
        """Those of the segment's pages, out of `growing_boxes`."""
        S = len(growing)
        last = jnp.minimum(C * (jnp.arange(-(-S // C)) + 1), self.length) - 1
        return growing[(self.first + last).clip(0, S - 1)]


def alone(order: Sorted, mask: Mask, query: Float[Array, "G T H"], start, block: int) -> Alone:
    """The tile of at most `block` queries that begins at a place; `query` in the order."""
    T, S = mask.num_queries, mask.num_keys
    rows = start + jnp.arange(min(block, T))
    at = rows.clip(0, T - 1)
    mine = (rows < T) & (order.tile[at] == order.tile[start])
    first, position = order.first[start], order.rank[start] // block * block
    length = order.end[start] - first
    own = Mask(num_queries=T, num_keys=S, causal=mask.causal, window=mask.window, key_lengths=length[None])
    if mask.causal:
        who = Tile(rows, position, lax.dynamic_slice_in_dim(query, start, 1, axis=1), jnp.ones(1, bool))
    else:
        exists = order.query[at] < (T if mask.query_lengths is None else mask.query_lengths[0])
        who = Tile(rows, position, query[:, at], mine & exists)
    return Alone(at, mine, position, first, length, own, who)


def _starts(*columns: Int[Array, " N"]) -> Int[Array, " N"]:
    """Where the run of equal entries begins in which each index lies."""
    changes = jnp.zeros(len(columns[0]), bool).at[0].set(True)
    for x in columns:
        changes = changes.at[1:].set(changes[1:] | (x[1:] != x[:-1]))
    return lax.cummax(jnp.where(changes, jnp.arange(len(changes)), 0))


def _up_to(key: Int[Array, " S"], position: Int[Array, " T"], first, end) -> Int[Array, " T"]:
    """The first place in [first, end) whose key stands after a position, by bisection; `end` if there is none."""
    low, high = first, end
    for _ in range(len(key).bit_length()):
        middle = (low + high) // 2
        before = (low < high) & (key[middle.clip(0, len(key) - 1)] <= position)
        low, high = jnp.where(before, middle + 1, low), jnp.where(before, high, jnp.minimum(high, middle))
    return low


def growing_boxes(key: Float[Array, "S H"], start: Int[Array, " S"], C: int) -> Float[Array, "S X"]:
    """The box around each key and those before it in its page of C keys, as centre and half the widths.

    Pages are counted from `start`, and numbers are at least float32.

    Cost: 2 S H log2 C operations.
    """
    at = jnp.arange(len(key))
    page = at - (at - start) % C
    low = high = lax.stop_gradient(key).astype(jnp.promote_types(key.dtype, jnp.float32))
    for step in (2**i for i in range((C - 1).bit_length())):
        within = (at - step >= page)[:, None]
        low = jnp.where(within, jnp.minimum(low, jnp.roll(low, step, axis=0)), low)
        high = jnp.where(within, jnp.maximum(high, jnp.roll(high, step, axis=0)), high)
    return jnp.concatenate([(low + high) / 2, (high - low) / 2], axis=-1)
