"""Rows that tiles have computed, cut to those that were asked for; and pages in blocks."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from attention.tiles import divisor


def aligned(tiles: Array, shift, T: int) -> Array:
    """The T rows from `shift` on, `G T ...`, of tiles after one another, `n G R ...`."""
    tiles = jnp.moveaxis(tiles, 1, 0)
    rows = tiles.reshape(tiles.shape[0], -1, *tiles.shape[3:])
    return lax.dynamic_slice_in_dim(rows, shift, T, axis=1)


def block(pages: int, page: int, keys: int) -> int:
    """The most keys, up to `keys` but at least a page, that are whole pages and of which all `pages` are a multiple."""
    return page * divisor(pages, keys // page)
