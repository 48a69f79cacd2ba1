"""Which pages a tile of queries reads."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.masks import Mask
from attention.sparse.pages import box_bound


class Selection(NamedTuple):
    """A rule of selection; the fields are those of `attention.BlockTopK`."""

    blocks: int
    block_size: int
    query_block: int
    window: int
    sinks: int
    shared: bool = False

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


def choosers(query: Float[Array, "G T H"], mask: Mask, rows: Int[Array, " R"], position, offset) -> Tile:
    """The tile of some rows, the first query of which stands at `position`, which chooses where attention is causal.

    `offset` is where the queries begin.
    """
    T = mask.num_queries
    if mask.causal:
        lead = lax.dynamic_slice_in_dim(query, (position - offset).clip(0, T - 1), 1, axis=1)
        return Tile(rows, position, lead, jnp.ones(1, bool))
    exists = rows < (T if mask.query_lengths is None else mask.query_lengths[0])
    return Tile(rows, position, query[:, rows.clip(0, T - 1)], exists & (rows < T))


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


def unless_begun(begun, tile: Tile, offset, choice: Callable[[], Int[Array, " n"]]) -> Int[Array, " n"]:
    """What a tile chose when it began, if that was before the first of these queries."""
    return choice() if begun is None else lax.cond(tile.position < offset, lambda: begun, choice)


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


def keys_of(at: Int[Array, " n"], C: int) -> Int[Array, " nC"]:
    return (at[:, None] * C + jnp.arange(C)[None]).ravel()
