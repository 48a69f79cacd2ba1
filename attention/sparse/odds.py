"""Certificates from the odds of what was not read, of which only an upper bound is known."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.inputs import Inputs
from attention.method import Certificate
from attention.sparse.bounds import sparse_certificate


def odds(lost: Float[Array, "*N"], total: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Lost mass against the mass that was read; infinite only where nothing was read and something may be lost."""
    most = float(jnp.finfo(total.dtype).max)
    against = jnp.fmin(lost / jnp.where(total > 0, total, 1), most)  # of NaN and an overflow, the largest number
    return jnp.where(lost == 0, 0, jnp.where(total > 0, against, jnp.inf))


def odds_certificate(inputs: Inputs, against: Float[Array, "B K G T"], work: Float[Array, ""]) -> Certificate:
    """`attention.sparse.bounds.sparse_certificate` for odds a : 1, of which the share is a / (1 + a).

    A row that read nothing of what it sees has output 0, whose error no diameter bounds: infinite.
    """
    share = jnp.where(against < 1, against / (1 + against), 1 / (1 + 1 / against))
    known = sparse_certificate(inputs, share, work=1.0)
    bound = jnp.where(jnp.isinf(against), jnp.inf, known.error_bound)
    return dataclasses.replace(known, error_bound=bound, work=work.astype(bound.dtype))
