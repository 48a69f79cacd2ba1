r"""A bound on the error of `Taylor`, from the spread of the keys and of the values; `docs/bounds.md` derives it."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from attention.inputs import Inputs
from attention.masks import Mask
from attention.rounding import gamma, max_over_visible, norms, product_roundoff, roundoff, sees_any


class Spread(NamedTuple):
    """What the bound reads of the keys.

    Attributes:
        key: k - f, as the method has it.
        centre: c - f, for each query.
        offset: q.(c - f), as the method has it.
        pulled: attention of order 1 over these keys as values: c - f plus their covariance times q.
    """

    key: Float[Array, "B K S H"]
    centre: Float[Array, "B K T H"]
    offset: Float[Array, "B K G T"]
    pulled: Float[Array, "B K G T H"]


def taylor_bound(
    inputs: Inputs, output: Float[Array, "B K G T E"], spread: Spread, *, order: int, features: int, chunk: int
) -> Float[Array, "B K G T"]:
    r"""A bound on ||output - softmax attention||, where `output` is attention by T_p around the mean of the keys.

    With x_j = q.(k_j - c), R >= max|x_j| and m >= mean x_j^2 over the visible keys, V = max|v_j - b| for a point b:

        |error| <= mean|e^x - T_p(x)| max|v_j - o| / mean e^x + rounding
                <= m (e^R - T_p(R)) / R^2 (V + |o - b|) + rounding,

    since the remainder of the exponential is x^2 times a function whose size grows with |x|, and mean e^x >=
    e^{mean x} = 1. R is the smaller of |q| max|k_j - c| and of what the box around the keys allows. The output
    is never further from a mean of the values than V + |o - b|, which is the bound where the other is larger.
    Everything is rounded outward.

    Cost: O(T H^2 + S (H + E)) operations a head beside what `spread` cost; causal, twice that for the last.
    """
    dtype, (H, E) = inputs.query.dtype, (inputs.query.shape[-1], inputs.value.shape[-1])
    u, u_p = roundoff(dtype), product_roundoff(dtype)
    S, C = inputs.mask.num_keys, min(chunk, inputs.mask.num_queries)
    value, size = inputs.value.astype(dtype), norms(inputs.query)

    anchor, V = around_mean(inputs.mask, value)
    distance = V[:, :, None] + norms(output - anchor[:, :, None]) * (1 + _slack(E, dtype))
    largest, far = (max_over_visible(inputs.mask, norms(x)) for x in (value, spread.key))
    raw = max_over_visible(inputs.mask, norms(inputs.key.astype(dtype)))
    length = size * jnp.maximum(far, norms(spread.centre)[:, :, None])

    # How far the mean of x may be from 0: a sum in a tree, a quotient, a product and the difference k - f are rounded.
    tree = 2 * math.ceil(math.log2(S + 1)) + 4
    shift = gamma(H * u_p + (tree + 4) * u) * size * jnp.maximum(far, raw)
    sums = gamma((features + 2 * C + 2 * -(-S // C) + 16) * u_p + (8 * order + 16) * u)
    moment = _second_moment(inputs, spread, length, shift, sums)
    radius = _radius(inputs, spread, size) + shift

    polynomial = _polynomial(2 * length, order)
    remainder = moment * _remainder(radius, order) * distance
    arithmetic = sums * polynomial * (largest + norms(output))
    tiny = float(jnp.finfo(dtype).tiny)
    moved = 2 * V[:, :, None] * jnp.tanh(4 * u * length + 4 * tiny * (H + H**0.5 * (size + raw)))
    lost = tiny * 8 * features * (1 + largest) * ((1 + size) * (1 + far)) ** order
    # One part in a thousand covers the rounding of this expression itself.
    bound = 1.001 * ((remainder + arithmetic + lost) * jnp.exp(shift) + moved)
    # A row of zeros may be one whose denominator vanished.
    known = (bound < distance) & (norms(output) > 0)
    bound = jnp.where(known, bound, 1.001 * distance + tiny * E + 2 * u * largest) + output_rounding(inputs, output)
    bound = jnp.where(jnp.isnan(bound), jnp.inf, bound)
    return jnp.where(sees_any(inputs.mask), bound, 0)


def _second_moment(inputs: Inputs, spread: Spread, length, shift, sums) -> Float[Array, "B K G T"]:
    """An upper bound on the mean of x^2 over the visible keys."""
    product = jnp.einsum("BKGTH,BKGTH->BKGT", inputs.query, spread.pulled, precision=lax.Precision.HIGHEST)
    # q times the mean of (1 + x)(k - f), over the mean of 1 + x, is (a + mean x + mean x^2 + a mean x) / (1 + mean x).
    error = sums * (1 + 2 * length) * (length + norms(inputs.query) * norms(spread.pulled))
    error = 2 * error + 2 * shift * (1 + jnp.abs(product) + jnp.abs(spread.offset))  # twice: 1 + mean x is above 1/2
    largest = 4 * length**2
    found = jnp.maximum(product - spread.offset, 0) * 1.001 + error
    return jnp.where(shift < 0.5, jnp.minimum(found, largest), largest)


def _radius(inputs: Inputs, spread: Spread, size) -> Float[Array, "B K G T"]:
    """An upper bound on |q.(k - c)| over the visible keys, by a ball and by a box around the centre."""
    dtype, H = inputs.query.dtype, inputs.query.shape[-1]
    anchor, radius = around_mean(inputs.mask, spread.key)
    ball = size * (radius + norms(spread.centre - anchor) * (1 + _slack(H, dtype)))[:, :, None]
    upper, lower = (
        at_last_key(inputs.mask, run(spread.key, axis=2)) - spread.centre for run in (lax.cummax, lax.cummin)
    )
    upper, lower = upper[:, :, None], lower[:, :, None]
    above = jnp.maximum(inputs.query * upper, inputs.query * lower).sum(-1)
    below = jnp.maximum(-inputs.query * upper, -inputs.query * lower).sum(-1)
    rounding = _slack(H, dtype) * (jnp.abs(inputs.query) * jnp.maximum(jnp.abs(upper), jnp.abs(lower))).sum(-1)
    return jnp.minimum(ball * (1 + _slack(H, dtype)), jnp.maximum(above, below) + rounding)


def around_mean(mask: Mask, x: Float[Array, "B K S H"]) -> tuple[Array, Array]:
    """For each query a point near the mean of the visible x, `B K T H`, and the largest distance from it, `B K T`.

    Where causal the point is the mean of the first 2^a rows for the prefixes of 2^a to 2^(a + 1) - 1, so that all
    distances together cost O(S H), and none depends on a later row.
    """
    if not mask.causal:
        centre = mean_of_visible(mask, x)
        seen = jnp.ones((1, x.shape[2]), bool)
        if mask.key_lengths is not None:
            seen = jnp.arange(x.shape[2])[None] < mask.key_lengths[:, None]
        distances = jnp.where(seen[:, None, :], norms(x - centre[:, :, :1]), 0)
        radius = jnp.broadcast_to(distances.max(2, keepdims=True), centre.shape[:3])
        return centre, radius * (1 + _slack(x.shape[-1], x.dtype))
    S, means = x.shape[2], _prefix_means(x)
    starts = [2**a - 1 for a in range(S.bit_length())]  # rows 2^a - 1 to 2^(a + 1) - 2 end the prefixes of a block
    blocks = np.repeat(np.arange(len(starts)), np.diff([*starts, S]))
    anchor = jnp.take(means, np.array(starts)[blocks], axis=2)
    earlier = [norms(x[:, :, :start] - means[:, :, start : start + 1]).max(2, initial=0) for start in starts]
    own = _running_max(norms(x - anchor), jnp.asarray(blocks))
    radius = jnp.maximum(own, jnp.take(jnp.stack(earlier, axis=2), blocks, axis=2))[..., None]
    return at_last_key(mask, anchor), at_last_key(mask, radius)[..., 0] * (1 + _slack(x.shape[-1], x.dtype))


def _running_max(x: Float[Array, "B K S"], blocks: Int[Array, " S"]) -> Float[Array, "B K S"]:
    """The largest x so far within the block of each row."""

    def later(a, b):
        return b[0], jnp.where(a[0] == b[0], jnp.maximum(a[1], b[1]), b[1])

    return lax.associative_scan(later, (jnp.broadcast_to(blocks[None, None], x.shape), x), axis=2)[1]


def mean_of_visible(mask: Mask, x: Float[Array, "B K S H"]) -> Float[Array, "B K T H"]:
    """The mean over the prefix that causality and the lengths leave to each query."""
    return at_last_key(mask, _prefix_means(x))


def _prefix_means(x: Float[Array, "B K S H"]) -> Float[Array, "B K S H"]:
    return prefix_sums(x) / jnp.arange(1, x.shape[2] + 1, dtype=x.dtype)[None, None, :, None]


def prefix_sums(x: Float[Array, "B K S H"]) -> Float[Array, "B K S H"]:
    """Sums over the rows up to each, in a tree: a term passes through at most 2 ceil(log2 S) additions."""
    return lax.associative_scan(jnp.add, x, axis=2)


def at_last_key(mask: Mask, x: Float[Array, "B K S H"]) -> Float[Array, "B K T H"]:
    """The row of x at the last key that each query sees."""
    last = mask.key_range()[1].clip(0, mask.num_keys - 1)
    return jnp.take_along_axis(x, last[:, None, :, None], axis=2)


def _remainder(R: Float[Array, "..."], order: int) -> Float[Array, "..."]:
    """An upper bound on (e^R - T_p(R)) / R^2: 24 terms of its series, and e^R times the next one for the rest."""
    top = order + 24
    total = jnp.full_like(R, 1 / math.factorial(top))
    for i in range(top - 1, order, -1):
        total = total * R + 1 / math.factorial(i)
    tail = jnp.exp(R) * R**24 * (1 / math.factorial(top + 1))
    return 1.0001 * R ** (order - 1) * (total + tail)


def _polynomial(x: Float[Array, "..."], order: int) -> Float[Array, "..."]:
    return sum((x**d / math.factorial(d) for d in range(1, order + 1)), jnp.ones_like(x))


def output_rounding(inputs: Inputs, output) -> Float[Array, "B K G T"]:
    """What rounding the output to the dtype of the operands may move it by."""
    dtype = inputs.key.dtype
    if dtype == output.dtype:
        return jnp.zeros_like(output[..., 0])
    lost = float(jnp.finfo(dtype).smallest_subnormal) * output.shape[-1] ** 0.5
    return 1.001 * roundoff(dtype) * norms(output) + lost


def _slack(H: int, dtype) -> float:
    """Norms, differences and sums of H entries are rounded by a smaller factor than one more than this."""
    return (H + 8) * float(jnp.finfo(dtype).eps)
