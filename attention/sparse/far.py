"""All keys of a head at once, where that is provably enough: their moments up to the second, and a few rows exactly.

With c the mean key, w_j = v_j - m the values about theirs, x_j = q.(k_j - c) and T(x) = 1 + x + x^2 / 2,

    o = m + sum_j T(x_j) w_j / sum_j T(x_j),

of which T(x) is an inner product of the monomials of q and of k - c, summed over the keys once for all queries. Then

    |error| <= mean x^2 (e^R - T(R)) / R^2 max|w_j - (o - m)| / mean e^x + rounding,    R >= max|x_j|,

and mean e^x >= e^{mean x} = 1 but for rounding; `docs/bounds.md` has the derivation. Rows whose bound is above the
tolerance read every key.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.inputs import Inputs
from attention.rounding import norms, product, product_roundoff, roundoff, sees_any
from attention.sparse.moments import outward
from attention.sparse.online import across
from attention.sparse.plan import Limits
from attention.sparse.polynomial import CHUNK, exactly, mended, mended_by_definition, polynomial
from attention.sparse.visible import alike, first_keys, first_rows, spaced

SHARE = 1 / 16  # of the rows that may read every key
LOOKS = 2048  # rows, and keys, by which that is predicted


class All(NamedTuple):
    """What is kept of all keys of a head; of the last three numbers each is an upper bound on the true one.

    Attributes:
        key, value: c and m.
        second: mean(y y^T), y = k - c.
        coupling: mean(w y^T).
        radius, depth: max |y_j| and max |w_j|.
        shift: |mean y|, which rounding leaves.
    """

    key: Float[Array, "1 H"]
    value: Float[Array, "1 E"]
    second: Float[Array, "H H"]
    coupling: Float[Array, "E H"]
    radius: Float[Array, ""]
    depth: Float[Array, ""]
    shift: Float[Array, ""]


def pays(inputs: Inputs) -> bool:
    """Whether every query sees the same keys, and these are so many that their monomials are at most half the work."""
    keys, (H, T) = inputs.mask.num_keys, (inputs.query.shape[-1], inputs.query.shape[-2])
    return alike(inputs) and T * keys >= 2 * math.comb(H + 2, 2) * (T + keys)


def enough(part: Inputs, own: Limits, width: Float[Array, ""], tolerance: float) -> Bool[Array, ""]:
    """Whether few rows of a key head seem to have a bound above tolerance * `width`, by some rows and keys."""
    query, key, value, seen, _ = _operands(part)
    rows, keys = spaced(first_rows(part), max(1, LOOKS // part.query.shape[2])), spaced(first_keys(part), LOOKS)
    query, rounding = (x.reshape(*part.query.shape[2:4], -1)[:, rows] for x in (query, own.rounding))
    query, rounding, total = query.reshape(-1, query.shape[-1]), rounding.reshape(-1), len(key)
    known = spread(key[keys], value[keys], seen[keys])
    # To first order |o - m| is |coupling q|; the rest is a guess, on which no bound relies.
    guess = norms(product("NH,EH->NE", query, known.coupling)) + known.depth * _square(query, known)
    error = error_bound(query, known, guess, total)
    return jnp.mean(~(error <= tolerance * width - rounding)) <= SHARE


def attended(part: Inputs, own: Limits, width: Float[Array, ""], *, tolerance: float, defined: bool):
    """Output, error bound and replaced mass of all rows, and the share of them that read every key.

    Cost: 2 M (E + 1) operations for each query and each key, M = (H + 2 choose 2).

    Args:
        part: the operands of a key head.
        own: the limits of its queries.
        width: no more than the diameter of its values.
        tolerance: of the error, in units of the diameter of the values.
        defined: whether it takes a form that has a derivative.
    """
    (G, T), (query, key, value, seen, rows) = part.query.shape[2:4], _operands(part)
    known = spread(key, value, seen)
    found = polynomial(query, key, value, seen, known.key, known.value)
    error = lax.stop_gradient(error_bound(query, known, norms(found - known.value), len(key)))
    wrong = rows & ~(error <= tolerance * width - own.rounding.reshape(-1))
    columns = across(value, query.dtype)
    mend = mended_by_definition if defined else mended
    found = mend(query, found, wrong, lambda some: exactly(some, key, columns, seen))
    error = jnp.where(wrong, 0, error) + own.rounding.reshape(-1)
    found = jnp.where(rows[:, None], found, 0).reshape(G, T, -1)
    mass = (~wrong).astype(query.dtype)
    return found, error.reshape(G, T), mass.reshape(G, T), wrong.mean(dtype=query.dtype)


def _operands(part: Inputs):
    """Queries, keys and values of a head, which keys are seen, and which queries see any."""
    (G, T, H), dtype = part.query.shape[2:], part.query.dtype
    query, key, value = part.query[0, 0].reshape(-1, H), part.key[0, 0].astype(dtype), part.value[0, 0].astype(dtype)
    rows = jnp.broadcast_to(sees_any(part.mask)[0, 0], (G, T)).reshape(-1)
    return query, key, value, jnp.arange(len(key)) < first_keys(part), rows


def spread(key: Float[Array, "S H"], value: Float[Array, "S E"], seen: Bool[Array, " S"]) -> All:
    """The means of the keys that are seen, and how far these are from them."""
    dtype, (S, H) = key.dtype, key.shape
    count, seen = jnp.maximum(seen.sum(), 1).astype(dtype), seen[:, None]
    centre, middle = (jnp.where(seen, x, 0).sum(0, keepdims=True) / count for x in (key, value))
    y, w = jnp.where(seen, key - centre, 0), jnp.where(seen, value - middle, 0)
    wide = outward(dtype, S + H + value.shape[1])
    radius = wide * norms(y).max()
    shift = (S + 8) * roundoff(dtype) * (wide * norms(centre)[0] + radius)
    second, coupling = product("SH,SI->HI", y, y) / count, product("SE,SH->EH", w, y) / count
    return All(centre, middle, second, coupling, radius, wide * norms(w).max(), shift)


def error_bound(query: Float[Array, "N H"], known: All, away: Float[Array, "*N"], keys: int) -> Float[Array, " N"]:
    """A bound on the error of rows whose outputs are `away` from m, beside what rounding does to exact attention."""
    dtype, (H, E) = query.dtype, (query.shape[-1], known.value.size)
    u, tiny, M = roundoff(dtype), float(jnp.finfo(dtype).tiny), math.comb(H + 2, 2)
    length = norms(query) * outward(dtype, H)
    R = length * known.radius * outward(dtype, H)
    # A term passes through sums over monomials, over the keys of a chunk and the chunks. What rounding makes of T(x)
    # is at most this share of T(R), since |q^a y^a| add up to T(|q| |y|).
    lost = (M + CHUNK + -(-keys // CHUNK)) * product_roundoff(dtype) + 32 * u
    lost = lost / (1 - jnp.minimum(lost, 0.5))
    square = (_square(query, known) + lost * R**2) * outward(dtype, H)
    vanished = 8 * tiny * M * ((1 + length) * (1 + known.radius)) ** 2
    share = jnp.maximum(square, 0) * _remainder(R) + lost * (1 + R + R**2 / 2) + vanished
    distance = (known.depth + away) * outward(dtype, E) + tiny
    return 1.001 * distance * share * jnp.exp(length * known.shift) + 8 * u * norms(known.value)[0]


def _square(query: Float[Array, "N H"], known: All) -> Float[Array, " N"]:
    """The mean of x^2 over the keys."""
    return (product("NH,HI->NI", query, known.second) * query).sum(-1)


def _remainder(R: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """(e^R - 1 - R - R^2 / 2) / R^2 or more: R / 6 / (1 - R / 4) for small R, where each term of the series is at most
    R / 4 of the one before; beyond R = 1 the difference loses less than 20 times its operands' relative error.
    """
    near = jnp.minimum(R, 1)
    return 1.001 * jnp.where(R < 1, near / 6 / (1 - near / 4), (jnp.exp(R) - 1 - R - R**2 / 2) / jnp.maximum(R, 1) ** 2)
