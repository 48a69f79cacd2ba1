"""What is kept of all keys and values of a head: means, and second moments by classes of |k - c|."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.monomials import monomials
from attention.rounding import norms, product, product_roundoff, roundoff
from attention.sparse.moments import outward, spectral
from attention.sparse.visible import spaced

CHUNK = 512  # keys, or rows, of a product
SHARES = (0.4, 0.7, 0.9, 0.99)  # of the keys, by their distance from c: where one class ends and the next begins
LOOKS = 2048  # keys by which that is decided
SQUARINGS = 6  # of the second moment of the values: its norm is then at most E^(1/128) too large


class Spread(NamedTuple):
    """All keys of a head, y = k - c and w = v - m; means are over all of them, or the sum over a class by their number.

    Attributes:
        key, value: c and m.
        second: mean(y y^T), a class after the other.
        coupling: mean(w y^T).
        third: mean(w (y y^T)), by monomials of degree 2; by none of them where it is not needed.
        traces: mean |y|^2 of each class.
        radii: max |y| of each class, or more.
        eigenvalue: the largest of mean(w w^T), or more.
        length: the root of mean |w|^2, or more.
        depth: max |w|, or more.
        key_shift, value_shift: |mean y| and |mean w|, which rounding leaves, or more.
        lost: the relative error of sums over keys, of their absolute values, or more.
    """

    key: Float[Array, "1 H"]
    value: Float[Array, "1 E"]
    second: Float[Array, "K H H"]
    coupling: Float[Array, "E H"]
    third: Float[Array, "M E"]
    traces: Float[Array, " K"]
    radii: Float[Array, " K"]
    eigenvalue: Float[Array, ""]
    length: Float[Array, ""]
    depth: Float[Array, ""]
    key_shift: Float[Array, ""]
    value_shift: Float[Array, ""]
    lost: Float[Array, ""]


def spread(key: Float[Array, "S H"], value: Float[Array, "S E"], seen: Bool[Array, " S"], degree: int) -> Spread:
    """The moments of the keys that are seen, which are the first ones; with third moments for degree 2.

    Cost: 2 S H ((classes + 1) H + E) + 2 S E^2 operations, and S E H (H + 1) for degree 2.
    """
    dtype, (S, H), E = key.dtype, key.shape, value.shape[1]
    total = seen.sum()
    count = jnp.maximum(total, 1).astype(dtype)
    centre, middle = (_centre(x, seen[:, None], count) for x in (key, value))
    y, w = jnp.where(seen[:, None], key - centre, 0), jnp.where(seen[:, None], value - middle, 0)
    distance, depth = lax.stop_gradient(norms(y)), lax.stop_gradient(norms(w)).max()
    some = jnp.sort(distance[spaced(total, min(LOOKS, S))])
    edges = some[jnp.array([int(share * len(some)) for share in SHARES])]
    its = (distance[:, None] > edges[None]).sum(1)[:, None] == jnp.arange(len(edges) + 1)[None]
    second, coupling, values, third = _sums(y, w, its, degree)
    # A term passes through the sums over the keys of a chunk and over the chunks.
    lost = (CHUNK + -(-S // CHUNK) + 8) * product_roundoff(dtype)
    wide = (1 + 2 * lost) * outward(dtype, CHUNK + -(-S // CHUNK) + H + E)
    traces, size = wide * jnp.trace(second, axis1=1, axis2=2) / count, wide * jnp.trace(values) / count
    u, radii = roundoff(dtype), wide * jnp.where(its, distance[:, None], 0).max(0)
    shifts = (
        2 * lost * x + (4 * u + lost**2) * norms(c)[0] for x, c in ((radii.max(), centre), (wide * depth, middle))
    )
    eigenvalue = spectral(values / count, SQUARINGS) + lost * size
    found = (centre, middle, second / count, coupling / count, third / count)
    return Spread(*found, traces, radii, eigenvalue, jnp.sqrt(size) * wide, wide * depth, *shifts, lost)


def _centre(x: Float[Array, "S H"], seen: Bool[Array, "S 1"], count) -> Float[Array, "1 H"]:
    """The mean of what is seen, and of what it leaves: then what rounding leaves is small beside the distances."""

    def mean(x):
        # A loop, since one sum over all would have no known depth.
        add = lambda total, part: (total + part.sum(0, keepdims=True), None)  # noqa: E731
        return lax.scan(add, jnp.zeros_like(x[:1]), split(jnp.where(seen, x, 0), CHUNK))[0] / count

    first = mean(x)
    return first + mean(x - first)


def _sums(y: Float[Array, "S H"], w: Float[Array, "S E"], its: Bool[Array, "S K"], degree: int):
    """The sums of y y^T by class, w y^T, w w^T, and of w by each monomial of y."""
    (H, E), K = (y.shape[1], w.shape[1]), its.shape[1]

    def add(total, part):
        y, w, its = part
        mine = jnp.where(its[:, :, None], y[:, None], 0).reshape(-1, K * H)
        found = product("SX,SH->XH", mine, y), product("SE,SH->EH", w, y), product("SE,SF->EF", w, w)
        return tuple(map(jnp.add, total, (*found, product("SM,SE->ME", features(y), w)))), None

    features = quadratic if degree == 2 else lambda y: y[:, :0]
    sizes = (K * H, H), (E, H), (E, E), (math.comb(H + 1, 2) if degree == 2 else 0, E)
    parts = tuple(split(x, CHUNK) for x in (y, w, its))
    found, _ = lax.scan(jax.checkpoint(add), tuple(jnp.zeros(size, y.dtype) for size in sizes), parts)
    return found[0].reshape(K, H, H), *found[1:]


def quadratic(x: Float[Array, "N H"]) -> Float[Array, "N M"]:
    """The monomials of degree 2, M = H (H + 1) / 2, of which those of two vectors have the product (x.y)^2 / 2."""
    return monomials(x, 2)[2]


def split(x: Array, size: int) -> Array:
    """The rows, `size` at a time, the last part filled up with zeros."""
    more = -len(x) % size
    return jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, size, *x.shape[1:])
