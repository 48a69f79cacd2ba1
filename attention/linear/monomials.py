"""The features of a polynomial kernel: every monomial once."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from attention.linear.state import Features


def query_features(q: Float[Array, "*N H"], a: Float[Array, "*N 1"], order: int) -> Features:
    """Features phi with phi(q, a).monomials(y) = u^-order T_order(q.y - a), u a power of two of about max|q| / 256.

    A common factor of a row's features cancels; u keeps them from overflowing where logits are huge.
    """
    largest = lax.stop_gradient(jnp.maximum(jnp.abs(q).max(-1, keepdims=True), jnp.abs(a)))
    unit = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(largest / 256, 1))))
    q, a, down = q / unit, a / unit, 1 / unit

    def shifted(rest: int) -> Array:  # u^-rest T_rest(-a)
        return sum(((-a) ** i * down ** (rest - i) / math.factorial(i) for i in range(rest + 1)), jnp.zeros_like(a))

    blocks = [block * shifted(order - d) for d, block in enumerate(monomials(q, order))]
    features = jnp.concatenate(blocks, axis=-1)
    return Features(features, jnp.zeros(features.shape[:-1], features.dtype))


def monomials(x: Float[Array, "*N H"], order: int) -> list[Array]:
    """x^a / sqrt(a!) for every multi-index a of degree d, one array `*N (H + d - 1 choose d)` for each d <= order.

    Monomials of one degree are ordered by their last variable, so that those without the variables from i on come
    first, and a degree is made of the one before by slices and products.
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
