"""The outputs of `attention.sparse.far`: by polynomials of second order, and exactly for the few rows that need it."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exponential import smooth_power, unit
from attention.monomials import monomials
from attention.rounding import product

CHUNK = 512  # keys, or rows, whose monomials are made at once
ROWS = 128  # of those that read every key, at once


def polynomial(query: Float[Array, "N H"], key, value, seen: Bool[Array, " S"], centre, middle) -> Float[Array, "N E"]:
    """Outputs around a key and a value, `1 H` and `1 E`: the monomials of `CHUNK` keys or rows at a time."""
    seen = seen[:, None]
    columns = jnp.where(seen, jnp.concatenate([value - middle, jnp.ones_like(value[:, :1])], axis=1), 0)
    y = jnp.where(seen, key - centre, 0)

    def add(total, part):
        return total + product("SM,SF->MF", _features(part[0]), part[1]), None

    def rows(part):
        found = product("NM,MF->NF", _features(part), sums)
        return middle + found[:, :-1] / jnp.where(found[:, -1:] > 0, found[:, -1:], 1)

    nothing = jnp.zeros((math.comb(y.shape[1] + 2, 2), columns.shape[1]), y.dtype)
    sums, _ = lax.scan(jax.checkpoint(add), nothing, (_split(y, CHUNK), _split(columns, CHUNK)))
    return lax.map(jax.checkpoint(rows), _split(query, CHUNK)).reshape(-1, value.shape[1])[: len(query)]


def _features(x: Float[Array, "N H"]) -> Float[Array, "N M"]:
    return jnp.concatenate(monomials(x, 2), axis=-1)


def exactly(query: Float[Array, "R H"], key: Float[Array, "S H"], across: Float[Array, "F S"], seen) -> Array:
    """Softmax over all keys that are seen, `R E`."""
    logits = product("SH,RH->SR", key * unit(key.dtype), query)
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    top = lax.stop_gradient(jnp.where(seen.any(), logits.max(0), 0))
    sums = product("FS,SR->FR", across, smooth_power(logits - top[None]))
    return (sums[:-1] / jnp.where(sums[-1:] > 0, sums[-1:], 1)).T


def mended(query, outputs, wrong: Bool[Array, " N"], read: Callable[[Array], Array]) -> Float[Array, "N E"]:
    """The outputs, with the rows that are wrong read exactly, as many at a time as `ROWS`."""
    N = len(query)
    order = jnp.nonzero(wrong, size=N, fill_value=N)[0]
    order = jnp.concatenate([order, jnp.full((ROWS,), N)])

    def some(i, outputs):
        rows = lax.dynamic_slice_in_dim(order, i * ROWS, ROWS)
        return outputs.at[rows].set(read(query[rows.clip(0, N - 1)]), mode="drop")

    return lax.fori_loop(0, -(-wrong.sum() // ROWS), some, outputs)


def mended_by_definition(query, outputs, wrong: Bool[Array, " N"], read: Callable[[Array], Array]):
    """The same, with a derivative."""

    def tile(part):
        query, outputs, wrong = part
        exact = lax.cond(wrong.any(), lambda: read(query), lambda: outputs)
        return jnp.where(wrong[:, None], exact, outputs)

    found = lax.map(jax.checkpoint(tile), tuple(_split(x, ROWS) for x in (query, outputs, wrong)))
    return found.reshape(-1, outputs.shape[-1])[: len(query)]


def _split(x: Array, size: int) -> Array:
    """The rows, `size` at a time, the last part filled up with zeros."""
    more = -len(x) % size
    return jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, size, *x.shape[1:])
