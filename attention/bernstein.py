"""How far a mean of independent vectors may be from its expectation, by their mean squared length."""

import math

import jax.numpy as jnp
from jaxtyping import Array


def vector_deviation(moment, most, m: int, *, failure: float, moment_failure: float) -> Array:
    r"""|mean of m draws - expectation| of vectors no longer than `most`, from the root of their mean squared length.

        g + sqrt(g^2 + 2 s^2 L / m),    g = 2 most L / (3 m),    L = ln(2 / failure),
        s = h + sqrt(h^2 + moment^2),   h^2 = most^2 ln(1 / moment_failure) / (2 m),

    where s is above the root of the expected squared length but for `moment_failure`, and the whole is a bound but for
    both: an empirical Bernstein bound.

    References:
        Pinelis, "Optimum bounds for the distributions of martingales in Banach spaces", Ann. Probab. 22 (1994),
        theorem 3.4; Maurer, "A bound on the deviation probability for sums of non-negative random variables",
        JIPAM 4 (2003), theorem 2.1.
    """
    L = math.log(2 / failure)
    h, g = most * math.sqrt(math.log(1 / moment_failure) / (2 * m)), most * (2 * L / (3 * m))
    return g + length(g, math.sqrt(2 * L / m) * (h + length(h, moment)))


def length(x, y) -> Array:
    """Root of x^2 + y^2, for numbers whose squares overflow or vanish."""
    high, low = jnp.maximum(x, y), jnp.minimum(x, y)
    return high * jnp.sqrt(1 + (low / jnp.where(high > 0, high, 1)) ** 2)
