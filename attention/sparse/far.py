"""All keys of a head at once, where that is provably enough: their moments up to the second, and a few rows exactly.

With c the mean key, w_j = v_j - m the values about theirs, x_j = q.(k_j - c) and T(x) = 1 + x + x^2 / 2,

    o = m + sum_j T(x_j) w_j / sum_j T(x_j),

of which T(x) is an inner product of the monomials of q and of k - c, summed over the keys once for all queries. Then

    |error| <= mean x^2 (e^R - T(R)) / R^2 max|w_j - (o - m)| / mean e^x + rounding,    R >= max|x_j|,

and mean e^x >= e^{mean x} = 1 but for rounding; `docs/bounds.md` has the derivation. Rows whose bound is above the
tolerance read every key.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exponential import smooth_power, unit
from attention.inputs import Inputs
from attention.monomials import monomials
from attention.rounding import norms, product, product_roundoff, roundoff, sees_any
from attention.sparse.moments import outward
from attention.sparse.plan import Limits
from attention.sparse.reading import Head

CHUNK = 512  # keys, or rows, whose monomials are made at once
ROWS = 128  # of those that read every key, at once
SHARE = 1 / 16  # of the rows that may do so


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


def alike(inputs: Inputs) -> bool:
    """Whether every query of a head that sees any keys sees the same, and all that counts of these is their logits."""
    mask = inputs.mask
    regular = mask.dense is None and inputs.bias is None and inputs.soft_cap is None
    unbanded = not mask.causal and mask.window is None
    return regular and unbanded and mask.query_segments is None and mask.key_segments is None


def pays(inputs: Inputs) -> bool:
    """Whether every query sees the same keys, and these are so many that their monomials are at most half the work."""
    keys, (H, T) = inputs.mask.num_keys, (inputs.query.shape[-1], inputs.query.shape[-2])
    return alike(inputs) and T * keys >= 2 * math.comb(H + 2, 2) * (T + keys)


def attended(head: Head, own: Limits, by_pages: Callable[[], Any], *, tolerance: float, defined: bool):
    """What `by_pages` gives, from all keys at once where few rows have to read them.

    Cost: where it is done, 2 M (E + 1) operations for each query and each key, M = (H + 2 choose 2); to find that it
    is not, 2 H^2 of them.

    Args:
        head: what its queries read from.
        own: the limits of its queries.
        by_pages: gives output, error bound, dropped mass, and the numbers of blocks read and seen of each tile.
        tolerance: of the error, in units of the diameter of the values.
        defined: whether it takes a form that has a derivative.
    """
    part, (G, T, H) = head.part, head.part.query.shape[2:]
    query = part.query[0, 0].reshape(-1, H)
    key, value = part.key[0, 0].astype(query.dtype), head.across[:-1].T
    seen = jnp.arange(len(key)) < (len(key) if part.mask.key_lengths is None else part.mask.key_lengths[0])
    rows = jnp.broadcast_to(sees_any(part.mask)[0, 0], (G, T)).reshape(-1)
    page = len(key) // len(head.pages.width)
    whole = (jnp.arange(len(head.pages.width)) + 1) * page <= seen.sum()
    width = jnp.where(whole, head.pages.width, 0).max()
    budget = tolerance * width - own.rounding.reshape(-1)
    known = spread(key, value, seen)

    def bound(away):
        return lax.stop_gradient(error_bound(query, known, away, len(key)))

    def by_moments():
        found = polynomial(query, key, value, seen, known)
        error = bound(norms(found - known.value))
        wrong = rows & ~(error <= budget)
        mend = mended_by_definition if defined else mended
        found = mend(query, found, wrong, lambda some: exactly(some, key, head.across, seen))
        error = jnp.where(wrong, 0, error) + own.rounding.reshape(-1)
        shape = jax.eval_shape(by_pages)[3].shape
        read, might = jnp.full(shape, wrong.mean(dtype=query.dtype)), jnp.ones(shape, query.dtype)
        found = jnp.where(rows[:, None], found, 0).reshape(G, T, -1)
        return found, error.reshape(G, T), 1 - wrong.astype(query.dtype).reshape(G, T), read, might

    # To first order |o - m| is |coupling q|; the rest is a guess, on which no bound relies.
    guess = norms(product("NH,EH->NE", query, known.coupling)) + known.depth * _square(query, known)
    wrong = rows & ~(bound(guess) <= budget)
    return lax.cond(wrong.mean() <= SHARE, by_moments, by_pages)


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


def polynomial(query: Float[Array, "N H"], key, value, seen: Bool[Array, " S"], known: All) -> Float[Array, "N E"]:
    """o: the monomials of `CHUNK` keys at a time, and then of as many rows."""
    seen = seen[:, None]
    columns = jnp.where(seen, jnp.concatenate([value - known.value, jnp.ones_like(value[:, :1])], axis=1), 0)
    y = jnp.where(seen, key - known.key, 0)

    def add(total, part):
        return total + product("SM,SF->MF", _features(part[0]), part[1]), None

    def rows(part):
        found = product("NM,MF->NF", _features(part), sums)
        return known.value + found[:, :-1] / jnp.where(found[:, -1:] > 0, found[:, -1:], 1)

    nothing = jnp.zeros((math.comb(y.shape[1] + 2, 2), columns.shape[1]), y.dtype)
    sums, _ = lax.scan(jax.checkpoint(add), nothing, (_split(y, CHUNK), _split(columns, CHUNK)))
    return lax.map(jax.checkpoint(rows), _split(query, CHUNK)).reshape(-1, value.shape[1])[: len(query)]


def _features(x: Float[Array, "N H"]) -> Float[Array, "N M"]:
    return jnp.concatenate(monomials(x, 2), axis=-1)


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
