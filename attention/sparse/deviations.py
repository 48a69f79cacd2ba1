"""How far sums over keys can be from their estimates by a sample: finite-sample bounds, for scalars and vectors."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.bernstein import vector_deviation

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
    # delta / 2: delta / 4 for the vectors, and half of that for their lengths.
    shares = {"failure": delta / 4, "moment_failure": delta / EVENTS}
    of_values = odds * n * sample.radius * vector_deviation(sample.moment, sample.most, m, **shares) / total
    least = jnp.maximum(1 - of_total, sample.kept / (odds * total))
    error = (of_values + away * of_total) / jnp.where(least > 0, least, 0)
    tail = odds * n * sample.mean / total + of_total
    mass = tail / (tail + sample.kept / (odds * total))
    return jnp.where(n > 0, error, 0), jnp.where(n > 0, jnp.where(mass <= 1, mass, 1), 0)
