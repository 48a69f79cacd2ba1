"""What floating point does to softmax attention: bounds on the error of logits, sums and outputs."""

import functools
import math
from typing import Any, NamedTuple

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


class Sizes(NamedTuple):
    """What the bounds know of a call: of each row the largest norms that it sees, and how many keys.

    Attributes:
        query: |q|.
        key, value: the largest norm among the keys, and values, up to the last one that the row sees.
        count: n, the keys that the band and the lengths leave to it.
        bias: the largest |bias| that is not infinite; or None.
        soft_cap: or None.
        head, width: H and E.
        dtype: of keys and values, and of the output unless told.
    """

    query: Float[Array, "B K G T"]
    key: Float[Array, "B K 1 T"]
    value: Float[Array, "B K 1 T"]
    count: Float[Array, "b 1 1 T"]
    bias: Float[Array, "b k g t"] | None
    soft_cap: Float[Array, ""] | None
    head: int
    width: int
    dtype: Any


def sizes(inputs: "Inputs | Sizes") -> Sizes:
    """The sizes of a call in O((T + S) (H + E)) operations a head; what is one already stays."""
    if isinstance(inputs, Sizes):
        return inputs
    mask, dtype = inputs.mask, inputs.query.dtype
    first, last = mask.key_range()
    bias = inputs.bias
    return Sizes(
        query=norms(inputs.query),
        key=max_over_visible(mask, norms(inputs.key.astype(dtype))),
        value=max_over_visible(mask, norms(inputs.value.astype(dtype))),
        count=(last - first + 1).clip(0).astype(dtype)[:, None, None, :],
        bias=None if bias is None else jnp.where(jnp.isneginf(bias), 0, jnp.abs(bias).astype(dtype)).max(-1),
        soft_cap=inputs.soft_cap,
        head=inputs.query.shape[-1],
        width=inputs.value.shape[-1],
        dtype=inputs.key.dtype,
    )


def rounding_bound(
    inputs: Inputs | Sizes, *, rescalings: int, depth: int | None = None, fixed_shift: float = 0.0, output_dtype=None
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
        inputs: the operands, or their sizes.
        rescalings: how often a partial sum is rescaled by a new maximum.
        depth: the longest chain of additions that a term passes through; with tiles, the keys in one plus the
            number of tiles. Without it, all visible keys in any order.
        fixed_shift: L0, where rows with |logits| <= m <= L0 may have weights e^(l - m) for such an m instead of
            their maximum. The exponent counts with min(L, L0) + L0, and underflow grows by e to the same.
        output_dtype: the dtype to which the output is rounded; that of `inputs.key` unless given.
    """
    of = sizes(inputs)
    dtype, output_dtype = of.query.dtype, jnp.dtype(output_dtype or of.dtype)
    u_out = 0.0 if output_dtype == dtype else roundoff(output_dtype)
    size, n = _logit_bound(of), of.count
    reach = jnp.minimum(size, fixed_shift) + fixed_shift
    exponent = jnp.maximum(jnp.minimum(2 * size, jnp.log(jnp.maximum(n, 1))), reach)
    e = _sums(of, exponent, rescalings, depth)
    moved = 2 * jnp.tanh(logit_rounding(of) / 2) + 2 * e / jnp.where(e < 1, 1 - e, 0)
    lost = float(jnp.finfo(dtype).tiny) * (n + rescalings + jnp.exp(reach)) * (of.value + of.width**0.5)
    lost += float(jnp.finfo(output_dtype).smallest_subnormal) * of.width**0.5
    # One part in a thousand covers the rounding of this expression itself.
    bound = 1.001 * of.value * ((1 + u_out) * moved + u_out) + lost
    huge = float(jnp.finfo(dtype).max) / 4
    known = (of.head * of.query * of.key + size < huge) & (256 * n * of.value < huge) & (e < 1)
    return jnp.where(n > 0, jnp.where(known, bound, jnp.inf), 0)


def logit_rounding(inputs: Inputs | Sizes) -> Float[Array, "B K G T"]:
    """D, a bound on the rounding error of every logit that a query sees.

    gamma_H(u_p) |q| max|k| + 5 u |q| max|k| + 2 u L, and 10 u min(cap, |q| max|k|) with a cap, 2 u L with a bias.
    """
    of = sizes(inputs)
    u, H, dtype = roundoff(of.query.dtype), of.head, of.query.dtype
    score = of.query * of.key
    error = gamma(H * product_roundoff(dtype) + 5 * u) * score + 2 * u * _logit_bound(of)
    if of.soft_cap is not None:
        error += 10 * u * jnp.minimum(score, of.soft_cap)
    if of.bias is not None:
        error += 2 * u * _logit_bound(of)
    # Subnormal entries and products may count as zero.
    return error + float(jnp.finfo(dtype).tiny) * (H + H**0.5 * (of.query + of.key))


def sum_rounding(inputs: Inputs | Sizes, *, rescalings: int) -> Float[Array, "B K G T"]:
    """A bound on the relative error of a sum of e^(logit - max) over any of the keys, given the logits.

    As e in `rounding_bound`, with 2 L or what underflows first for the exponent, since such a sum may have no more
    than the smallest of the terms.
    """
    of = sizes(inputs)
    vanishing = 1 - math.log(float(jnp.finfo(of.query.dtype).smallest_subnormal))  # 104.3 in float32
    return _sums(of, jnp.minimum(2 * _logit_bound(of), vanishing), rescalings, None)


def calm_limit(inputs: Inputs | Sizes) -> Float[Array, "B K G T"]:
    """An upper bound on the size of the logits that each query sees, by norms; infinite where there is a bias.

    Of what comes after a query it knows nothing, and it has no gradient.
    """
    of = sizes(inputs)
    limit = lax.stop_gradient(of.query * of.key)
    if of.soft_cap is not None:
        limit = jnp.minimum(limit, of.soft_cap.astype(limit.dtype))
    return limit if of.bias is None else jnp.full_like(limit, jnp.inf)


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


def _sums(of: Sizes, exponent, rescalings: int, depth: int | None) -> Float[Array, "B K G T"]:
    """The relative error of sums of exponentials whose exponents are `exponent` or, on average, less."""
    dtype, n = of.query.dtype, of.count
    chain = n if depth is None else jnp.minimum(n, depth)
    factors = exponent + 6 * (jnp.minimum(n, rescalings) + 1)
    return gamma(chain * product_roundoff(dtype) + factors * roundoff(dtype))


def _logit_bound(of: Sizes) -> Float[Array, "B K G T"]:
    """L, with the soft cap and the bias."""
    score = of.query * of.key
    size = score if of.soft_cap is None else jnp.minimum(score, of.soft_cap)
    return size if of.bias is None else size + of.bias


def gamma(x):
    """X / (1 - x), which bounds the product of factors 1 + d whose |d| add up to x; infinite from x = 1."""
    return jnp.where(x < 1, x / jnp.where(x < 1, 1 - x, 1), jnp.inf)
