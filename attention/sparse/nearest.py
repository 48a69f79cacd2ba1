"""Polynomials near the exponential, p(x) = 1 + b x + a x^2 with |e^x - p(x)| <= E |x| on an interval around 0.

e^x = 1 + x f(x) with f(x) = (e^x - 1) / x, convex and growing, so that E is the largest |f(x) - b - a x|: the best
constant b on [-R, R] is the mean of f(R) and f(-R), the best line has the slope of f's secant and lies in the middle
between the secant and the tangent parallel to it. `docs/bounds.md` has the derivation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.rounding import roundoff

LEAST = 2.0**-10  # of the R that counts: below, f is 1 but for R
MOST = 8.0  # of the R for which a polynomial is chosen: beyond, none is near


class Line(NamedTuple):
    """What stands for f(x): offset b and slope a; a is 0, or at least 1 / 2, the slope of f at 0."""

    offset: Float[Array, "..."]
    slope: Float[Array, "..."]


def nearest(square: Float[Array, "..."], degree: int) -> Line:
    """The line for a polynomial of degree 1 or 2 on [-R, R], from R^2; smooth in R^2."""
    R = jnp.sqrt(jnp.clip(square, LEAST**2, MOST**2))
    upper, lower = _ends(R)
    if degree == 1:
        return Line((upper + lower) / 2, jnp.zeros_like(R))
    slope = jnp.maximum((upper - lower) / (2 * R), 0.5)
    return Line((upper - slope * R + _lowest(slope)[0]) / 2, slope)


def distance(line: Line, R: Float[Array, "..."], degree: int) -> Float[Array, "..."]:
    """E of a line for all |x| <= R, or more."""
    R = jnp.maximum(R, LEAST)
    upper, lower = _ends(R)
    # A convex function less a line is largest at an end.
    above = jnp.maximum(upper - line.slope * R, lower + line.slope * R) - line.offset
    lowest, where = (lower, 0) if degree == 1 else _lowest(line.slope)
    sizes = upper + jnp.abs(line.offset) + line.slope * (R + where)
    return jnp.maximum(above, line.offset - lowest) + 64 * roundoff(R.dtype) * sizes


def _ends(R: Float[Array, "..."]) -> tuple[Array, Array]:
    """The values of f at R and -R."""
    return jnp.expm1(R) / R, -jnp.expm1(-R) / R


def _lowest(slope: Float[Array, "..."]) -> tuple[Array, Array]:
    """No more than the least f(x) - a x, a >= 1 / 2, and where that is.

    For x >= 0, f(x) >= 1 + x / 2 + x^2 / 6 + x^3 / 24; for x < 0, f(x) - a x >= 1 + (1 / 2 - a) x >= 1 by convexity.
    """
    steep = slope - 0.5
    x = 4 * (jnp.sqrt(1 / 9 + steep / 2) - 1 / 3)
    return 1 + x * (-steep + x * (1 / 6 + x / 24)), x
