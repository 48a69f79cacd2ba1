"""What a tile of queries reads of its keys: sinks, a window, heavy pages, and a sample of the tail between them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.exponential import finite
from attention.inputs import Inputs
from attention.logits import soft_capped
from attention.masks import Mask
from attention.rounding import product
from attention.sparse import selection


class Rule(NamedTuple):
    """What a tile keeps and samples; the fields are those of `attention.Sampled`."""

    samples: int
    window: int
    sinks: int
    query_block: int
    heavy: int
    page: int

    def width(self, mask: Mask) -> int:
        """How many keys around a tile it keeps, beside the sinks."""
        return min(mask.num_keys, self.query_block + self.window * (1 if mask.causal else 2))

    def selection(self) -> selection.Selection:
        """The rule by which heavy pages are chosen."""
        return selection.Selection(self.heavy, self.page, self.query_block, self.window, self.sinks)


class Tail(NamedTuple):
    """The keys between sinks and window: `before` of them from `begin` on, the others from `resume` on."""

    begin: Int[Array, ""]
    before: Int[Array, ""]
    resume: Int[Array, ""]
    count: Int[Array, ""]


class Tile(NamedTuple):
    """Rows, and what they read: keys, of which the last `sampled` stand for `weight` keys each.

    Attributes:
        at: the rows.
        first, lead: the place in the order and the index of the first key of what they see a part of.
        keys, reads: keys, and which of the slots hold one.
        count: of how many keys the sample is one; 0 where all are read.
        chosen: the heavy pages; -1 where there are fewer.
        rest: the pages with keys of which some are left to the sample; None where nothing is known of pages.
    """

    at: Int[Array, " R"]
    first: Int[Array, ""] | int
    lead: Int[Array, ""] | int
    keys: Int[Array, " n"]
    reads: Bool[Array, " n"]
    sampled: int
    weight: Float[Array, ""]
    count: Int[Array, ""]
    tail: Tail
    chosen: Int[Array, " h"]
    rest: Bool[Array, " P"] | None


class Weighted(NamedTuple):
    """Output, the sum of weights, each e^(l - level), and the level; weights of a sample without their multiple."""

    output: Float[Array, "G R E"]
    total: Float[Array, "G R"]
    weights: Float[Array, "G R n"]
    level: Float[Array, "G R"]
    value: Float[Array, "n E"]


def tile_at(
    rule: Rule, mask: Mask, start, at: Int[Array, " R"], seed: Array, chosen: Int[Array, " h"] | None, dtype
) -> Tile:
    """What the queries `at` read, a tile that begins at `start`, of keys that are counted from the first of them."""
    C, S, width = rule.query_block, mask.num_keys, rule.width(mask)
    low = (start - rule.window).clip(0, S)
    high = start + C - 1 + (0 if mask.causal else rule.window)
    around = (start - rule.window).clip(0, S - width) + jnp.arange(width)
    sinks = jnp.arange(min(rule.sinks, S))
    tail = _tail(mask, start, start + C - 1, low, high, sinks.size)
    pages = jnp.zeros(0, jnp.int32) if chosen is None else chosen
    rest, spans = _ranks(pages, -(-S // rule.page), rule.page, tail)
    left = tail.count - (spans[1] - spans[0]).sum()
    m = min(rule.samples, S)
    rng = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), (start // C).astype(jnp.uint32))
    drawn = jax.random.randint(rng, (m,), 0, jnp.maximum(left, 1), jnp.int32)
    whole, ranks = left <= m, jnp.arange(m, dtype=jnp.int32)
    rank = _passing(jnp.where(whole, ranks, drawn), spans)
    sampled = jnp.where(rank < tail.before, tail.begin + rank, tail.resume + rank - tail.before)
    reads = (sinks < low) | (sinks > high), (around >= low) & (around <= high)
    return Tile(
        at=at.clip(0, mask.num_queries - 1),
        first=0,
        lead=0,
        keys=jnp.concatenate([sinks, around, selection.keys_of(pages, rule.page), sampled]).clip(0, S - 1),
        reads=jnp.concatenate([*reads, jnp.repeat(pages >= 0, rule.page), ~whole | (ranks < left)]),
        sampled=m,
        weight=jnp.where(whole, 1, left / jnp.asarray(m, dtype)).astype(dtype),
        count=jnp.where(whole, 0, left),
        tail=tail,
        chosen=pages,
        rest=None if chosen is None else rest,
    )


def _ranks(chosen: Int[Array, " h"], P: int, page: int, tail: Tail):
    """Which of P pages have keys of the tail that are in no chosen page; and the tail's ranks in those, in order.

    A chosen page lies on one side of the window and behind the sinks, so that what of it is not in the tail is seen by
    no row of the tile.
    """
    pages = jnp.sort(jnp.where(chosen < 0, P, chosen))
    ends = jnp.arange(P + 1) * page
    ranks = (ends - tail.begin).clip(0, tail.before) + (ends - tail.resume).clip(0, tail.count - tail.before)
    begin, end = (ranks[at.clip(max=P)].astype(jnp.int32) for at in (pages, pages + 1))
    rest = (ranks[1:] > ranks[:-1]) & ~(jnp.arange(P)[:, None] == pages[None]).any(1)
    return rest, (begin, end)


def _passing(rank: Int[Array, " m"], spans: tuple[Array, Array]) -> Int[Array, " m"]:
    """Ranks in the tail of ranks among its keys outside of the spans, which are in order."""

    def passed(rank, span):
        return jnp.where(rank >= span[0], rank + span[1] - span[0], rank), None

    return lax.scan(passed, rank, spans)[0]


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
    level = finite(lax.stop_gradient(logits.max(-1)))
    weights = jnp.exp(logits - level[..., None])
    multiple = jnp.where(jnp.arange(tile.keys.size) < tile.keys.size - tile.sampled, 1, tile.weight)
    scaled = weights * multiple[None, None]
    total = scaled.sum(-1)
    output = product("GRn,nE->GRE", scaled, value) / jnp.where(total > 0, total, 1)[..., None]
    return Weighted(output, total, weights, level, value)
