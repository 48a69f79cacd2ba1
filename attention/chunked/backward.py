"""The backward pass: cotangents of the operands from those of output and residual, tile by tile.

With P = exp(logits - residual) recomputed from what the forward pass kept, and c = d residual - rowsum(dO O),

    dV = P^T dO,    d logits = P (dO V^T + c),    dQ = dS K,    dK = dS^T Q,

where dS is d logits behind the soft cap, whose own cotangent and that of the bias are sums of it. A tile of keys is
held while the tiles of queries that see it pass by (Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1.2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.chunked.logits import (
    bias_tile,
    columns,
    in_units,
    key_in_units,
    rows,
    scores,
    shaped,
    upright,
    visible,
)
from attention.chunked.sizes import Tiling
from attention.chunked.spans import banded, irregular, span
from attention.exponential import power, unit
from attention.inputs import Inputs
from attention.rounding import product

Named = dict[str, jax.Array]


class _Results(NamedTuple):
    """What the backward pass knows of the rows of the results, with a row's numbers along the last axis or before it.

    Attributes:
        d_output: the cotangent of the output.
        level: the residual in units of `exponential.unit`.
        offset: d residual - rowsum(dO O).
    """

    d_output: Float[Array, "b k G T E"]
    level: Float[Array, "b k G T"]
    offset: Float[Array, "b k G T"]


def backward(inputs: Inputs, output, residual, cotangents, moving: tuple[str, ...], tiling: Tiling) -> Named:
    """The cotangents of the operands called `moving`, in the dtype of the output, given those of both results."""
    d_output, d_residual = cotangents
    # A row that sees no key has no weights: exp(l - inf) = 0.
    level = jnp.where(jnp.isneginf(residual), jnp.inf, residual) * unit(output.dtype)
    results = _Results(d_output, level, d_residual - (d_output * output).sum(-1))
    across = jnp.swapaxes(inputs.key, 2, 3)

    def group(shared: Named, n):
        corner = tiling.corner(n)
        part = inputs.part(corner[0], tiling.batch.size, corner[1], tiling.heads.size)
        own = _Results(*(tiling.heads_of(x, corner) for x in results))
        return _group(part, own, tiling.heads_of(across, corner), shared, corner, moving, tiling)

    shared = {n: jnp.zeros(getattr(inputs, n).shape, output.dtype) for n in ("bias", "soft_cap") if n in moving}
    shared, own = lax.scan(group, shared, jnp.arange(tiling.groups))
    return shared | {name: x.reshape(getattr(inputs, name).shape) for name, x in own.items()}


def _group(part: Inputs, results: _Results, across, shared: Named, corner, moving, tiling: Tiling):
    """One group of heads: `shared` grown by its part of the cotangents that groups share, and its own ones."""
    dtype, queries, keys = results.d_output.dtype, tiling.queries, tiling.keys
    spans = jax.vmap(lambda i: jnp.stack([jnp.asarray(x) for x in span(part.mask, i, queries, keys)]))
    first, _, _, end = spans(jnp.arange(queries.count)).T
    uprights = [_upright_tiles(x, tiling) for x in (part.query, results.d_output)]

    def key_tile(carry, j):
        key, value = (columns(x, tiling, j, dtype) for x in (part.key, part.value))
        up_key = columns(across, tiling, j, dtype, axis=3)
        reads = (first <= j) & (j < end)

        def add(i, carry):
            shared, d_query, held = carry
            pair = [x[i] for x in uprights]
            weights, d_scores, others = _tile(part, results, pair, key_in_units(key, part), value, tiling, i, j)
            seen_by = {"value": (weights, results.d_output), "key": (d_scores, part.query)}
            held = {
                name: x + product("BKSGT,BKGTH->BKSH", seen_by[name][0], rows(seen_by[name][1], tiling, i, axis=3))
                for name, x in held.items()
            }
            if "query" in moving:
                d_query = d_query.at[i].add(product("BKHS,BKSGT->BKHGT", up_key, d_scores))
            return _grown(shared, others, corner, queries.start(i), keys.start(j)), d_query, held

        held = {name: jnp.zeros_like(x) for name, x in (("key", key), ("value", value)) if name in moving}
        start, stop = reads.argmax(), jnp.where(reads.any(), queries.count - reads[::-1].argmax(), 0)
        shared, d_query, held = lax.fori_loop(start, stop, add, (*carry, held))
        return (shared, d_query), held

    d_query = jnp.zeros_like(uprights[0]) if "query" in moving else None
    (shared, d_query), own = lax.scan(key_tile, (shared, d_query), jnp.arange(keys.count))
    own = {name: keys.join(x, 2) for name, x in own.items()}
    if d_query is not None:
        own["query"] = queries.join(jnp.moveaxis(d_query, 3, 5), 3)
    return shared, own


def _tile(part: Inputs, results: _Results, uprights, key, value, tiling: Tiling, i, j):
    """The weights of a tile, the cotangent of its scores, and those of its soft cap and its bias."""
    up_query, up_output = uprights
    operands = {"soft_cap": part.soft_cap, "bias": bias_tile(part, tiling, i, j)}
    logits, pull = jax.vjp(lambda raw, given: shaped(raw, **given), scores(up_query, key), operands)
    weights = power(in_units(logits, part) - rows(results.level, tiling, i)[:, :, None])
    if banded(part.mask) or irregular(part.mask) or tiling.keys.overlap:
        weights = jnp.where(visible(part, tiling, i, j), weights, 0)
    if tiling.queries.overlap:  # rows that the last tile shares with the one before count once
        weights = jnp.where(tiling.queries.owned(i).reshape(1, 1, 1, 1, -1), weights, 0)
    change = scores(up_output, value) + rows(results.offset, tiling, i)[:, :, None]
    return weights, *pull(weights * change)


def _upright_tiles(x: Float[Array, "b k G T H"], tiling: Tiling) -> Float[Array, "count b k H G R"]:
    """All tiles of queries, upright, stacked."""
    return lax.map(lambda i: upright(rows(x, tiling, i, axis=3)), jnp.arange(tiling.queries.count))


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
