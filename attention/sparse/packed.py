"""Which pages a tile of queries reads where sequences are packed: those of its own segment, which is as if alone."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.masks import Mask
from attention.sparse.gathered import attend
from attention.sparse.odds import odds_of_pages
from attention.sparse.places import by_places
from attention.sparse.segments import alone, growing_boxes, sort
from attention.sparse.selection import Selection, choice, keys_of, read


def packed_tiles(
    rule: Selection,
    query: Float[Array, "G T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S E"],
    mask: Mask,
    limit: Float[Array, "G T"] | None,
    cap: Float[Array, ""] | None,
    *,
    certified: bool,
):
    """Outputs `G T E`, odds of what was not read `G T` (None unless certified), and the share of pages read.

    As `attention.sparse.chosen.chosen_tiles`, with the tokens sorted by segment.
    """
    (G, T, _), S, C = query.shape, mask.num_keys, rule.block_size
    R, P = min(rule.query_block, T), -(-S // C)
    order = sort(mask, rule.query_block)
    boxes = growing_boxes(key[order.key], order.start, C)
    key, value = key[order.key], value[order.key]
    query = query[:, order.query]
    limit = None if limit is None else limit[:, order.query]

    def tile(start):
        own = alone(order, mask, query, start, rule.query_block)
        box, count = own.boxes(boxes, C), own.length
        pages, there = read(rule, own.position, choice(rule, own.who, box, own.mask, cap), P, own.mask)
        keys = keys_of(pages, C)
        exists = jnp.repeat(there, C) & (keys < count)
        keys = (own.first + keys).clip(0, S - 1)
        shown = functools.partial(_shown, mask, order.query[own.at], order.key[keys], exists, own.mine)
        rows, bound = query[:, own.at], None if limit is None else limit[:, own.at]
        found = attend(rows, key[keys], value[keys], shown, cap, bound)
        against = jnp.zeros((G, R), query.dtype)
        if certified:
            whole = ((pages[:, None] == jnp.arange(P)[None]) & there[:, None]).any(0)
            reached = jnp.minimum(count, own.position + rule.query_block) if mask.causal else count
            dropped = (C * jnp.arange(P) < reached) & ~whole
            against = odds_of_pages(rows, found, box, C, dropped[None], cap)
        pages_read = jnp.where(jnp.arange(R) == 0, there.sum(), 0)
        return (jnp.moveaxis(found.output, 0, 1), against.T, pages_read), own.mine

    found = by_places(jax.checkpoint(tile), order.begins, R)
    output, against = (jnp.moveaxis(x[jnp.argsort(order.query)], 0, 1) for x in found[:2])
    share = found[2].sum() / (P * order.begins.sum())
    return output, against if certified else None, share


def _shown(mask: Mask, queries, keys, there, mine):
    """Which of the keys each row of a tile sees."""
    visible = mask.at(queries, keys)[0, 0]
    return visible & there[None, None] & mine[None, :, None]
