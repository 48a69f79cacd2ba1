"""How far sums over keys can be from their estimates by a sample: finite-sample bounds, for scalars and vectors."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

EVENTS = 8  # delta / 8 for each tail that has to hold; `docs/bounds.md` counts them


class Sample(NamedTuple):
    """What rows found among m keys drawn from n, and among those that they read in any case, relative to a level.

    Attributes:
        count: n; 0 where all of them were read, so that nothing is estimated.
        size: m.
        kept: sum of e^(l - level) over the keys that were read in any case.
        mean, deviation, root: mean, standard deviation (with m - 1) and root mean square of e^(l - level).
        moment: root mean square of e^(l - level) |v - c| / r.
        most: an upper bound on e^(l - level) among the n.
        radius: r, an upper bound on |v - c| among the n.
    """

    count: Float[Array, "..."]
    size: int
    kept: Float[Array, "G R"]
    mean: Float[Array, "G R"]
    deviation: Float[Array, "G R"]
    root: Float[Array, "G R"]
    moment: Float[Array, "G R"]
    most: Float[Array, "G R"]
    radius: Float[Array, ""]


def scalar_deviation(deviation, most, m: int, delta: float):
    r"""|mean of m draws - expectation| of numbers in [0, most], from their standard deviation (with m - 1).

        sqrt(2 V L / m) + 7 most L / (3 (m - 1)),    L = ln(8 / delta),

    with probability at least 1 - delta / 2: two tails of delta / 4.

    References:
        Maurer and Pontil, "Empirical Bernstein bounds and sample variance penalization", arXiv 0907.3740, theorem 4.
    """
    L = math.log(EVENTS / delta)
    return deviation * math.sqrt(2 * L / m) + most * (7 * L / (3 * max(m - 1, 1)))


def vector_deviation(moment, most, m: int, delta: float):
    r"""|mean of m draws - expectation| of vectors no longer than `most`, from the root of their mean squared length.

        g + sqrt(g^2 + h^2 s^2),    g = 2 most L / (3 m),    h^2 = 2 L / m,    L = ln(8 / delta),
        s = h most / 2 + sqrt((h most / 2)^2 + moment^2),

    with probability at least 1 - delta / 2: delta / 4 for the vectors and delta / 8 for s.

    References:
        Pinelis, "Optimum bounds for the distributions of martingales in Banach spaces", Ann. Probab. 22 (1994),
        theorem 3.4; Maurer, "A bound on the deviation probability for sums of non-negative random variables",
        JIPAM 4 (2003), theorem 2.1.
    """
    L = math.log(EVENTS / delta)
    half, range_term = math.sqrt(2 * L / m) / 2 * most, 2 * L / (3 * m) * most
    largest = half + _length(half, moment)
    return range_term + _length(range_term, math.sqrt(2 * L / m) * largest)


def _length(x, y):
    """sqrt(x^2 + y^2), for numbers whose squares overflow or vanish."""
    high, low = jnp.maximum(x, y), jnp.minimum(x, y)
    return high * jnp.sqrt(1 + (low / jnp.where(high > 0, high, 1)) ** 2)


def sampled_bound(sample: Sample, away, odds, delta: float) -> tuple[Array, Array]:
    r"""Bounds on |output - exact output| and on the softmax mass of the n keys, each with probability 1 - delta.

        (e_N + |o^ - c| e_Z) / max(Z^ - e_Z, kept),    e = n times the deviations of e^l (v - c) and of e^l,

    and (n mean + e_Z) / (kept + n mean + e_Z).

    Args:
        sample: what was found.
        away: |o^ - c|.
        odds: a factor above what rounding does to the ratio of two sums of exponentials.
        delta: the probability of failure.
    """
    n, m = sample.count, sample.size
    total = sample.kept + n * sample.mean
    total = jnp.where(total > 0, total, 1)
    # Rounding moves each number by a share of odds - 1 at most, and their standard deviation by a share of the root.
    spread = sample.deviation + 2 * (odds - 1) * sample.root
    of_total = odds * n * scalar_deviation(spread, sample.most, m, delta) / total
    of_values = odds * n * sample.radius * vector_deviation(sample.moment, sample.most, m, delta) / total
    least = jnp.maximum(1 - of_total, sample.kept / (odds * total))
    error = (of_values + away * of_total) / jnp.where(least > 0, least, 0)
    tail = odds * n * sample.mean / total + of_total
    mass = tail / (tail + sample.kept / (odds * total))
    return jnp.where(n > 0, error, 0), jnp.where(n > 0, jnp.where(mass <= 1, mass, 1), 0)
