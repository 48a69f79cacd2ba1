"""What a tile of queries reads of its keys: sinks, a window, and a sample of the tail between them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.logits import soft_capped
from attention.masks import Mask
from attention.rounding import product


class Rule(NamedTuple):
    """What a tile keeps and samples; the fields are those of `attention.Sampled`."""

    samples: int
    window: int
    sinks: int
    query_block: int

    def width(self, mask: Mask) -> int:
        """How many keys around a tile it keeps, beside the sinks."""
        return min(mask.num_keys, self.query_block + self.window * (1 if mask.causal else 2))


class Tail(NamedTuple):
    """The keys between sinks and window: `before` of them from `begin` on, the others from `resume` on."""

    begin: Int[Array, ""]
    before: Int[Array, ""]
    resume: Int[Array, ""]
    count: Int[Array, ""]


class Tile(NamedTuple):
    """Rows, and what they read: keys, of which the last `sampled` stand for `weight` keys each.

    Attributes:
        head: the number of the batch element and key head.
        at: the rows.
        keys, reads: keys, and which of the slots hold one.
        count: of how many keys the sample is one; 0 where all are read.
    """

    head: Int[Array, ""]
    at: Int[Array, " R"]
    keys: Int[Array, " n"]
    reads: Bool[Array, " n"]
    sampled: int
    weight: Float[Array, ""]
    count: Int[Array, ""]
    tail: Tail


class Weighted(NamedTuple):
    """Output, the sum of weights, each e^(l - level), and the level; weights of a sample without their multiple."""

    output: Float[Array, "G R E"]
    total: Float[Array, "G R"]
    weights: Float[Array, "G R n"]
    level: Float[Array, "G R"]
    value: Float[Array, "n E"]


def tile_at(rule: Rule, part: Inputs, seed: Array, head, row, R: int, offset) -> Tile:
    """What the queries [row, row + R) of a head read."""
    mask, C, S = part.mask, rule.query_block, part.mask.num_keys
    block = (row + offset) // C
    start, width = block * C, rule.width(mask)
    low = (start - rule.window).clip(0, S)
    high = start + C - 1 + (0 if mask.causal else rule.window)
    around = (start - rule.window).clip(0, S - width) + jnp.arange(width)
    sinks = jnp.arange(min(rule.sinks, S))
    tail = _tail(mask, start, start + C - 1, low, high, sinks.size)
    m = min(rule.samples, S)
    rng = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), block.astype(jnp.uint32))
    drawn = jax.random.randint(rng, (m,), 0, jnp.maximum(tail.count, 1), jnp.int32)
    whole, ranks = tail.count <= m, jnp.arange(m, dtype=jnp.int32)
    rank = jnp.where(whole, ranks, drawn)
    sampled = jnp.where(rank < tail.before, tail.begin + rank, tail.resume + rank - tail.before)
    return Tile(
        head=head,
        at=(row + jnp.arange(R)).clip(0, mask.num_queries - 1),
        keys=jnp.concatenate([sinks, around, sampled]).clip(0, S - 1),
        reads=jnp.concatenate(
            [(sinks < low) | (sinks > high), (around >= low) & (around <= high), ~whole | (ranks < tail.count)]
        ),
        sampled=m,
        weight=jnp.where(whole, 1, tail.count / jnp.asarray(m, part.query.dtype)).astype(part.query.dtype),
        count=jnp.where(whole, 0, tail.count),
        tail=tail,
    )


def _tail(mask: Mask, start, end, low, high, sinks: int) -> Tail:
    """What lies between the sinks and the window of a tile at [start, end], as far as some of its rows may see."""
    left, right = mask.window or (mask.num_keys + mask.num_queries,) * 2
    span = mask.num_keys + mask.num_queries  # a window of 2**31 - 1 must not overflow
    begin = jnp.maximum(start - min(left, span), sinks)
    stop = jnp.minimum(end + min(right, span) + 1, mask.num_keys)
    if mask.key_lengths is not None:
        stop = jnp.minimum(stop, mask.key_lengths[0])
    resume = jnp.maximum(high + 1, begin)
    before = (jnp.minimum(low, stop) - begin).clip(0)
    after = jnp.zeros_like(before) if mask.causal else (stop - resume).clip(0)
    return Tail(begin, before, resume, before + after)


def weighted(part: Inputs, tile: Tile) -> Weighted:
    """Softmax over what a tile reads, the sampled keys weighted by the number that each stands for."""
    mask, dtype = part.mask, part.query.dtype
    there = tile.reads if mask.key_lengths is None else tile.reads & (tile.keys < mask.key_lengths[0])
    key, value = (jnp.take(x[0, 0], tile.keys, axis=0).astype(dtype) for x in (part.key, part.value))
    key, value = (jnp.where(there[:, None], x, 0) for x in (key, value))
    visible = mask.at(tile.at, tile.keys)[0, 0] & there[None, None]
    logits = soft_capped(product("GRH,nH->GRn", part.query[0, 0][:, tile.at], key), part.soft_cap)
    logits = jnp.where(visible, logits, -jnp.inf)
    level = lax.stop_gradient(logits.max(-1))
    level = jnp.where(jnp.isneginf(level), 0, level)
    weights = jnp.exp(logits - level[..., None])
    multiple = jnp.where(jnp.arange(tile.keys.size) < tile.keys.size - tile.sampled, 1, tile.weight)
    scaled = weights * multiple[None, None]
    total = scaled.sum(-1)
    output = product("GRn,nE->GRE", scaled, value) / jnp.where(total > 0, total, 1)[..., None]
    return Weighted(output, total, weights, level, value)
