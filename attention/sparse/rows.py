"""Cutting queries into tiles of one size, of which the last is moved back to end with the last query."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def starts(T: int, R: int) -> Int[Array, " n"]:
    """The first query of each tile of R."""
    return jnp.minimum(jnp.arange(0, T, R), T - R)


def joined(tiles: Array, T: int) -> Array:
    """From `n G R ...`, the tiles at `starts`, to `G T ...`."""
    tiles = jnp.moveaxis(tiles, 1, 0)
    G, count, R = tiles.shape[:3]
    before = tiles[:, :-1].reshape(G, (count - 1) * R, *tiles.shape[3:])
    return jnp.concatenate([before, tiles[:, -1, count * R - T :]], axis=1)


def aligned(tiles: Array, shift, T: int) -> Array:
    """The T rows from `shift` on, `G T ...`, of tiles after one another, `n G R ...`."""
    tiles = jnp.moveaxis(tiles, 1, 0)
    rows = tiles.reshape(tiles.shape[0], -1, *tiles.shape[3:])
    return lax.dynamic_slice_in_dim(rows, shift, T, axis=1)
