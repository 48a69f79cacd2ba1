"""One tile after another where these may begin anywhere, as where sequences are packed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

GROUP = 8  # places of a tile that are passed over at once where no tile begins


def by_places(tile: Callable[[Array], tuple[Any, Bool[Array, " R"]]], begins: Bool[Array, " T"], R: int) -> Any:
    """What tiles give at their rows, `T ...`.

    There may be as many tiles as rows. R places are taken at a time: a tile that begins there ends within the next R,
    to which what it gives there is added; places where none begins are passed over.

    Args:
        tile: from where it begins to what it gives at R rows, `R ...`, and which of these are its own.
        begins: where tiles begin.
        R: rows of a tile.
    """
    T = len(begins)
    count = -(-T // R)
    begins = jnp.pad(begins, (0, count * R - T)).reshape(count, R)
    shapes = jax.eval_shape(tile, jax.ShapeDtypeStruct((), jnp.int32))[0]
    empty = jax.tree.map(lambda x: jnp.zeros((2 * R, *x.shape[1:]), x.dtype), shapes)

    def places(i):
        offsets = jnp.nonzero(begins[i], size=-(-R // GROUP) * GROUP, fill_value=-1)[0].reshape(-1, GROUP)

        def one(carry, offset):
            return lax.cond(offset >= 0, lambda c: _placed(c, offset, *tile(i * R + offset)), lambda c: c, carry), None

        def group(carry, offsets):
            return lax.cond(offsets[0] >= 0, lambda c: lax.scan(one, c, offsets)[0], lambda c: c, carry), None

        return lax.scan(group, empty, offsets)[0]

    found = lax.map(places, jnp.arange(count))
    return jax.tree.map(lambda x: _overlapped(x, R)[:T], found)


def _placed(carry, offset, found, mine):
    """The rows of a tile at their places among 2 R."""

    def placed(old, new):
        before = lax.dynamic_slice_in_dim(old, offset, len(new))
        new = jnp.where(mine.reshape(-1, *[1] * (new.ndim - 1)), new, before)
        return lax.dynamic_update_slice_in_dim(old, new, offset, axis=0)

    return jax.tree.map(placed, carry, found)


def _overlapped(x: Array, R: int) -> Array:
    """From `count 2R ...`, each shifted by R against the one before, their sum."""
    later = jnp.concatenate([jnp.zeros_like(x[:1, R:]), x[:-1, R:]])
    return (x[:, :R] + later).reshape(-1, *x.shape[2:])
