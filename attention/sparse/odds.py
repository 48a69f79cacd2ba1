"""Certificates from the odds of what was not read, of which only an upper bound is known."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.inputs import Inputs
from attention.method import Certificate
from attention.rounding import rounding_bound, sees_any
from attention.sparse.bounds import dropped_mass, value_diameter
from attention.sparse.gathered import CALM


def odds(lost: Float[Array, "*N"], total: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Lost mass against the mass that was read; infinite only where nothing was read and something may be lost."""
    most = float(jnp.finfo(total.dtype).max)
    against = jnp.fmin(lost / jnp.where(total > 0, total, 1), most)  # of NaN and an overflow, the largest number
    return jnp.where(lost == 0, 0, jnp.where(total > 0, against, jnp.inf))


def odds_certificate(inputs: Inputs, against: Float[Array, "B K G T"], work: Float[Array, ""]) -> Certificate:
    """The bound tau diam(V), and rounding: the odds a : 1 of what was not read give tau <= a / (1 + a).

    A row that read nothing of what it sees has output 0, whose error no diameter bounds: infinite.
    """
    share = jnp.where(against < 1, against / (1 + against), 1 / (1 + 1 / against))
    mass = dropped_mass(inputs, share)
    bound = 1.001 * mass * value_diameter(inputs) + rounding_bound(inputs, rescalings=0, fixed_shift=CALM)
    bound = jnp.where(jnp.isnan(bound) | jnp.isinf(against), jnp.inf, bound)
    seen = sees_any(inputs.mask)
    return Certificate(
        error_bound=jnp.where(seen, bound, 0),
        dropped_mass=jnp.where(seen, mass, 0),
        work=work.astype(bound.dtype),
        kind="deterministic",
    )
