"""What floating point may do to the gradients of softmax attention: a bound entry by entry, from the exact ones."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from attention.rounding import product_roundoff, roundoff
from attention.testing.oracle import Softmax, by_key_head, softmax_attention


class _Unit(NamedTuple):
    """What one operation may lose: relative, in a term of a matrix product, and by underflow."""

    u: float
    product: float
    tiny: float


def gradient_rounding(query, key, value, cotangent, *, rescalings: int, fixed_shift: float = 0.0, **options):
    r"""Bounds on the errors of dq, dk and dv, entry by entry, against `oracle_gradients`, for any exact method.

    `docs/bounds.md` derives them: with M the bounds on what moves, P the weights, p = dO V^T and delta = rowsum(P p),

        M_P = P (e^t - 1),   M_S = M_P |p - delta| + (P + M_P) (M_p + M_delta + 4 u (|p| + |delta|)),
        |error of dq| <= beta (M_S |k| + gamma (|S| + M_S) |k|) + u_out |dq|,

    and alike for dk and dv. Infinite where a gradient may overflow its dtype.

    Args:
        query, key, value, cotangent, options: as in `oracle_gradients`; the dtype of `query` is that of the call.
        rescalings, fixed_shift: as in `attention.rounding.rounding_bound`.
    """
    dtype = jnp.dtype(jnp.asarray(query).dtype)
    compute = jnp.promote_types(dtype, jnp.float32)
    # The oracle itself rounds, by 2**-53: to first order, errors of both add up.
    u = roundoff(compute) + roundoff(np.float64)
    unit = _Unit(u, float(product_roundoff(compute)) + u - roundoff(compute), float(jnp.finfo(compute).tiny))
    parts = softmax_attention(query, key, value, **options)
    d = np.moveaxis(np.asarray(cotangent).astype(np.float64), 2, 1)
    with np.errstate(over="ignore"):
        cap, bias = options.get("logits_soft_cap"), options.get("bias")
        scores, logits = _logits(parts, cap, bias, unit)
        weights = _weights(parts, logits, rescalings, fixed_shift, unit)
        change, moved = _changes(parts, d, weights, unit)
        if cap is not None:
            change, moved = _through_cap(parts.scores / cap, scores / cap, change, moved, unit)
        products = _products(parts, d, key, weights, change, moved, unit)
    # Accumulated in `compute`, then rounded to the dtype of the operand.
    info, rounded = jnp.finfo(dtype), (0.0 if dtype == compute else roundoff(dtype))
    bounds = (error + rounded * (size + error) + float(info.smallest_subnormal) for size, error in products)
    # One part in a thousand covers products of u with u.
    return tuple(
        np.where(size + 1.001 * bound < float(info.max), 1.001 * bound, np.inf)
        for (size, _), bound in zip(products, bounds, strict=True)
    )


def _gamma(x):
    return np.where(x < 1, x / np.where(x < 1, 1 - x, 1), np.inf)


def _logits(parts: Softmax, cap, bias, unit: _Unit):
    """How far scores and logits may move."""
    q, k, H = np.abs(parts.query) * np.abs(parts.beta), np.abs(parts.key), parts.key.shape[-1]
    scores = _gamma(H * unit.product + 5 * unit.u) * (q @ np.swapaxes(k, 2, 3))
    scores += unit.tiny * (H + q.sum(-1)[..., :, None] + k.sum(-1)[..., None, :])
    logits, capped = scores + 2 * unit.u * np.abs(parts.logits), np.abs(parts.scores)
    if cap is not None:
        capped = np.abs(cap * np.tanh(parts.scores / cap))
        logits = logits + 10 * unit.u * capped
    if bias is not None:
        finite = np.where(np.isneginf(bias), 0, np.abs(np.asarray(bias).astype(np.float64)))
        logits = logits + 2 * unit.u * (capped + finite)
    return scores, np.where(parts.visible, logits, 0)


def _weights(parts: Softmax, logits, rescalings: int, fixed_shift: float, unit: _Unit):
    """How far the weights may move, recomputed from the residual or normalised as they are."""
    n = parts.visible.sum(3, keepdims=True)
    span = np.log(np.maximum(n, 1)) + 2 * fixed_shift
    sums = _gamma(n * unit.product + (span + 6 * (np.minimum(n, rescalings) + 1)) * unit.u)
    largest = logits.max(3, keepdims=True)
    small = np.log1p((parts.weights * np.expm1(np.minimum(logits, 1))).sum(3, keepdims=True))
    normaliser = np.where(largest < 1, small, largest)
    below = np.where(parts.visible, parts.residual - np.where(parts.visible, parts.logits, 0), 0)
    rounded = _gamma(sums) + unit.u * (5 * np.abs(parts.residual) + 5 * span + below + 17)
    t = logits + normaliser + rounded
    # A weight is at most 1, up to the rounding of its normaliser, however far the logits move.
    return np.where(parts.visible, np.exp(np.minimum(t - below, rounded)) * -np.expm1(-t) + unit.tiny, 0)


def _changes(parts: Softmax, d, weights, unit: _Unit):
    """|S| for S = P (p - delta), the gradient to the logits, and how far it may move."""
    E, n = d.shape[-1], parts.visible.sum(3, keepdims=True)
    v, upper = np.abs(parts.value), parts.weights + weights
    p, size = d @ np.swapaxes(parts.value, 2, 3), np.abs(d) @ np.swapaxes(v, 2, 3)
    delta = (parts.weights * p).sum(3, keepdims=True)
    moved_p = _gamma(E * unit.product) * size
    moved_p += unit.tiny * (E + np.abs(d).sum(-1)[..., :, None] + v.sum(-1)[..., None, :])
    moved_delta = (weights * np.abs(p) + upper * moved_p).sum(3, keepdims=True) + n * unit.tiny
    moved_delta += _gamma((E + n) * unit.product + 4 * unit.u) * (upper * size).sum(3, keepdims=True)
    operands = np.abs(p) + np.abs(delta) + moved_p + moved_delta
    moved = weights * np.abs(p - delta) + upper * (moved_p + moved_delta + 4 * unit.u * operands) + 4 * n * unit.tiny
    change = parts.weights * np.abs(p - delta)
    return change, np.where(parts.visible, moved, 0)


def _through_cap(scores, moved_scores, change, moved, unit: _Unit):
    """The same behind the derivative of the cap, 1 - tanh^2 of scores / cap, whose own slope is below 0.77."""
    slope = 1 - np.tanh(scores) ** 2
    moved_slope = np.minimum(0.77 * moved_scores + 24 * unit.u, 1)
    return slope * change, slope * moved + (change + moved) * (moved_slope + 4 * unit.u)


def _products(parts: Softmax, d, key, weights, change, moved, unit: _Unit):
    """Sizes of the gradients and the bounds on their errors before they are rounded to their dtype."""
    beta, visible = np.abs(parts.beta), parts.visible
    q, k, d = np.abs(parts.query) * beta, np.abs(parts.key) * beta, np.abs(d)
    n = visible.sum(3, keepdims=True)

    # Any operand, product or sum that is subnormal may count as zero, and is then multiplied by others.
    lost = 4 * unit.tiny * (1 + beta.max()) * (1 + d.max()) * (1 + np.abs(parts.value).max())

    def error(terms, errors, count):
        return errors + _gamma(count * unit.product + 6 * unit.u) * (terms + errors) + (count + 1) * lost

    dq = [np.moveaxis(x, 1, 2) for x in (change @ k, moved @ k, n + np.zeros_like(q))]
    count = by_key_head(visible.sum(2)[..., None].astype(float), key)
    change, moved, held, other = (np.swapaxes(x, 2, 3) for x in (change, moved, parts.weights, weights))
    dk = [by_key_head(x @ q, key) for x in (change, moved)]
    dv = [by_key_head(x @ d, key) for x in (held, other)]
    return (dq[0], error(*dq)), (dk[0], error(*dk, count)), (dv[0], error(*dv, count))
