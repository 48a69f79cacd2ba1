"""Softmax attention of a few rows over the keys that were gathered for them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exponential import smooth_power, unit
from attention.logits import soft_capped


class Found(NamedTuple):
    """What some rows made of the keys that they read.

    Attributes:
        output: the weighted mean of the values; 0 where no key was visible.
        level: the largest logit, 0 where no key was visible.
        total: sum(exp(logit - level)) over the visible keys that were read.
    """

    output: Float[Array, "G R E"]
    level: Float[Array, "G R"]
    total: Float[Array, "G R"]


def attend(
    query: Float[Array, "G R H"],
    key: Float[Array, "n H"],
    value: Float[Array, "n E"],
    visible: Bool[Array, "g R n"],
    soft_cap: Float[Array, ""] | None,
) -> Found:
    """Softmax over the n gathered keys that each row sees.

    The products have the keys in front, which on a CPU needs no transposed tile. What no row sees may hold anything.

    Cost: 2 G R n (H + E) operations, and G R n logits in memory.
    """
    dtype = query.dtype
    seen = visible.any((0, 1))[:, None]
    key, value = (jnp.where(seen, x, jnp.zeros_like(x)).astype(dtype) for x in (key, value))
    visible = jnp.moveaxis(visible, 2, 0)
    if soft_cap is None:  # the unit costs less on the keys than on the logits
        logits = _product("nH,GRH->nGR", key * unit(dtype), query)
    else:
        logits = soft_capped(_product("nH,GRH->nGR", key, query), soft_cap) * unit(dtype)
    logits = jnp.where(visible, logits, -jnp.inf)
    level = lax.stop_gradient(logits.max(0))
    level = jnp.where(jnp.isneginf(level), 0, level)
    weights = smooth_power(logits - level)
    total = weights.sum(0)
    output = _product("nE,nGR->EGR", value, weights) / jnp.where(total > 0, total, 1)
    return Found(jnp.moveaxis(output, 0, 2), level / unit(dtype), lax.stop_gradient(total))


def _product(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)
