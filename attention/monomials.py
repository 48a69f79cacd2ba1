"""The features of a polynomial kernel: every monomial once."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def monomials(x: Float[Array, "*N H"], order: int) -> list[Array]:
    """x^a / sqrt(a!) for every multi-index a of degree d, one array `*N (H + d - 1 choose d)` for each d <= order.

    (x.y)^d / d! is the product of the blocks of degree d of x and of y. Monomials of one degree are ordered by their
    last variable, so that those without the variables from i on come first, and a degree is made of the one before by
    slices and products.
    """
    H = x.shape[-1]
    blocks = [jnp.ones((*x.shape[:-1], 1), x.dtype)]
    for d in range(1, order + 1):
        below = blocks[-1]
        parts = [below[..., : math.comb(i + d - 1, d - 1)] * x[..., i : i + 1] for i in range(H)]
        blocks.append(jnp.concatenate(parts, axis=-1))
    ones = (1,) * (x.ndim - 1)
    weights = (w.astype(x.dtype).reshape(*ones, -1) for w in _weights(H, order))
    return [block * weight for block, weight in zip(blocks, weights, strict=True)]


@functools.lru_cache
def _weights(H: int, order: int) -> tuple[np.ndarray, ...]:
    """1 / sqrt(a!) of every monomial, in the order of `monomials`."""
    factorial, last, run = np.ones(1), np.full(1, -1), np.zeros(1)
    found = [factorial]
    for d in range(1, order + 1):
        sizes = [math.comb(i + d - 1, d - 1) for i in range(H)]
        runs = [np.where(last[:n] == i, run[:n] + 1, 1) for i, n in enumerate(sizes)]
        factorial = np.concatenate([factorial[:n] * more for n, more in zip(sizes, runs, strict=True)])
        last, run = np.repeat(np.arange(H), sizes), np.concatenate(runs)
        found.append(factorial)
    return tuple(1 / np.sqrt(a) for a in found)
