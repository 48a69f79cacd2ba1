"""Few queries and many keys: what a decoding step is, and what memory bandwidth limits.

A tile's transpositions would copy the keys, so they are read as they lie, with all heads of a token together: the
queries of K heads stand in a block-diagonal matrix, whose product with the keys is K times the arithmetic of the
separate products and no copy. The values are read the same way, and their diagonal blocks kept.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.exponential import finite
from attention.inputs import Inputs
from attention.logits import soft_capped
from attention.rounding import product
from attention.tiles import divisor

# Rows of all heads, up to which their arithmetic takes less time than reading the keys.
FEW = 32
# Keys of a product: as many as its library can repack within the caches. Their sums are added up afterwards.
CHUNK = 128


def is_few(inputs: Inputs) -> bool:
    """Whether the queries are few enough for `decode`, and fewer than the keys."""
    _, K, G, T, _ = inputs.query.shape
    return K * G * T <= FEW and inputs.mask.num_keys > T


def decode(inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
    """The output and log(sum(exp(logits))) of a few queries, in one pass over the keys and one over the values.

    Slots that no query sees may hold anything. Their weight is zero, so that only an Inf or NaN among their values can
    reach the output; if one is there, they are emptied and the same is done again, which the hot path is spared.
    """
    key, value = (jnp.swapaxes(x, 1, 2) for x in (inputs.key, inputs.value))
    output, residual = _attend(inputs, inputs.query, key, value)
    if inputs.mask.uses_everything:
        return output, residual

    def again():
        queries, keys = inputs.mask.used()
        used = jnp.swapaxes(keys, 1, 2)[..., None]
        query = jnp.where(queries[..., None], inputs.query, 0)
        return _attend(inputs, query, *(jnp.where(used, x, jnp.zeros_like(x)) for x in (key, value)))

    return lax.cond(jnp.isfinite(output).all(), lambda: (output, residual), again)


def _attend(inputs: Inputs, query, key: Float[Array, "B S K H"], value: Float[Array, "B S K E"]):
    dtype, (B, K, G, T, H), S = query.dtype, query.shape, key.shape[1]
    C = chunk if (chunk := divisor(S, CHUNK)) > CHUNK // 4 else S
    key, value = (x.astype(dtype).reshape(B, S // C, C, -1) for x in (key, value))
    blocks = jnp.eye(K, dtype=dtype).reshape(1, K, 1, 1, K, 1)
    query = (query[:, :, :, :, None, :] * blocks).reshape(B, K * G * T, K * H)
    logits = jnp.moveaxis(product("BRX,BNCX->BNRC", query, key), 1, 2).reshape(B, K, G, T, S)
    logits = soft_capped(logits, inputs.soft_cap)
    if inputs.bias is not None:
        logits = logits + inputs.bias.astype(dtype)
    logits = jnp.where(inputs.mask.whole(), logits, -jnp.inf)
    top = logits.max(-1)
    weights = jnp.exp(logits - finite(top)[..., None])
    total = weights.sum(-1)
    every = product("BRNC,BNCX->BNRX", weights.reshape(B, K * G * T, S // C, C), value).sum(1)
    output = (every.reshape(B, K, G, T, K, -1) * blocks).sum(4) / jnp.where(total > 0, total, 1)[..., None]
    return output, jnp.log(total) + top
