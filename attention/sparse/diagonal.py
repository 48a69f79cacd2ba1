"""The keys around the diagonal: where attention is causal, every tile of queries reads those up to its own end.

They are read before the plan of the tile is made, in one product and under the mask, so that what they add up to is
known to the plan, and no mean of part of a page is needed. Which they are is a matter of places alone. Elsewhere there
are none.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.exponential import unit
from attention.inputs import Inputs
from attention.masks import Mask
from attention.rounding import product
from attention.sparse.online import Partial, added


def keys(mask: Mask, rows: int, page: int) -> int:
    """How many keys a tile of `rows` reads in any case: whole pages that hold those of its own places."""
    if not mask.causal:
        return 0
    aligned = mask.offset is None and rows % page == 0
    most = rows if aligned else rows + page - 1
    return min(-(-most // page) * page, mask.num_keys)


def first(mask: Mask, row: Int[Array, "*T"], rows: int, page: int) -> Int[Array, "*T"]:
    """The first of these keys, for the tile that begins at `row`."""
    end = row + rows if mask.offset is None else row + rows + mask.offset[0]
    return (-(-end // page) * page - keys(mask, rows, page)).clip(0, mask.num_keys - keys(mask, rows, page))


def among(mask: Mask, at: Int[Array, " T"], rows: int, pages: int, page: int) -> Bool[Array, "P 1 T"]:
    """Whether a page is of these keys, for queries of any tiles."""
    start = first(mask, at // rows * rows, rows, page)[None]
    place = page * jnp.arange(pages)[:, None]
    return ((place >= start) & (place < start + keys(mask, rows, page)))[:, None]


def read(
    begun: Partial,
    part: Inputs,
    across: Float[Array, "F S"],
    query: Float[Array, "H N"],
    size,
    row,
    rows: int,
    page: int,
) -> Partial:
    """What has begun, with these keys, for the tile of `rows` that begins at `row`: `query` has those of all heads."""
    many, start = keys(part.mask, rows, page), first(part.mask, row, rows, page)
    key = lax.dynamic_slice_in_dim(part.key[0, 0], start, many).astype(query.dtype)
    raw = product("SH,HN->SN", key * unit(key.dtype), query)
    shown = part.mask.tile_by_key(row, rows, start, many)[0, 0]
    shown = jnp.broadcast_to(shown, (many, part.query.shape[2], rows)).reshape(many, -1)
    return added(begun, size, raw, lax.dynamic_slice_in_dim(across, start, many, axis=1), shown)
