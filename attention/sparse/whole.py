"""Softmax attention to every key that is seen, in tiles: where there is nothing to leave out."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exact import softmax
from attention.exponential import unit
from attention.inputs import Inputs
from attention.logits import soft_capped
from attention.masks import slice_or_keep
from attention.rounding import product
from attention.sparse import kernel
from attention.sparse.online import across, added, begun, finished
from attention.sparse.plan import Limits
from attention.sparse.visible import visible_pages
from attention.tiles import Tiles

ROWS = 1024  # of a tile, over all heads that share their keys
BLOCK = 512  # keys of a product


def attended(part: Inputs, own: Limits, block: int) -> tuple[Float[Array, "G T E"], Float[Array, ""]]:
    """Softmax attention of one key head, and how many pairs of row and key its blocks have."""
    (G, T, _), dtype = part.query.shape[2:], part.query.dtype
    R = min(T, max(1, ROWS // G))
    columns = across(part.value[0, 0], dtype)

    def tile(row):
        at = row + jnp.arange(R)
        visible = visible_pages(part.mask, at, part.mask.num_keys // block, block)
        some, clear = visible.seen.any((1, 2)), visible.whole.all((1, 2))
        query = lax.dynamic_slice_in_dim(part.query[0, 0], row, R, axis=1).reshape(G * R, -1).T
        size = lax.dynamic_slice_in_dim(own.size, row, R, axis=1).reshape(-1)

        def with_blocks(found, blocks, *, masked: bool):
            order = jnp.nonzero(blocks, size=len(blocks), fill_value=0)[0]

            def add(i, found):
                col, shown = order[i] * block, None
                if masked:
                    shown = part.mask.tile_by_key(row, R, col, block)[0, 0]
                    shown = jnp.broadcast_to(shown, (block, G, R)).reshape(block, -1)
                raw = _logits(part, query, row, R, col, block)
                return added(found, size, raw, lax.dynamic_slice_in_dim(columns, col, block, axis=1), shown)

            return lax.fori_loop(0, blocks.sum(), add, found)

        found = with_blocks(begun(size, len(columns)), some & clear, masked=False)
        if not part.mask.uses_everything or part.mask.causal or part.mask.window is not None:
            found = with_blocks(found, some & ~clear, masked=True)
        output, _ = finished(found)
        return output.reshape(G, R, -1), some.sum().astype(dtype) * (block * G * R)

    output, pairs = lax.map(tile, Tiles(T, R).starts)
    return Tiles(T, R).join(output, 1), pairs.sum()


def by_kernel(part: Inputs, fits: Bool[Array, "G T"] | None) -> tuple[Float[Array, "G T E"], Float[Array, ""]]:
    """The same by the kernel in C; `fits` says which rows in 16 bits."""
    (G, T), S = part.query.shape[2:4], part.mask.num_keys
    output, _ = kernel.read(part, jnp.ones((1, 1, T), bool), S, kernel.fitting(part, fits))
    return output, jnp.asarray(G * T * S, output.dtype)


def defined(part: Inputs, rows: int) -> Float[Array, "G T E"]:
    """The same with a derivative, for tiles of `rows` that divide the queries."""

    def tile(row):
        weights = softmax(part.masked_scores(row, rows, 0, part.mask.num_keys)[0, 0])
        return product("GTS,SE->GTE", weights, part.value[0, 0].astype(weights.dtype))

    tiles = Tiles(part.mask.num_queries, rows)
    return tiles.join(lax.map(jax.checkpoint(tile), tiles.starts), 1)


def _logits(part: Inputs, query: Float[Array, "H N"], row, rows: int, col, cols: int) -> Float[Array, "C N"]:
    """The logits of a block in units of `exponential.unit`."""
    key = lax.dynamic_slice_in_dim(part.key[0, 0], col, cols).astype(query.dtype)
    plain = part.soft_cap is None and part.bias is None
    raw = soft_capped(product("SH,HN->SN", key * unit(key.dtype) if plain else key, query), part.soft_cap)
    if plain:
        return raw
    if part.bias is not None:
        bias = slice_or_keep(slice_or_keep(part.bias, row, rows, 3), col, cols, 4)[0, 0]
        bias = jnp.broadcast_to(bias, (part.query.shape[2], rows, cols)).astype(raw.dtype)
        raw = raw + jnp.moveaxis(bias, 2, 0).reshape(cols, -1)
    return raw * unit(raw.dtype)
