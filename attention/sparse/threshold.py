"""The k-th largest logit of each row, without a sort."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def kth_largest(logits: Float[Array, "*N S"], k: int) -> Float[Array, "*N 1"]:
    r"""A threshold t with {j : x_j >= t} = the k largest entries above -inf and all that tie with the last of them.

    Floats compare as integers do once the bits of the negative ones are flipped. Bisection over those integers
    keeps #{x >= low} >= k > #{x >= high}, and stops in a row when #{x >= low} = k, or when `low` is the k-th
    entry itself: after at most 33 passes over a float32 row (65 float64), one compare and one add an entry each.
    Rows with no more than k entries above -inf get the smallest of these, or +inf where there is none.

    Exact: no tolerance, and independent of the order of the entries. No gradient.
    """
    logits = lax.stop_gradient(logits)
    exists = logits > -jnp.inf
    smallest = jnp.where(exists, logits, jnp.inf).min(-1, keepdims=True)
    start = (_to_integer(smallest), _to_integer(logits.max(-1, keepdims=True)) + 1, _count(exists))
    bits = 8 * logits.dtype.itemsize

    def unsettled(carry):
        step, (low, high, count) = carry
        return (step <= bits) & ((count > k) & (high - low > 1)).any()

    def halve(carry):
        step, (low, high, count) = carry
        middle = low + (high - low) // 2
        above = _count(logits >= _to_float(middle, logits.dtype))
        settled, enough = count <= k, above >= k
        low, count = (jnp.where(settled | ~enough, a, b) for a, b in ((low, middle), (count, above)))
        return step + 1, (low, jnp.where(settled | enough, high, middle), count)

    _, (low, _, _) = lax.while_loop(unsettled, halve, (0, start))
    return _to_float(low, logits.dtype)


def _count(condition: Array) -> Array:
    return condition.sum(-1, keepdims=True, dtype=jnp.int32)


def _to_integer(x: Array) -> Array:
    """Unsigned integers in the order of the floats: the sign bit flipped, or all bits of a negative number."""
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits, sign = lax.bitcast_convert_type(x, unsigned), _sign(unsigned)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _to_float(integer: Array, dtype) -> Array:
    """The inverse of `_to_integer`."""
    sign = _sign(integer.dtype)
    return lax.bitcast_convert_type(jnp.where(integer >= sign, integer ^ sign, ~integer), dtype)


def _sign(unsigned) -> Array:
    return jnp.array(1 << (jnp.iinfo(unsigned).bits - 1), unsigned)
