"""What is kept of a page of keys and values: its means, and bounds on how far its keys and values are from them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.rounding import norms, product, product_roundoff, roundoff

RANK = 8  # of the basis of the sketch


class Moments(NamedTuple):
    """Pages of `size` consecutive keys. Every number but the means is an upper bound on the true one.

    With c the stored mean key, which is rounded, y_j = k_j - c, m the stored mean value and w_j = v_j - m:

    Attributes:
        key, value: c and m.
        radius: max |y_j|.
        spread: the largest eigenvalue of mean(y_j y_j^T).
        coupling: the spectral norm of mean(y_j w_j^T).
        width: max |v_j - v_first|, which two of the values are apart; a lower bound on their diameter.
        key_shift, value_shift: |mean(y_j)| and |mean(w_j)|, which rounding leaves.
        half: max_j |y_jh|, by entry.
        basis: nearly orthonormal vectors of the directions in which the keys spread most.
        across: max_j |(U^T y_j)_r|, by entry, for that basis U.
        rest: max_j |y_j - U U^T y_j|.
    """

    key: Float[Array, "*B P H"]
    value: Float[Array, "*B P E"]
    radius: Float[Array, "*B P"]
    spread: Float[Array, "*B P"]
    coupling: Float[Array, "*B P"]
    width: Float[Array, "*B P"]
    key_shift: Float[Array, "*B P"]
    value_shift: Float[Array, "*B P"]
    half: Float[Array, "*B P H"] | None = None
    basis: Float[Array, "*B P H r"] | None = None
    across: Float[Array, "*B P r"] | None = None
    rest: Float[Array, "*B P"] | None = None


def moments(key: Float[Array, "*B S H"], value: Float[Array, "*B S E"], size: int, *, bound: str = "ball") -> Moments:
    """The moments of all S // size whole pages, with what `bound` (ball, box or sketch) needs.

    Cost: 2 S H (H + E) operations for the second moments, 4 P H^2 (H + E) for their norms, and for the sketch
    8 S H RANK more; O(P (H + E)) memory is kept.
    """
    H, E = key.shape[-1], value.shape[-1]
    pages = key.shape[-2] // size
    key, value = (x[..., : pages * size, :].reshape(*x.shape[:-2], pages, size, x.shape[-1]) for x in (key, value))
    mean_key, mean_value = key.mean(-2), value.mean(-2)
    y, w = key - mean_key[..., None, :], value - mean_value[..., None, :]
    wide = outward(key.dtype, H + E + size)
    radius, depth = wide * norms(y).max(-1), wide * norms(w).max(-1)
    # What rounding makes of a second moment is at most this share of the product of the largest norms.
    lost = (size + 8) * product_roundoff(key.dtype)
    sums = (size + 8) * roundoff(key.dtype)  # of a mean, in units of the largest norm
    found = Moments(
        key=mean_key,
        value=mean_value,
        radius=radius,
        spread=wide * spectral(product("...sh,...si->...hi", y, y) / size) + lost * radius**2,
        coupling=wide * spectral(product("...sh,...se->...he", y, w) / size) + lost * radius * depth,
        width=widths(value),
        key_shift=sums * (wide * norms(mean_key) + radius),
        value_shift=sums * (wide * norms(mean_value) + depth),
    )
    if bound == "box":
        found = found._replace(half=wide * jnp.abs(y).max(-2))
    if bound == "sketch":
        basis = _basis(y)
        along = product("...sh,...hr->...sr", y, basis)
        rest = norms(y - product("...sr,...hr->...sh", along, basis))
        lost = H * product_roundoff(key.dtype)
        found = found._replace(
            basis=basis,
            across=wide * jnp.abs(along).max(-2) + lost * radius[..., None],
            rest=wide * rest.max(-1) + (H + RANK) * lost * radius,
        )
    return found


def widths(value: Float[Array, "*B C E"]) -> Float[Array, "*B"]:
    """Max |v_j - v_first| of each page, rounded inward: two of its values are so far apart."""
    wide = outward(value.dtype, value.shape[-1])
    return norms(value - value[..., :1, :]).max(-1) / wide


def outward(dtype, terms: int):
    """A factor above the relative error of a norm, or of a sum of positive numbers, with so many terms."""
    return 1 + 4 * (terms + 8) * roundoff(dtype)


def spectral(matrix: Float[Array, "*B H E"], squarings: int = 2) -> Float[Array, "*B"]:
    """An upper bound on the largest singular value, at most rank^(2^-(squarings + 1)) times too large, and rounding.

    sigma(M)^2 = sigma(M M^T) for each of the squarings, and sigma is at most the Frobenius norm of the last.
    """
    # Of matrices of Frobenius norm one: their entries are rounded, and so are the sums of their product.
    lost = 2 * (max(matrix.shape[-2:]) + 8) * product_roundoff(matrix.dtype)
    sizes = []
    for _ in range(squarings):
        matrix, size = _scaled(matrix)
        sizes.append(size)
        matrix = product("...he,...fe->...hf", matrix, matrix)
    bound = _scaled(matrix)[1]
    for size in reversed(sizes):
        bound = size * jnp.sqrt(bound + lost)
    return bound


def _scaled(matrix: Float[Array, "*B H E"]) -> tuple[Array, Array]:
    """The matrix with a Frobenius norm of one or a hair less, and by what it was divided."""
    entries = matrix.reshape(*matrix.shape[:-2], -1)
    size = norms(entries) * outward(matrix.dtype, entries.shape[-1])
    return matrix / jnp.where(size > 0, size, 1)[..., None, None], size


def _basis(y: Float[Array, "*B C H"]) -> Float[Array, "*B H r"]:
    """Nearly orthonormal: two steps of orthogonal iteration from the first unit vectors."""
    H = y.shape[-1]
    start = jnp.eye(H, min(RANK, H), dtype=y.dtype)
    basis = jnp.broadcast_to(start, (*y.shape[:-2], *start.shape))
    for _ in range(2):
        image = product("...sh,...sr->...hr", y, product("...sh,...hr->...sr", y, basis))
        scale = jnp.abs(image).max((-2, -1), keepdims=True)
        # The identity keeps a page of equal keys from giving no basis at all.
        basis = jnp.linalg.qr(image / jnp.where(scale > 0, scale, 1) + 1e-3 * basis)[0]
    return basis
