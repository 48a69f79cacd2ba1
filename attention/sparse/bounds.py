"""Sound bounds for sparse attention: the spread of the values, and the error that dropped keys can cause."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.inputs import Inputs
from attention.method import Certificate
from attention.rounding import logit_rounding, max_over_visible, norms, rounding_bound, sees_any, sum_rounding


def value_diameter(inputs: Inputs) -> Float[Array, "B K 1 T"]:
    r"""An upper bound on max ||v_i - v_j|| over the values that each query sees.

    The smaller of twice the largest norm, twice the largest distance from the first value, and the diagonal
    of the box around the values; over the prefix that the band and the lengths leave to the query (segments,
    dense masks and the left end of a window only narrow it). Rounded outward: with u the unit roundoff, norms
    and differences of E entries are off by a factor of at most 1 + (E + 4) u, and 1 + (E + 8) 2 u is applied.

    Cost: O(S E) time and memory a key head.
    """
    value = inputs.value.astype(inputs.query.dtype)
    box = norms(lax.cummax(value, axis=2) - lax.cummin(value, axis=2))
    radius = jnp.minimum(lax.cummax(norms(value), axis=2), lax.cummax(norms(value - value[:, :, :1]), axis=2))
    outward = 1 + (value.shape[-1] + 8) * float(jnp.finfo(value.dtype).eps)
    # Each of the three grows along the prefix, so the maximum over a prefix is its last entry.
    return max_over_visible(inputs.mask, _known(outward * jnp.minimum(box, 2 * radius)))


def dropped_mass(inputs: Inputs, tail: Float[Array, "B K G T"]) -> Float[Array, "B K G T"]:
    r"""An upper bound on the softmax mass of the dropped keys, from their computed share `tail` of the sum.

    With D a bound on the rounding of a logit, the true odds of the dropped against the kept keys are at most
    e^{2D} times those of the rounded logits, and so is tau. With e the relative error of a sum of
    exponentials, tail sum and whole sum change their ratio by at most (1 + e) / (1 - e):

        tau <= e^{2D} (1 + e) / (1 - e) tail,

    where each dropped key counts in `tail` with at least the smallest normal number, whatever its exponential
    underflows to. Which keys were kept does not matter: rounding may move keys across the threshold, which
    changes tau, and not the bound on it.
    """
    error = sum_rounding(inputs, rescalings=0)
    ratio = (1 + error) / jnp.where(error < 1, 1 - error, 0)
    # One part in a thousand covers the rounding of this expression itself; no mass is above 1, nor is NaN known.
    return jnp.where(tail == 0, 0, jnp.fmin(1.001 * jnp.exp(2 * logit_rounding(inputs)) * ratio * tail, 1))


def sparse_certificate(inputs: Inputs, tail: Float[Array, "B K G T"], *, work: float) -> Certificate:
    r"""The certificate of softmax over some of the keys, of which the others have the computed share `tail`.

    o - o^ = tau (mean of the kept values - mean of the dropped), so ||o - o^|| <= tau diam(V). The softmax over
    the kept keys is itself rounded, by no more than `rounding_bound`, which holds for any part of the keys.
    """
    mass = dropped_mass(inputs, tail)
    bound = 1.001 * mass * value_diameter(inputs) + rounding_bound(inputs, rescalings=0)
    seen = sees_any(inputs.mask)
    return Certificate(
        error_bound=jnp.where(seen, _known(bound), 0),
        dropped_mass=jnp.where(seen, mass, 0),
        work=jnp.full((), work, bound.dtype),
        kind="deterministic",
    )


def _known(bound: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Infinity for NaN, which infinite values make of differences and of products with 0."""
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)
