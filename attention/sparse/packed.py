"""Which pages a tile of queries reads where sequences are packed: those of its own segment, which is as if alone."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.masks import Mask
from attention.sparse.gathered import attend
from attention.sparse.odds import odds_of_pages
from attention.sparse.segments import Sorted, growing_boxes, sort
from attention.sparse.selection import Selection, Tile, choice, keys_of, read

GROUP = 8  # places of a tile that are passed over at once where no tile begins


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

    As `attention.sparse.chosen.chosen_tiles`, with the tokens sorted by segment. There may be as many tiles as
    queries: of R places where one may begin, those are passed over where none does.
    """
    (G, T, _), S, C = query.shape, mask.num_keys, rule.block_size
    R, P = min(rule.query_block, T), -(-S // C)
    order = sort(mask, rule.query_block, C)
    boxes = growing_boxes(key[order.key], order.page, C)
    key, value = key[order.key], value[order.key]
    query = jnp.pad(query[:, order.query], ((0, 0), (0, R), (0, 0)))
    limit = None if limit is None else jnp.pad(limit[:, order.query], ((0, 0), (0, R)))

    def tile(start):
        rows = start + jnp.arange(R)
        at = rows.clip(0, T - 1)
        mine = (rows < T) & (order.tile[at] == order.tile[start])
        first, end = order.first[start], order.end[start]
        place = order.rank[start] // rule.query_block * rule.query_block
        alone = Mask(num_queries=T, num_keys=S, causal=mask.causal, window=mask.window, key_lengths=(end - first)[None])
        last = jnp.minimum(first + C * (jnp.arange(P) + 1), end) - 1
        box = boxes[last.clip(0, S - 1)]
        own = lax.dynamic_slice_in_dim(query, start, R, axis=1)
        who = Tile(rows, place, own[:, :1], jnp.ones(1, bool))
        if not mask.causal:
            exists = order.query[at] < (T if mask.query_lengths is None else mask.query_lengths[0])
            who = Tile(rows, place, own, mine & exists)
        pages, there = read(rule, place, choice(rule, who, box, alone, cap), P, alone)
        keys = first + keys_of(pages, C)
        shown = functools.partial(_shown, mask, order, at, keys, jnp.repeat(there, C) & (keys < end), mine)
        bound = None if limit is None else lax.dynamic_slice_in_dim(limit, start, R, axis=1)
        found = attend(own, *(x[keys.clip(0, S - 1)] for x in (key, value)), shown, cap, bound)
        against = jnp.zeros((G, R), query.dtype)
        if certified:
            whole = ((pages[:, None] == jnp.arange(P)[None]) & there[:, None]).any(0)
            reached = jnp.minimum(end - first, place + rule.query_block) if mask.causal else end - first
            dropped = (C * jnp.arange(P) < reached) & ~whole
            against = odds_of_pages(own, found, box, C, dropped[None], cap)
        return (jnp.moveaxis(found.output, 0, 1), against.T), mine, there.sum()

    empty = jnp.zeros((2 * R, G, value.shape[1]), query.dtype), jnp.zeros((2 * R, G), query.dtype)
    found, count = _by_places(jax.checkpoint(tile), order.begins, T, R, empty)
    back = jnp.argsort(order.query)
    output, against = (jnp.moveaxis(x[back], 0, 1) for x in found)
    share = count / (P * order.begins.sum())
    return output, against if certified else None, share


def _shown(mask: Mask, order: Sorted, at, keys, there, mine):
    """Which of the keys each row of a tile sees."""
    visible = mask.at(order.query[at], order.key[keys.clip(0, mask.num_keys - 1)])[0, 0]
    return visible & there[None, None] & mine[None, :, None]


def _by_places(tile, begins, T: int, R: int, nothing):
    """What tiles give at their rows, `T ...`, and the pages that all of them read together; 2 R rows have `nothing`.

    R places at a time: a tile that begins there ends within the next R, to which what it gives there is added.
    """
    count = -(-T // R)
    begins = jnp.pad(begins, (0, count * R - T)).reshape(count, R)
    empty = nothing, jnp.zeros((), jnp.int32)

    def places(i):
        offsets = jnp.nonzero(begins[i], size=-(-R // GROUP) * GROUP, fill_value=-1)[0].reshape(-1, GROUP)

        def one(carry, offset):
            return lax.cond(offset >= 0, lambda c: _placed(c, offset, *tile(i * R + offset)), lambda c: c, carry), None

        def group(carry, offsets):
            return lax.cond(offsets[0] >= 0, lambda c: lax.scan(one, c, offsets)[0], lambda c: c, carry), None

        return lax.scan(group, empty, offsets)[0]

    found, pages = lax.map(places, jnp.arange(count))
    return jax.tree.map(lambda x: _overlapped(x, R)[:T], found), pages.sum()


def _placed(carry, offset, found, mine, pages):
    """The rows of a tile at their places among 2 R."""

    def placed(old, new):
        before = lax.dynamic_slice_in_dim(old, offset, len(new))
        new = jnp.where(mine.reshape(-1, *[1] * (new.ndim - 1)), new, before)
        return lax.dynamic_update_slice_in_dim(old, new, offset, axis=0)

    return jax.tree.map(placed, carry[0], found), carry[1] + pages.astype(jnp.int32)


def _overlapped(x: Array, R: int) -> Array:
    """From `count 2R ...`, each shifted by R against the one before, their sum."""
    later = jnp.concatenate([jnp.zeros_like(x[:1, R:]), x[:-1, R:]])
    return (x[:, :R] + later).reshape(-1, *x.shape[2:])
