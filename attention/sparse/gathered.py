"""Softmax attention of a few rows over the keys that were gathered for them."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exponential import finite, smooth_power, unit
from attention.logits import soft_capped
from attention.rounding import CALM, product
from attention.sparse.online import across
from attention.tiles import divisor

FEW = 4  # rows that read keys and values as they lie
CHUNK = 64  # keys of a product of these


class Found(NamedTuple):
    """What some rows made of the keys that they read.

    Attributes:
        output: the weighted mean of the values; 0 where no key was visible.
        level: a number that no logit exceeds.
        total: sum(exp(logit - level)) over the visible keys that were read.
    """

    output: Float[Array, "G R E"]
    level: Float[Array, "G R"]
    total: Float[Array, "G R"]


def attend(
    query: Float[Array, "G R H"],
    key: Float[Array, "n H"],
    value: Float[Array, "n E"],
    visible: Bool[Array, "g R n"] | Callable[[], Bool[Array, "g R n"]],
    soft_cap: Float[Array, ""] | None,
    limit: Float[Array, "G R"] | None,
) -> Found:
    """Softmax over the n gathered keys that each row sees.

    Maximum and weights both use the masked logits, which are made once for both if `visible` is an array, and by each
    if it is a function: that saves a pass over the logits, and pays where the mask is simple.

    The products are of row-major operands with the keys in front, which on a CPU needs no transposed tile; a row of
    ones under the values adds up the weights. Rows whose logits are within `limit` <= CALM take that for their level,
    which saves a pass over the logits where all rows of the tile do.

    Cost: 2 G R n (H + E) operations, and G R n logits in memory.
    """
    if query.shape[0] * query.shape[1] <= FEW:
        return _few(query, key, value, visible if isinstance(visible, Array) else visible(), soft_cap)
    dtype = query.dtype
    upright = jnp.moveaxis(query, 2, 0)
    if soft_cap is None:  # the unit costs less on the keys than on the logits
        logits = product("nH,HGR->nGR", key.astype(dtype) * unit(dtype), upright)
    else:
        logits = soft_capped(product("nH,HGR->nGR", key.astype(dtype), upright), soft_cap) * unit(dtype)

    def masked(seen: Bool[Array, "g R n"]):
        return jnp.where(jnp.moveaxis(seen, 2, 0), logits, -jnp.inf)

    once = masked(visible) if isinstance(visible, Array) else None

    def shown():
        return masked(visible()) if not isinstance(visible, Array) else once

    level = lax.stop_gradient(_level(shown, limit))
    weights = smooth_power(shown() - level[None])
    sums = product("En,nGR->EGR", across(value, dtype), weights)
    total = sums[-1]
    output = sums[:-1] / jnp.where(total > 0, total, 1)[None]
    return Found(jnp.moveaxis(output, 0, 2), level / unit(dtype), lax.stop_gradient(total))


def _few(query, key, value, visible, soft_cap) -> Found:
    """`attend` without a copy of keys or values, which costs more than the arithmetic of a few rows."""
    dtype, n = query.dtype, key.shape[0]
    logits = jnp.moveaxis(product("nH,HGR->nGR", key.astype(dtype), jnp.moveaxis(query, 2, 0)), 0, 2)
    logits = jnp.where(visible, soft_capped(logits, soft_cap), -jnp.inf)
    level = finite(lax.stop_gradient(logits.max(-1)))
    weights = jnp.exp(logits - level[..., None])
    total = weights.sum(-1)
    # In one sum over all keys, the product of a batch of heads would be a plain loop.
    C = divisor(n, CHUNK)
    parts = product(
        "GRmC,mCE->mGRE", weights.reshape(*total.shape, -1, C), value.astype(dtype).reshape(-1, C, value.shape[1])
    )
    output = parts.sum(0) / jnp.where(total > 0, total, 1)[..., None]
    return Found(output, level, lax.stop_gradient(total))


def _level(logits: Callable[[], Float[Array, "n G R"]], limit: Float[Array, "G R"] | None) -> Float[Array, "G R"]:
    """What is subtracted from the logits, in units: a row's own limit or maximum, whatever others in its tile do."""

    def largest():
        return finite(lax.stop_gradient(logits()).max(0))

    if limit is None:
        return largest()
    calm, level = limit <= CALM, limit * unit(limit.dtype)
    return lax.cond(calm.all(), lambda: level, lambda: jnp.where(calm, level, largest()))
