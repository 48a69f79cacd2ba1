"""Which pages a tile of queries reads, and attention over them, for one query head.

Tiles count from position 0, wherever the queries begin, so that a sequence cut anywhere has the same ones.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.masks import Mask
from attention.sparse.gathered import attend
from attention.sparse.odds import odds_of_the_rest
from attention.sparse.pages import Pages, box_bound
from attention.sparse.rows import aligned


class Selection(NamedTuple):
    """A rule of selection; the fields are those of `attention.BlockTopK`."""

    blocks: int
    block_size: int
    query_block: int
    window: int
    sinks: int

    def always(self, pages: int, *, causal: bool) -> int:
        """How many pages around a tile are read whatever they hold."""
        if not causal and not self.window:
            return 0
        C, reach = self.block_size, self.query_block + self.window * (1 if causal else 2)
        aligned = self.query_block % C == 0 and self.window % C == 0  # where a tile begins, a page begins
        return min(pages, reach // C if aligned else (reach + C - 2) // C + 1)

    def slots(self, pages: int, *, causal: bool) -> int:
        """The most pages that a tile reads, some perhaps in vain."""
        sinks = min(pages, -(-self.sinks // self.block_size))
        return sinks + self.always(pages, causal=causal) + min(pages, self.blocks)


class Tile(NamedTuple):
    """A tile of queries: its rows, the position of its first query, and who chooses for it."""

    rows: Int[Array, " R"]
    position: Int[Array, ""]
    choosers: Float[Array, "G c H"]
    counts: Bool[Array, " c"]


def chosen_tiles(
    rule: Selection, query: Float[Array, "G T H"], pages: Pages, mask: Mask, begun, limit, cap, *, certified: bool
):
    """Outputs `T E`, odds of what was not read `T` (None unless certified), the share of pages read, the last choice.

    Args:
        rule: what is selected.
        query: the queries of heads that share their choice.
        pages: of their key head.
        mask: of these heads.
        begun: what the tile has chosen in which the first query lies, where that tile began before it; or None.
        limit: `G T`, an upper bound on the size of logits; or None.
        cap: the soft cap, or None.
        certified: whether odds are computed.
    """
    T, R, P = mask.num_queries, rule.query_block, pages.box.shape[0]
    offset = jnp.zeros((), jnp.int32) if mask.offset is None else mask.offset[0]
    moves = mask.causal and mask.offset is not None
    R = min(R, T) if not moves else (R if T >= R else 1)
    shift = offset % R if moves else 0
    count = -(-(T + (R - 1 if moves else 0)) // R)
    room = jnp.zeros((query.shape[0], count * R, query.shape[2]), query.dtype)
    padded = lax.dynamic_update_slice_in_dim(room, query, shift, axis=1)

    def tile(i):
        rows = i * R - shift + jnp.arange(R)
        own = lax.dynamic_slice_in_dim(padded, i * R, R, axis=1)
        if mask.causal:
            position = (rows[0] + offset) // rule.query_block * rule.query_block
            first = position - offset
            lead = lax.dynamic_slice_in_dim(query, first.clip(0, T - 1), 1, axis=1)
            who = Tile(rows, position, lead, jnp.ones(1, bool))
        else:
            real = rows < (T if mask.query_lengths is None else mask.query_lengths[0])
            who = Tile(rows, rows[0] + offset, own, real)
        chosen = _unless(begun, who, offset, lambda: choice(rule, who, pages.box, mask, cap))
        at, exists = read(rule, who.position, chosen, P, mask)
        bound = None if limit is None else limit[:, rows.clip(0, T - 1)]
        visible = functools.partial(_visible, rule, mask, rows, at, exists)
        found = attend(own, *_gathered(pages, at, mask), visible, cap, bound)
        against = None
        if certified:
            whole = ((at[:, None] == jnp.arange(P)[None]) & exists[:, None]).any(0)[None]
            against = odds_of_the_rest(own, rows, found, pages, whole, mask, cap)
        return (found.output, against), exists.sum() / P, chosen

    found, share, chosen = lax.map(jax.checkpoint(tile), jnp.arange(count)) if count > 1 else _stacked(tile(0))
    output, against = jax.tree.map(lambda x: aligned(x, shift, T)[0], found)
    return output, against, share, lax.dynamic_index_in_dim(chosen, (shift + T - 1) // R, keepdims=False)


def _stacked(found):
    return jax.tree.map(lambda x: x[None], found)


def _unless(begun, tile: Tile, offset, choice: Callable[[], Int[Array, " n"]]) -> Int[Array, " n"]:
    """What a tile chose when it began, if that was before the first of these queries."""
    return choice() if begun is None else lax.cond(tile.position < offset, lambda: begun, choice)


def choice(rule: Selection, tile: Tile, box: Float[Array, "P X"], mask: Mask, cap) -> Int[Array, " n"]:
    """The pages with the largest scores, of those that are not read anyway; -1 where there are no more."""
    C, P = rule.block_size, box.shape[0]
    every = jnp.arange(P)
    first, last = _reach(mask, tile.position, tile.position + rule.query_block - 1)
    low, high = _around(rule, tile.position, P, mask)
    free = (every * C <= last) & ((every + 1) * C > first) & ((every < low) | (every > high))
    free &= every >= -(-rule.sinks // C)
    best, top = lax.top_k(jnp.where(free, _scores(tile, box, free, cap), -jnp.inf), min(P, rule.blocks))
    return jnp.where(best == -jnp.inf, -1, top)  # NaN is chosen, so that it cannot go unnoticed


def _around(rule: Selection, start, P: int, mask: Mask):
    """The first and the last page around a tile that are read whatever they hold."""
    always = rule.always(P, causal=mask.causal)
    low = ((start - rule.window) // rule.block_size).clip(0, P) if always else P
    end = start + rule.query_block - 1
    return low, (end if mask.causal else end + rule.window) // rule.block_size


def read(
    rule: Selection, start, chosen: Int[Array, " n"], P: int, mask: Mask
) -> tuple[Int[Array, " m"], Bool[Array, " m"]]:
    """The pages that a tile reads, and which of the slots hold one."""
    C = rule.block_size
    _, last = _reach(mask, start, start + rule.query_block - 1)
    low, high = _around(rule, start, P, mask)
    sinks = jnp.arange(min(P, -(-rule.sinks // C)))
    around = low + jnp.arange(rule.always(P, causal=mask.causal))
    exists = (sinks < low) & (sinks * C <= last), (around <= high) & (around * C <= last) & (around < P), chosen >= 0
    return jnp.concatenate([sinks, around, chosen]).clip(0, P - 1), jnp.concatenate(exists)


def _reach(mask: Mask, start, end):
    """The first and the last key that positions from `start` to `end` may see."""
    first, last = jnp.zeros_like(start), jnp.full_like(start, mask.num_keys - 1)
    if mask.window is not None:
        left, right = (min(size, mask.num_keys + mask.num_queries) for size in mask.window)
        first, last = start - left, jnp.minimum(last, end + right)
    if mask.causal:
        last = jnp.minimum(last, end)
    return first, last if mask.key_lengths is None else jnp.minimum(last, mask.key_lengths[0] - 1)


def _scores(tile: Tile, box: Float[Array, "P X"], free: Bool[Array, " P"], cap) -> Float[Array, " P"]:
    """The logarithm of the sum over those who choose of the softmax of their bounds; for a single one, its bounds."""
    bounds = box_bound(tile.choosers, box, cap)
    if bounds.shape[:2] == (1, 1):
        return bounds[0, 0]
    bounds = jnp.where(free[None, None], bounds, -jnp.inf)
    shares = jax.nn.log_softmax(jnp.where(free.any(), bounds, 0), axis=-1)
    return jax.nn.logsumexp(jnp.where(tile.counts[None, :, None], shares, -jnp.inf), axis=(0, 1))


def _gathered(pages: Pages, at: Int[Array, " n"], mask: Mask) -> tuple[Float[Array, "nC H"], Float[Array, "nC E"]]:
    """The keys and the values of the pages `at`, one after another; a page is copied as one row.

    Beyond the length, where a cache may hold anything, they are zeros.
    """
    P, C = pages.key.shape[:2]
    key, value = (
        jnp.take(x.reshape(P, -1), at, axis=0, mode="clip").reshape(at.size * C, -1) for x in (pages.key, pages.value)
    )
    if mask.key_lengths is None:
        return key, value
    there = (keys_of(at, C) < mask.key_lengths[0])[:, None]
    return jnp.where(there, key, jnp.zeros_like(key)), jnp.where(there, value, jnp.zeros_like(value))


def keys_of(at: Int[Array, " n"], C: int) -> Int[Array, " nC"]:
    return (at[:, None] * C + jnp.arange(C)[None]).ravel()


def _visible(rule: Selection, mask: Mask, rows, at, exists) -> Bool[Array, "g R nC"]:
    """Which of the gathered keys each row sees."""
    keys = keys_of(at, rule.block_size)
    there = jnp.repeat(exists, rule.block_size) & (keys < mask.num_keys)
    return mask.at(rows, keys)[0, 0] & there[None, None]
