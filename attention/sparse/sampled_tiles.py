"""One key head and one tile of its queries after another, with a sample for each: the loop of `attention.Sampled`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from attention.inputs import Inputs
from attention.sparse import selection
from attention.sparse.pages import paged
from attention.sparse.places import by_places
from attention.sparse.rows import aligned
from attention.sparse.segments import Sorted, alone, growing_boxes
from attention.sparse.tail import Rule, Tile, tile_at


class Known(NamedTuple):
    """What is known of the pages of key heads: their boxes, and what the tile of the first query chose before it.

    With segments there is a box for each key, around what lies before it in its page.
    """

    box: Float[Array, "*B P X"]
    begun: Int[Array, "*B n"] | None


def known(inputs: Inputs, order: Sorted | None, page: int) -> Known:
    """Of whole sequences, `B K ...`."""
    if order is None:
        return Known(paged(inputs.key, inputs.value, page, inputs.mask.key_lengths).box, None)
    heads = jax.vmap(jax.vmap(lambda key, own: growing_boxes(key[own.key], own.start, page), (0, None)))
    return Known(heads(inputs.key, order), None)


def over_tiles(
    rule: Rule,
    inputs: Inputs,
    order: Sorted | None,
    seed: UInt32[Array, " 2"],
    pages: Known | None,
    result: Callable[[Inputs, Array, Tile, Array | None], Any],
) -> Any:
    """What `result(part, n, tile, box)` gives of each tile of key head n, `G R ...`, as `B K G T ...`."""
    B, K = inputs.query.shape[:2]

    def head(n):
        part, own = inputs.part(n // K, 1, n % K, 1), jax.tree.map(lambda x: x[n // K, n % K], pages)
        each = functools.partial(result, part, n)
        if order is None:
            return _in_turn(rule, part, seed, own, each)
        return _by_segments(rule, part, jax.tree.map(lambda x: x[n // K], order), seed, own, each)

    found = lax.map(head, jnp.arange(B * K))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), found)


def _in_turn(rule: Rule, part: Inputs, seed: Array, pages: Known | None, result):
    """Tiles are counted from position 0, so that one more than fill T rows may hold them where that is not known."""
    mask, query, C, T = part.mask, part.query[0, 0], rule.query_block, part.mask.num_queries
    moves = mask.offset is not None
    R = 1 if moves and T < C else min(C, T)
    offset = mask.offset[0] if moves else jnp.zeros((), jnp.int32)

    def tile(row):
        rows, start = row + jnp.arange(R), (row + offset) // C * C
        chosen = None
        if pages is not None:
            who = selection.choosers(query, mask, rows, start, offset)
            choice = functools.partial(_choice, rule, who, pages.box, mask, part.soft_cap)
            chosen = selection.unless_begun(pages.begun, who, offset, choice)
        found = tile_at(rule, mask, start, rows, seed, chosen, query.dtype)
        return result(found, None if pages is None else pages.box)

    count, shift = -(-(T + (R - 1 if moves else 0)) // R), offset % R
    tiles = lax.map(jax.checkpoint(tile), jnp.arange(count) * R - shift)
    return jax.tree.map(lambda x: aligned(x, shift, T), tiles)


def _by_segments(rule: Rule, part: Inputs, order: Sorted, seed: Array, pages: Known | None, result):
    """Tiles, pages and samples are counted from the first token of each segment, which is as if alone."""
    mask, query = part.mask, part.query[0, 0][:, order.query]

    def tile(start):
        own = alone(order, mask, query, start, rule.query_block)
        box = None if pages is None else own.boxes(pages.box, rule.page)
        chosen = None if box is None else _choice(rule, own.who, box, own.mask, part.soft_cap)
        found = tile_at(rule, own.mask, own.position, own.at, seed, chosen, query.dtype)
        keys = order.key[(own.first + found.keys).clip(0, mask.num_keys - 1)]
        found = found._replace(
            at=order.query[own.at],
            first=own.first,
            lead=order.key[own.first.clip(0, mask.num_keys - 1)],
            keys=keys,
            reads=found.reads & (found.keys < own.length),
        )
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), result(found, box)), own.mine

    found = by_places(jax.checkpoint(tile), order.begins, min(rule.query_block, mask.num_queries))
    return jax.tree.map(lambda x: jnp.moveaxis(x[jnp.argsort(order.query)], 0, 1), found)


def _choice(rule: Rule, who: selection.Tile, box, mask, cap) -> Int[Array, " h"]:
    return selection.choice(rule.selection(), who, box, mask, cap).astype(jnp.int32)


def chosen_by_row(tile: Tile) -> Int[Array, "1 R h"]:
    """The heavy pages that the tile has chosen, at each of its rows."""
    return jnp.broadcast_to(tile.chosen, (1, len(tile.at), tile.chosen.size))
