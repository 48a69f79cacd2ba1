"""The outputs of `attention.sparse.far`: by polynomials, and exactly for the rows that need it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exponential import smooth_power, unit
from attention.rounding import product
from attention.sparse.nearest import Line, nearest
from attention.sparse.spread import Spread, quadratic, split

ROWS = 128  # of those that read every key, at once


class Row(NamedTuple):
    """Rows by a polynomial.

    Attributes:
        away: the output less m.
        line: their polynomials.
        squares: the sums of x^2 over each class of keys, by the number of all keys.
    """

    away: Float[Array, "N E"]
    line: Line
    squares: Float[Array, "N K"]


def evaluated(query: Float[Array, "N H"], known: Spread, scale: Float[Array, ""], degree: int) -> Row:
    """Means over the keys with weights p(x) = 1 + b x + a x^2; `scale` is by how much R^2 exceeds |q|^2 mean |y|^2."""
    (K, H), E = known.second.shape[:2], known.coupling.shape[0]
    columns = jnp.concatenate([known.second.reshape(K * H, H), known.coupling])
    moved = product("NH,XH->NX", query, columns)
    squares = (moved[:, : K * H].reshape(-1, K, H) * query[:, None]).sum(-1)
    mean_square = jnp.trace(known.second, axis1=1, axis2=2).sum()
    line = nearest(scale * mean_square * (query * query).sum(-1), degree)
    away = line.offset[:, None] * moved[:, -E:]
    if degree == 2:
        away = away + (2 * line.slope)[:, None] * product("NM,ME->NE", quadratic(query), known.third)
    return Row(away / (1 + line.slope * squares.sum(-1))[:, None], line, squares)


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

    found = lax.map(jax.checkpoint(tile), tuple(split(x, ROWS) for x in (query, outputs, wrong)))
    return found.reshape(-1, outputs.shape[-1])[: len(query)]
