"""The logits of a tile, laid out with the keys first.

Every matrix product of attention and of its backward pass is then one of row-major operands without a transposed
tile (the five of a backward tile are K Q^T, V dO^T, P dO, dS Q and K^T dS), which is what CPU libraries are fastest
at; and a number a query, such as a maximum, spreads along the vector units.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.chunked.sizes import Tiling
from attention.exponential import unit
from attention.inputs import Inputs
from attention.logits import soft_capped
from attention.masks import slice_or_keep
from attention.rounding import product


def rows(x: Float[Array, "..."], tiling: Tiling, i, axis: int = -1) -> Float[Array, "..."]:
    """What belongs to query tile i, of an array with the queries along an axis."""
    return lax.dynamic_slice_in_dim(x, tiling.queries.start(i), tiling.queries.size, axis=axis)


def upright(x: Float[Array, "b k G R H"]) -> Float[Array, "b k H G R"]:
    """The transpose of a tile, with the queries last. (Of a tile: the same of a whole sequence leaves the caches.)"""
    return jnp.moveaxis(x, 4, 2)


def columns(x: Float[Array, "..."], tiling: Tiling, j, dtype: Any, axis: int = 2) -> Float[Array, "..."]:
    """What belongs to key tile j, of an array with the keys along an axis."""
    return lax.dynamic_slice_in_dim(x, tiling.keys.start(j), tiling.keys.size, axis=axis).astype(dtype)


def scores(query: Float[Array, "b k H G R"], key: Float[Array, "b k C H"]) -> Float[Array, "b k C G R"]:
    """K Q^T, of upright queries; also V dO^T."""
    return product("BKSH,BKHGT->BKSGT", key, query)


def shaped(scores: Float[Array, "b k C G R"], soft_cap, bias) -> Float[Array, "b k C G R"]:
    """Logits from scores: the soft cap, then the bias of the tile."""
    logits = soft_capped(scores, soft_cap)
    return logits if bias is None else logits + jnp.moveaxis(bias, (3, 4), (4, 2)).astype(logits.dtype)


def key_in_units(key: Float[Array, "b k C H"], part: Inputs) -> Float[Array, "b k C H"]:
    """The keys times `exponential.unit`, where no cap or bias comes between the scores and the logits."""
    return key * unit(key.dtype) if _plain(part) else key


def in_units(logits: Float[Array, "b k C G R"], part: Inputs) -> Float[Array, "b k C G R"]:
    """The logits times `exponential.unit`, unless the keys have seen to it."""
    return logits if _plain(part) else logits * unit(logits.dtype)


def _plain(inputs: Inputs) -> bool:
    return inputs.soft_cap is None and inputs.bias is None


def bias_tile(part: Inputs, tiling: Tiling, i, j) -> Float[Array, "b k g R C"] | None:
    """The bias of a tile, laid out as the caller gave it."""
    if part.bias is None:
        return None
    row, col = tiling.queries.start(i), tiling.keys.start(j)
    return slice_or_keep(slice_or_keep(part.bias, row, tiling.queries.size, 3), col, tiling.keys.size, 4)


def visible(part: Inputs, tiling: Tiling, i, j) -> Bool[Array, "b k C g R"]:
    """Which keys of tile j are seen from which queries of tile i, of those that no tile before has shown."""
    queries, keys = tiling.queries, tiling.keys
    seen = part.mask.tile_by_key(queries.start(i), queries.size, keys.start(j), keys.size)
    return seen & keys.owned(j).reshape(1, 1, -1, 1, 1) if keys.overlap else seen
