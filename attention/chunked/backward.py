"""The backward pass: cotangents of the operands from those of output and residual, tile by tile.

With P = exp(logits - residual) recomputed from what the forward pass kept, and c = d residual - rowsum(dO O),

    dV = P^T dO,    d logits = P (dO V^T + c),    dQ = dS K,    dK = dS^T Q,

where dS is d logits behind the soft cap, whose own cotangent and that of the bias are sums of it. A tile of keys is
held while the tiles of queries that see it pass by (Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1.2).
"""

import jax
import jax.numpy as jnp
from jax import lax

from attention.chunked.exponential import power, unit
from attention.chunked.logits import (
    bias_tile,
    columns,
    in_units,
    key_in_units,
    product,
    rows,
    scores,
    shaped,
    upright,
    visible,
)
from attention.chunked.sizes import Tiling
from attention.chunked.tiles import banded, irregular, span
from attention.inputs import Inputs

Named = dict[str, jax.Array]


def backward(inputs: Inputs, output, residual, cotangents, moving: tuple[str, ...], tiling: Tiling) -> Named:
    """The cotangents of the operands called `moving`, in the dtype of the output, given those of both results."""
    dtype, d_output = output.dtype, cotangents[0]
    # A row that sees no key has no weights: exp(l - inf) = 0.
    level = jnp.where(jnp.isneginf(residual), jnp.inf, residual) * unit(dtype)
    offset = cotangents[1] - (d_output * output).sum(-1)
    up_key = jnp.swapaxes(inputs.key, 2, 3)

    def group(shared: Named, n):
        corner = tiling.corner(n)
        part = inputs.part(corner[0], tiling.batch.size, corner[1], tiling.heads.size)
        own = [tiling.heads_of(x, corner) for x in (d_output, level, offset, up_key)]
        return _group(part, *own, shared, corner, moving, tiling)

    shared = {name: jnp.zeros(getattr(inputs, name).shape, dtype) for name in ("bias", "soft_cap") if name in moving}
    shared, own = lax.scan(group, shared, jnp.arange(tiling.groups))
    return shared | {name: x.reshape(getattr(inputs, name).shape) for name, x in own.items()}


def _group(part: Inputs, d_output, level, offset, up_key, shared: Named, corner, moving, tiling: Tiling):
    """One group of heads: `shared` grown by its part of the cotangents that groups share, and its own ones."""
    dtype, queries, keys = d_output.dtype, tiling.queries, tiling.keys
    spans = jax.vmap(lambda i: jnp.stack([jnp.asarray(x) for x in span(part.mask, i, queries, keys)]))
    first, _, _, end = spans(jnp.arange(queries.count)).T
    up_query, up_output = (
        lax.map(lambda i, x=x: upright(rows(x, tiling, i, axis=3)), jnp.arange(queries.count))
        for x in (part.query, d_output)
    )
    masked = banded(part.mask) or irregular(part.mask) or keys.overlap > 0

    def key_tile(carry, j):
        key, value = (columns(x, tiling, j, dtype) for x in (part.key, part.value))
        across = lax.dynamic_slice_in_dim(up_key, keys.start(j), keys.size, axis=3).astype(dtype)
        reads = (first <= j) & (j < end)

        def add(i, carry):
            shared, d_query, held = carry
            query, d_out = (rows(x, tiling, i, axis=3) for x in (part.query, d_output))
            operands = {"soft_cap": part.soft_cap, "bias": bias_tile(part, tiling, i, j)}
            logits, pull = jax.vjp(
                lambda raw, given: shaped(raw, **given), scores(up_query[i], key_in_units(key, part)), operands
            )
            weights = power(in_units(logits, part) - rows(level, tiling, i)[:, :, None])
            if masked:
                weights = jnp.where(visible(part, tiling, i, j), weights, 0)
            if queries.overlap:  # rows that the last tile shares with the one before count once
                weights = jnp.where(queries.owned(i).reshape(1, 1, 1, 1, -1), weights, 0)
            change = scores(up_output[i], value) + rows(offset, tiling, i)[:, :, None]
            d_scores, others = pull(weights * change)
            held = dict(held)
            if "value" in moving:
                held["value"] += product("BKSGT,BKGTE->BKSE", weights, d_out)
            if "key" in moving:
                held["key"] += product("BKSGT,BKGTH->BKSH", d_scores, query)
            if "query" in moving:
                moved = product("BKHS,BKSGT->BKHGT", across, d_scores)
                d_query = d_query.at[i].add(moved)
            return _grown(shared, others, corner, queries.start(i), keys.start(j)), d_query, held

        held = {name: jnp.zeros_like(x) for name, x in (("key", key), ("value", value)) if name in moving}
        start, stop = reads.argmax(), jnp.where(reads.any(), queries.count - reads[::-1].argmax(), 0)
        shared, d_query, held = lax.fori_loop(start, stop, add, (*carry, held))
        return (shared, d_query), held

    d_query = jnp.zeros_like(up_query) if "query" in moving else None
    (shared, d_query), own = lax.scan(key_tile, (shared, d_query), jnp.arange(keys.count))
    own = {name: keys.join(x, 2) for name, x in own.items()}
    if d_query is not None:
        own["query"] = queries.join(jnp.moveaxis(d_query, 3, 5), 3)
    return shared, own


def _grown(shared: Named, tile: dict, corner, row, col) -> Named:
    """`shared` with the cotangents of one tile added where they belong."""
    grown = dict(shared)
    if "soft_cap" in shared:
        grown["soft_cap"] += tile["soft_cap"]
    if "bias" in shared:
        whole = shared["bias"].shape
        at = [n if size > 1 else 0 for n, size in zip((*corner, 0, row, col), whole, strict=True)]
        old = lax.dynamic_slice(shared["bias"], at, tile["bias"].shape)
        grown["bias"] = lax.dynamic_update_slice(shared["bias"], old + tile["bias"], at)
    return grown
