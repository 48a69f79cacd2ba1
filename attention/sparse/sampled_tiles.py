"""One key head and one tile of its queries after another, with a sample for each: the loop of `attention.Sampled`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt32

from attention.inputs import Inputs
from attention.sparse.rows import aligned
from attention.sparse.tail import Known, Rule, Tile, tile_at

Result = Callable[[Inputs, Tile, Known | None], Any]


def over_tiles(rule: Rule, inputs: Inputs, seed: UInt32[Array, " 2"], known: Known | None, result: Result) -> Any:
    """What `result` gives of each tile, whose arrays are `G R ...`, as `B K G T ...`.

    Tiles are counted from position 0, so that one more than fill T rows may hold them where the first is not known.
    """
    (B, K), T, C = inputs.query.shape[:2], inputs.mask.num_queries, rule.query_block
    moves = inputs.mask.offset is not None
    R = 1 if moves and T < C else min(C, T)

    def head(n):
        part, own = inputs.part(n // K, 1, n % K, 1), jax.tree.map(lambda x: x[n // K, n % K], known)
        offset = jnp.zeros((), jnp.int32) if part.mask.offset is None else part.mask.offset[0]
        shift = offset % R
        count = -(-(T + (R - 1 if moves else 0)) // R)
        first = jnp.arange(count) * R - shift
        each = jax.checkpoint(lambda row: result(part, tile_at(rule, part, seed, own, n, row, R, offset), own))
        tiles = lax.map(each, first)
        return jax.tree.map(lambda x: aligned(x, shift, T), tiles)

    found = lax.map(head, jnp.arange(B * K))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), found)


def chosen_by_row(tile: Tile) -> Int[Array, "1 R h"]:
    """The heavy pages that the tile has chosen, at each of its rows."""
    return jnp.broadcast_to(tile.chosen, (1, len(tile.at), tile.chosen.size))
