"""What floating point does to softmax attention: bounds on the error of logits, sums and outputs."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.inputs import Inputs
from attention.masks import Mask

# The roundoff of one term of a float32 matrix product with `lax.Precision.HIGHEST`, in units of 2**-24, so that an
# inner product of n terms errs by at most gamma_n(PRODUCT u) sum|a||b|. A CPU computes in float32. So does a GPU, no
# TF32; but where both operands were converted from 16 bits it may run on tensor cores, whose adders truncate. A TPU
# makes 6 products of bfloat16 parts, of 3 parts a number: `docs/bounds.md` counts what the 3 left out can be.
PRODUCT = {"cpu": 1, "cuda": 2, "rocm": 2, "tpu": 16}

# Where no logit of a row can exceed this size, weights may be taken relative to a bound on the logits, which costs
# nothing, and not to their maximum, which costs a pass over them. No weight is then below exp(-2 CALM) = 4e-18, far
# from where float32 ends; `rounding_bound` accounts for it.
CALM = 20.0


def rounding_bound(
    inputs: Inputs, *, rescalings: int, depth: int | None = None, fixed_shift: float = 0.0, output_dtype=None
) -> Float[Array, "B K G T"]:
    r"""A bound on the Euclidean error of softmax attention in floating point, with or without tiles.

    With u the unit roundoff of the computation, u_p that of its matrix products, n visible keys, C the largest norm
    among their values, L a bound on the size of the logits and D one on their rounding (`logit_rounding`):

        |error| <= (1 + u_out) C [2 tanh(D / 2) + 2 e / (1 - e)] + u_out C + underflow,
        e = x / (1 - x),   x = min(n, depth) u_p + (min(2 L, ln n) + 6 (min(n, rescalings) + 1)) u

    The first term is the distance that logits moved by D can move a distribution. The second is the relative error
    of exponentials and sums, in numerator and denominator. `docs/bounds.md` derives it. Infinite where a logit or a
    sum of values may overflow, and where nothing is known of the backend's matrix product.

    Cost: O((T + S) (H + E)) operations a head.

    Args:
        inputs: the operands.
        rescalings: how often a partial sum is rescaled by a new maximum.
        depth: the longest chain of additions that a term passes through; with tiles, the keys in one plus the
            number of tiles. Without it, all visible keys in any order.
        fixed_shift: L0, where rows with |logits| <= m <= L0 may have weights e^(l - m) for such an m instead of
            their maximum. The exponent counts with min(L, L0) + L0, and underflow grows by e to the same.
        output_dtype: the dtype to which the output is rounded; that of `inputs.key` unless given.
    """
    dtype, (H, E) = inputs.query.dtype, (inputs.query.shape[-1], inputs.value.shape[-1])
    output_dtype = jnp.dtype(output_dtype or inputs.key.dtype)
    u_out = 0.0 if output_dtype == dtype else roundoff(output_dtype)
    size, n = _logit_bound(inputs), _keys_in_range(inputs.mask, dtype)
    reach = jnp.minimum(size, fixed_shift) + fixed_shift
    exponent = jnp.maximum(jnp.minimum(2 * size, jnp.log(jnp.maximum(n, 1))), reach)
    e = _sums(inputs, exponent, rescalings, depth)
    largest = max_over_visible(inputs.mask, norms(inputs.value.astype(dtype)))
    moved = 2 * jnp.tanh(logit_rounding(inputs) / 2) + 2 * e / jnp.where(e < 1, 1 - e, 0)
    lost = float(jnp.finfo(dtype).tiny) * (n + rescalings + jnp.exp(reach)) * (largest + E**0.5)
    lost += float(jnp.finfo(output_dtype).smallest_subnormal) * E**0.5
    # One part in a thousand covers the rounding of this expression itself.
    bound = 1.001 * largest * ((1 + u_out) * moved + u_out) + lost
    huge = float(jnp.finfo(dtype).max) / 4
    known = (H * _score_bound(inputs) + size < huge) & (n * largest < huge) & (e < 1)
    return jnp.where(sees_any(inputs.mask), jnp.where(known, bound, jnp.inf), 0)


def logit_rounding(inputs: Inputs) -> Float[Array, "B K G T"]:
    """D, a bound on the rounding error of every logit that a query sees.

    gamma_H(u_p) |q| max|k| + 5 u |q| max|k| + 2 u L, and 10 u min(cap, |q| max|k|) with a cap, 2 u L with a bias.
    """
    u, H, dtype = roundoff(inputs.query.dtype), inputs.query.shape[-1], inputs.query.dtype
    score = _score_bound(inputs)
    error = gamma(H * product_roundoff(dtype) + 5 * u) * score + 2 * u * _logit_bound(inputs)
    if inputs.soft_cap is not None:
        error += 10 * u * jnp.minimum(score, inputs.soft_cap)
    if inputs.bias is not None:
        error += 2 * u * _logit_bound(inputs)
    # Subnormal entries and products may count as zero.
    lengths = norms(inputs.query) + max_over_visible(inputs.mask, norms(inputs.key.astype(dtype)))
    return error + float(jnp.finfo(dtype).tiny) * (H + H**0.5 * lengths)


def sum_rounding(inputs: Inputs, *, rescalings: int) -> Float[Array, "B K G T"]:
    """A bound on the relative error of a sum of e^(logit - max) over any of the keys, given the logits.

    As e in `rounding_bound`, with 2 L or what underflows first for the exponent, since such a sum may have no more
    than the smallest of the terms.
    """
    vanishing = 1 - math.log(float(jnp.finfo(inputs.query.dtype).smallest_subnormal))  # 104.3 in float32
    return _sums(inputs, jnp.minimum(2 * _logit_bound(inputs), vanishing), rescalings, None)


def calm_limit(inputs: Inputs) -> Float[Array, "B K G T"]:
    """An upper bound on the size of the logits that each query sees, by norms; infinite where there is a bias.

    Of what comes after a query it knows nothing, and it has no gradient.
    """
    longest = max_over_visible(inputs.mask, norms(inputs.key.astype(inputs.query.dtype)))
    limit = lax.stop_gradient(norms(inputs.query) * longest)
    if inputs.soft_cap is not None:
        limit = jnp.minimum(limit, inputs.soft_cap.astype(limit.dtype))
    return limit if inputs.bias is None else jnp.full_like(limit, jnp.inf)


def product(subscripts: str, *operands: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum in the full precision of its operands, whatever the backend does by default."""
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def roundoff(dtype) -> float:
    """The unit roundoff u: 2**-24 in float32, 2**-53 in float64, 2**-8 in bfloat16, 2**-11 in float16."""
    return float(jnp.finfo(dtype).eps) / 2


def product_roundoff(dtype) -> Float[Array, ""]:
    """u_p, the roundoff of a term of a matrix product on the platform that runs it; infinite where it is not known."""
    exact = jnp.dtype(dtype) == jnp.float64
    known = {name: 1 if exact else units for name, units in PRODUCT.items() if not (exact and name == "tpu")}
    values = {name: functools.partial(jnp.full, (), units * roundoff(dtype), dtype) for name, units in known.items()}
    return lax.platform_dependent(default=functools.partial(jnp.full, (), jnp.inf, dtype), **values)


def sees_any(mask: Mask) -> Bool[Array, "b 1 1 T"]:
    """Whether the band and the lengths leave a query any key."""
    first, last = mask.key_range()
    return (first <= last)[:, None, None, :]


def max_over_visible(mask: Mask, numbers: Float[Array, "B K S"]) -> Float[Array, "B K 1 T"]:
    """An upper bound on the maximum of non-negative numbers over the keys that each query sees.

    Over the prefix that the band and the lengths leave, in O(S); segments and dense masks are ignored.
    """
    _, last = mask.key_range()
    running = lax.cummax(numbers, axis=2)
    B = numbers.shape[0]
    last = jnp.broadcast_to(last, (B, mask.num_queries))[:, None, :]
    return jnp.take_along_axis(running, last.clip(0, mask.num_keys - 1), axis=2)[:, :, None, :]


def norms(x: Float[Array, "*N H"]) -> Float[Array, "*N"]:
    """Euclidean norms over the last axis, whose squares can neither overflow nor vanish."""
    largest = jnp.abs(x).max(-1, keepdims=True)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit[..., 0] * jnp.linalg.norm(x / unit, axis=-1)


def _sums(inputs: Inputs, exponent, rescalings: int, depth: int | None) -> Float[Array, "B K G T"]:
    """The relative error of sums of exponentials whose exponents are `exponent` or, on average, less."""
    dtype = inputs.query.dtype
    n = _keys_in_range(inputs.mask, dtype)
    chain = n if depth is None else jnp.minimum(n, depth)
    factors = exponent + 6 * (jnp.minimum(n, rescalings) + 1)
    return gamma(chain * product_roundoff(dtype) + factors * roundoff(dtype))


def _keys_in_range(mask: Mask, dtype) -> Float[Array, "b 1 1 T"]:
    first, last = mask.key_range()
    return (last - first + 1).clip(0).astype(dtype)[:, None, None, :]


def _score_bound(inputs: Inputs) -> Float[Array, "B K G T"]:
    return norms(inputs.query) * max_over_visible(inputs.mask, norms(inputs.key.astype(inputs.query.dtype)))


def _logit_bound(inputs: Inputs) -> Float[Array, "B K G T"]:
    """L, with the soft cap and the bias."""
    score = _score_bound(inputs)
    size = score if inputs.soft_cap is None else jnp.minimum(score, inputs.soft_cap)
    if inputs.bias is None:
        return size
    return size + jnp.where(jnp.isneginf(inputs.bias), 0, jnp.abs(inputs.bias).astype(size.dtype)).max(-1)


def gamma(x):
    """X / (1 - x), which bounds the product of factors 1 + d whose |d| add up to x; infinite from x = 1."""
    return jnp.where(x < 1, x / jnp.where(x < 1, 1 - x, 1), jnp.inf)
