"""The derivative of tiled attention: one linear map, which is forward mode, and whose transpose is the backward pass.

With P = exp(logits - residual) recomputed tile by tile, a change of the operands moves the logits by dl and

    d residual = rowsum(P dl),    d output = (P dl) V + P dV - output rowsum(P dl).

That map is written once, linear in the tangents, with every tile under `jax.checkpoint`, and it is the definition:
JAX derives second and mixed derivatives from it. What reverse mode runs is the transpose in `backward`, of five matrix
products a tile; nothing is kept from the forward pass but the output and one number a row.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from attention.chunked.backward import backward
from attention.chunked.decode import decode, is_few
from attention.chunked.linear_map import LinearMap, apply
from attention.chunked.online import attend
from attention.chunked.sizes import Tiling
from attention.chunked.spans import banded, span
from attention.exact import weighted_values
from attention.inputs import Inputs, emptied
from attention.masks import slice_or_keep
from attention.tiles import Tiles

Tangents = dict[str, jax.Array]

_OPERANDS = ("query", "key", "value", "bias", "soft_cap")

# The axis along which each operand is cut by the loops over batch elements, key heads, queries and keys.
_BATCH = {"query": 0, "key": 0, "value": 0, "bias": 0}
_HEADS = {"query": 1, "key": 1, "value": 1, "bias": 1}
_QUERIES = {"query": 3, "bias": 3}
_KEYS = {"key": 2, "value": 2, "bias": 4}


def attention(inputs: Inputs, tiling: Tiling):
    """`online.attend`, or `decode` for a few queries, with the derivative of this file."""
    operands = {name: getattr(inputs, name) for name in _OPERANDS if getattr(inputs, name) is not None}
    arrays, form = jax.tree.flatten((inputs.mask, inputs.beta))
    return _attention(operands, arrays, form, tiling)


# The mask travels as bare arrays, because its tangents are no mask; and beta, which the query carries, moves nothing.
@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _attention(operands: Tangents, arrays: list[jax.Array], form, tiling: Tiling):
    inputs = _inputs(operands, arrays, form)
    return decode(inputs) if is_few(inputs) else attend(inputs, tiling)


@partial(_attention.defjvp, symbolic_zeros=True)
def _attention_jvp(form, tiling, primals, tangents):
    operands, arrays = primals
    results = _attention(operands, arrays, form, tiling)
    moving = {name: x for name, x in tangents[0].items() if not isinstance(x, SymbolicZero)}
    # Accumulated in the precision of the query, and rounded to that of the operand once, at the end.
    moving = {name: x.astype(results[0].dtype) for name, x in moving.items()}
    constants, structure = jax.tree.flatten((operands, arrays, results))
    names = tuple(sorted(moving))

    def known(leaves):
        operands, arrays, results = jax.tree.unflatten(structure, leaves)
        return emptied(_inputs(operands, arrays, form)), *results

    def definition(leaves, tangents):
        return list(tangent_of(*known(leaves), dict(zip(names, tangents, strict=True)), tiling))

    def transpose(leaves, cotangents):
        found = backward(*known(leaves), cotangents, names, tiling)
        return [found[name] for name in names]

    return results, apply(LinearMap(definition, transpose), constants, moving, results)


def _inputs(operands: Tangents, arrays: list[jax.Array], form) -> Inputs:
    mask, beta = jax.tree.unflatten(form, arrays)
    return Inputs(mask=mask, beta=beta, **operands)


def tangent_of(inputs: Inputs, output, residual, tangents: Tangents, tiling: Tiling):
    """The tangents of output and residual, linear in `tangents`, which has the operands that move, by name."""
    (B, K), queries, keys = inputs.key.shape[:2], tiling.queries, tiling.keys

    def batch(b, tangents):
        return _mapped(partial(head, b), tangents, _HEADS, Tiles(K, 1))

    def head(b, k, tangents):
        one = inputs.part(b, 1, k, 1)
        mine = [lax.dynamic_slice(x, (b, k, *(0,) * (x.ndim - 2)), (1, 1, *x.shape[2:])) for x in (output, residual)]
        tiles = _mapped(partial(_query_tile, one, *mine, queries, keys), tangents, _QUERIES, queries)
        return queries.join(tiles[0], 3), queries.join(tiles[1], 3)

    moved = _mapped(batch, tangents, _BATCH, Tiles(B, 1))
    return tuple(x.reshape(y.shape) for x, y in zip(moved, (output, residual), strict=True))


def _query_tile(head: Inputs, output, residual, queries: Tiles, keys: Tiles, i, tangents: Tangents):
    """The tangents of output and residual in query tile i of one head."""
    row = queries.start(i)
    query, output, residual = (
        lax.dynamic_slice_in_dim(x, row, queries.size, axis=3) for x in (head.query, output, residual)
    )
    reads = span(head.mask, i, queries, keys)
    # A row that sees no key has no weights: exp(l - inf) = 0.
    level = jnp.where(jnp.isneginf(residual), jnp.inf, residual)

    def add(j, tangents, carry):
        weighted, moved = carry
        tile = _tile(head, query, row, queries, keys.start(j), keys)
        seen = head.mask.tile(row, queries.size, keys.start(j), keys.size)
        weights, change = _weights(tile, level, seen & keys.owned(j).reshape(1, 1, 1, 1, -1), tangents)
        if change is not None:
            change = weights * change
            weighted += weighted_values(change, tile.value)
            moved += change.sum(-1)
        if "value" in tangents:
            weighted += weighted_values(weights, tangents["value"])
        return weighted, moved

    def step(carry, tile):
        j, scanned = tile
        here = fixed | scanned
        if not banded(head.mask):
            return add(j, here, carry), None
        wanted = (reads.first <= j) & (j < reads.end)
        return lax.cond(wanted, add, lambda j, tangents, carry: carry, j, here, carry), None

    scanned, fixed = _told_apart(tangents, _KEYS, keys)
    none = (jnp.zeros_like(output), jnp.zeros_like(residual))
    tiles = (jnp.arange(keys.count), scanned)
    (weighted, moved), _ = lax.scan(jax.checkpoint(step, prevent_cse=False), none, tiles)
    return weighted - output * moved[..., None], moved


def _tile(head: Inputs, query, row, queries: Tiles, col, keys: Tiles) -> Inputs:
    """The operands of one tile, in the precision of the query; the mask stays that of the head."""
    key, value = (lax.dynamic_slice_in_dim(x, col, keys.size, axis=2) for x in (head.key, head.value))
    bias = head.bias
    if bias is not None:
        bias = slice_or_keep(slice_or_keep(bias, row, queries.size, 3), col, keys.size, 4).astype(query.dtype)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return dataclasses.replace(head, query=query, key=key, value=value, bias=bias)


def _weights(tile: Inputs, level, seen, tangents: Tangents):
    """The softmax weights of a tile, and how far its logits move; None where nothing moves them."""

    def logits(moving):
        queries, keys = tile.query.shape[3], tile.key.shape[2]
        return jnp.where(seen, dataclasses.replace(tile, **moving).scores(0, queries, 0, keys), -jnp.inf)

    moving = {name: tangent for name, tangent in tangents.items() if name != "value"}
    if not moving:
        return jnp.exp(logits({}) - level[..., None]), None
    at, change = jax.jvp(logits, ({name: getattr(tile, name) for name in moving},), (moving,))
    return jnp.exp(at - level[..., None]), change


def _told_apart(tangents: Tangents, axes: dict[str, int], tiles: Tiles) -> tuple[Tangents, Tangents]:
    """The tangents that a loop over tiles takes one at a time, split; and those that every tile shares."""
    # An axis of size 1 stands for every index, unless the axis itself has that length and then both mean the same.
    cut = {n for n in tangents if n in axes and tangents[n].shape[axes[n]] == tiles.length}
    split = {name: tiles.split(tangents[name], axes[name]) for name in sorted(cut)}
    return split, {name: x for name, x in tangents.items() if name not in cut}


def _mapped(body, tangents: Tangents, axes: dict[str, int], tiles: Tiles):
    """`body(i, tangents of tile i)` for every tile, stacked; the body is recomputed when it is transposed."""
    if tiles.count == 1:
        return jax.tree.map(lambda x: x[None], body(0, tangents))
    scanned, fixed = _told_apart(tangents, axes, tiles)
    again = jax.checkpoint(lambda i, scanned, fixed: body(i, fixed | scanned), prevent_cse=False)
    return lax.map(lambda tile: again(*tile, fixed), (jnp.arange(tiles.count), scanned))
