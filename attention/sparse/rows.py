"""Cutting queries into tiles of one size, the last moved back to end with the last query, and pages into blocks."""

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


def block(pages: int, page: int, keys: int) -> int:
    """The most keys, up to `keys` but at least a page, that are whole pages and of which all `pages` are a multiple."""
    return page * divisor(pages, max(1, keys // page))


def divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is no more than another."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= most)
