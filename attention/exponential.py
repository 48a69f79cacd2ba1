"""The exponential of a tile, which on a CPU costs as much as a fifth of its matrix products.

There, in float32, weights are powers of two: logits are scaled by log2(e), for nothing where the query can carry it,
and 2^y = 2^n 2^f with n the nearest integer to y takes one polynomial and an addition to the exponent's bits. Elsewhere
the exponential is the backend's own, which accelerators compute in hardware.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

DEGREE = 7  # of Taylor's polynomial of 2^f; its remainder on |f| <= 1/2 is under a tenth of a unit roundoff


def unit(dtype) -> float:
    """By what logits have to be multiplied before `power`."""
    return math.log2(math.e) if _in_binary(dtype) else 1.0


def power(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """e^(x / unit) for x <= 0, and exactly 0 at -inf.

    In powers of two, with u the unit roundoff: the relative error is at most 3 u (remainder 0.1 u; Horner's scheme,
    whose steps shrink by |f| ln 2 <= 0.35, 2 u; the scaling by 2^n is exact), and below 2^-126 the absolute error
    is at most 2^-126.
    """
    if not _in_binary(x.dtype):
        return jnp.exp(x)
    x = jnp.maximum(x, -127)  # there n = -127 and f = 0, whose bits are those of zero
    n = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    total = jnp.full_like(x, _coefficient(DEGREE))
    for i in reversed(range(DEGREE)):
        total = total * (x - n) + jnp.asarray(_coefficient(i), x.dtype)
    bits = lax.bitcast_convert_type(total, jnp.int32) + (n.astype(jnp.int32) << jnp.finfo(x.dtype).nmant)
    return lax.bitcast_convert_type(bits, x.dtype)


@jax.custom_jvp
def smooth_power(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`power`, with the derivative of what it approximates, to any order and in either mode."""
    return power(x)


@smooth_power.defjvp
def _smooth_power_jvp(primals, tangents):
    y = smooth_power(*primals)
    return y, y * (tangents[0] / unit(y.dtype))


def finite(level: Float[Array, "..."]) -> Float[Array, "..."]:
    """What to subtract from logits: their level, or 0 where that is -inf."""
    return jnp.where(jnp.isneginf(level), 0, level)


def _coefficient(i: int) -> float:
    return math.log(2) ** i / math.factorial(i)


def _in_binary(dtype) -> bool:
    return dtype == jnp.float32 and jax.default_backend() == "cpu"
