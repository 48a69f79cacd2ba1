"""Sound bounds for sparse attention: the reach of a page's logits, the spread of the values, what dropped keys do."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.inputs import Inputs
from attention.method import Certificate
from attention.rounding import (
    Sizes,
    logit_rounding,
    max_over_visible,
    norms,
    product,
    product_roundoff,
    rounding_bound,
    sees_any,
    sum_rounding,
)
from attention.sparse.moments import Moments, outward


def ball(query: Float[Array, "*B T H"], length: Float[Array, "*B T"], pages: Moments) -> Float[Array, "P *B T"]:
    r"""|q| max_j |k_j - c_p|, which no |q.(k_j - c_p)| exceeds; rounded outward. No product: T P operations."""
    wide = outward(query.dtype, query.shape[-1])
    return wide * length[None] * _first(pages.radius, query)


def box(query: Float[Array, "*B T H"], length: Float[Array, "*B T"], pages: Moments) -> Float[Array, "P *B T"]:
    r"""sum_h |q_h| max_j |k_jh - c_ph|, which no |q.(k_j - c_p)| exceeds; rounded outward. 2 T P H operations.

    References:
        Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774, 3.2.
    """
    assert pages.half is not None, "moments(bound='box')"
    del length
    return _above(product("...th,ph->p...t", jnp.abs(query), pages.half), query)


def sketch(query: Float[Array, "*B T H"], length: Float[Array, "*B T"], pages: Moments) -> Float[Array, "P *B T"]:
    r"""sum_r |U_r.q| max_j |U_r.y_j| + |q - U U^T q| max_j |y_j - U U^T y_j|, y_j = k_j - c_p, U the page's basis.

    With A = I - U U^T, q.y = (U^T q).(U^T y) + q.A y and q.A y = (A q).(A y) + q.(A - A^2) y, where A - A^2 =
    U (I - U^T U) U^T vanishes for an orthonormal U, and for a computed one is at most |U|^2 |I - U^T U|; that term is
    added. Rounded outward. 4 T P H r operations and T P (H + r) memory: for few queries.
    """
    basis, across, remote = pages.basis, pages.across, pages.rest
    assert basis is not None, "moments(bound='sketch')"
    assert across is not None, "moments(bound='sketch')"
    assert remote is not None, "moments(bound='sketch')"
    r = basis.shape[-1]
    along = product("...th,phr->p...tr", query, basis)
    rest = query[None] - product("p...tr,phr->p...th", along, basis)
    u = product_roundoff(query.dtype)
    gram = product("phr,phs->prs", basis, basis)
    defect = jnp.linalg.norm(gram - jnp.eye(r, dtype=gram.dtype)[None], axis=(-2, -1)) + 2 * r * query.shape[-1] * u
    lost = (1 + defect) * defect + 2 * query.shape[-1] * (r + 2) * u
    inside = product("p...tr,pr->p...t", jnp.abs(along), across)
    reach = inside + norms(rest) * _first(remote, query) + length[None] * _first(lost * pages.radius, query)
    return _above(reach, query)


def _first(x: Float[Array, " P"], like: Float[Array, "*B H"]) -> Float[Array, "P ..."]:
    """A number a page, along the first of as many axes as `like` has."""
    return x.reshape(x.shape + (1,) * (like.ndim - 1))


def _above(reach: Float[Array, "P *B T"], query: Float[Array, "*B T H"]) -> Float[Array, "P *B T"]:
    """Above what rounding makes of sums of H products of positive numbers."""
    return reach * (1 + 2 * query.shape[-1] * product_roundoff(query.dtype)) * outward(query.dtype, 0)


# Upper bounds on max_j |q.(k_j - c_p)| from q and |q|, interchangeable: all sound, they differ in cost and tightness.
REACH = {"ball": ball, "box": box, "sketch": sketch}


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
    wide = 1 + (value.shape[-1] + 8) * float(jnp.finfo(value.dtype).eps)
    # Each of the three grows along the prefix, so the maximum over a prefix is its last entry.
    return max_over_visible(inputs.mask, _known(wide * jnp.minimum(box, 2 * radius)))


def value_reach(inputs: Inputs) -> Float[Array, "B K 1 T"]:
    r"""As `value_diameter` without the box, which costs running maxima of every entry: twice the smaller radius.

    Cost: O(S E) time, O(S) memory a key head.
    """
    value = inputs.value.astype(inputs.query.dtype)
    wide = 1 + (value.shape[-1] + 8) * float(jnp.finfo(value.dtype).eps)
    radii = (max_over_visible(inputs.mask, _known(wide * norms(x))) for x in (value, value - value[:, :, :1]))
    return 2 * jnp.minimum(*radii)


def value_width(inputs: Inputs) -> Float[Array, "B K 1 T"]:
    """Max |v_j - v_0| over the keys of a row that sees a prefix of them, rounded inward: a lower bound on the diameter.

    0 for every row where a window, segments or a table may leave out the first key. Cost: O(S E) time a key head.
    """
    value, mask = inputs.value.astype(inputs.query.dtype), inputs.mask
    if mask.window is not None or mask.query_segments is not None or mask.dense is not None:
        return jnp.zeros((*value.shape[:2], 1, mask.num_queries), value.dtype)
    apart = norms(value - value[:, :, :1]) / outward(value.dtype, value.shape[-1])
    return jnp.where(sees_any(mask), max_over_visible(mask, apart), 0)


def tail_share(logits: Float[Array, "*N S"], dropped: Bool[Array, "*N S"]) -> Float[Array, "*N"]:
    """The share of the dropped entries in the sum of exponentials, each counted as at least `tiny`; -inf is none."""
    top = logits.max(-1, keepdims=True)
    terms = jnp.exp(jnp.where(jnp.isneginf(logits), -jnp.inf, logits - top))
    dropped &= logits > -jnp.inf
    tail = jnp.where(dropped, jnp.maximum(terms, jnp.finfo(logits.dtype).tiny), 0).sum(-1)
    return tail / jnp.where(tail > 0, tail + jnp.where(dropped, 0, terms).sum(-1), 1)


def dropped_mass(inputs: Inputs, tail: Float[Array, "B K G T"], *, rescalings: int = 0) -> Float[Array, "B K G T"]:
    r"""An upper bound on the softmax mass of the dropped keys, from their computed share `tail` of the sum.

    With D a bound on the rounding of a logit, the true odds of the dropped against the kept keys are at most
    e^{2D} times those of the rounded logits, and so is tau. With e the relative error of a sum of
    exponentials, tail sum and whole sum change their ratio by at most (1 + e) / (1 - e):

        tau <= e^{2D} (1 + e) / (1 - e) tail,

    where each dropped key counts in `tail` with at least the smallest normal number, whatever its exponential
    underflows to. Which keys were kept does not matter: rounding may move keys across the threshold, which
    changes tau, and not the bound on it.
    """
    # No mass is above 1, nor is NaN known.
    return jnp.where(tail == 0, 0, jnp.fmin(odds_rounding(inputs, rescalings=rescalings) * tail, 1))


def odds_rounding(inputs: Inputs | Sizes, *, rescalings: int, share: float = 1.0) -> Float[Array, "B K G T"]:
    """e^{2D} (1 + e) / (1 - e), by which rounding changes the ratio of two sums of exponentials, and a part more.

    `share` multiplies D, where logits are rounded more than those of `logit_rounding`.
    """
    error = sum_rounding(inputs, rescalings=rescalings)
    ratio = (1 + error) / jnp.where(error < 1, 1 - error, 0)
    return 1.001 * jnp.exp(2 * share * logit_rounding(inputs)) * ratio  # a part in a thousand for the expression itself


def sparse_certificate(
    inputs: Inputs,
    tail: Float[Array, "B K G T"],
    *,
    work: Float[Array, ""] | float,
    fixed_shift: float = 0.0,
    rescalings: int = 0,
) -> Certificate:
    r"""The certificate of softmax over some of the keys, of which the others have the computed share `tail`.

    o - o^ = tau (mean of the kept values - mean of the dropped), so ||o - o^|| <= tau diam(V). The softmax over
    the kept keys is itself rounded, by no more than `rounding_bound`, which holds for any part of the keys and takes
    `fixed_shift` and `rescalings`.
    """
    mass = dropped_mass(inputs, tail, rescalings=rescalings)
    rounding = rounding_bound(inputs, rescalings=rescalings, fixed_shift=fixed_shift)
    bound = 1.001 * mass * value_diameter(inputs) + rounding
    seen = sees_any(inputs.mask)
    return Certificate(
        error_bound=jnp.where(seen, _known(bound), 0),
        dropped_mass=jnp.where(seen, mass, 0),
        work=jnp.asarray(work, bound.dtype),
        kind="deterministic",
    )


def _known(bound: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Infinity for NaN, which infinite values make of differences and of products with 0."""
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)
