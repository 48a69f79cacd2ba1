"""Certificates of a sampled tail: sound ranges of its terms, and the statistics of what was drawn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.inputs import Inputs
from attention.rounding import norms, product, product_roundoff, roundoff
from attention.sparse.bounds import value_reach
from attention.sparse.deviations import Sample, sampled_bound
from attention.sparse.moments import outward
from attention.sparse.pages import sound_box_bound
from attention.sparse.segments import Sorted
from attention.sparse.tail import Tile, Weighted


class Limits(NamedTuple):
    """Running maxima and sums along the keys of each head, and how far apart two values of a row may be."""

    key: Float[Array, "BK S"]
    key_spread: Float[Array, "BK S"]
    value: Float[Array, "BK S"]
    value_spread: Float[Array, "BK S"]
    sums: Float[Array, "BK S E"]
    apart: Float[Array, "BK T"]


def limits_of(inputs: Inputs, order: Sorted | None) -> Limits:
    """With segments along the keys in their order, and anew in each; otherwise `order` is None."""
    dtype, apart = inputs.query.dtype, value_reach(inputs)[:, :, 0]
    wide = outward(dtype, max(inputs.key.shape[-1], inputs.value.shape[-1]))
    apart = jnp.broadcast_to(apart, (*inputs.key.shape[:2], inputs.mask.num_queries))

    def head(key, value, order):
        if order is None:
            begins, start = jnp.arange(len(key)) == 0, jnp.zeros(len(key), jnp.int32)
        else:
            key, value, start = key[order.key], value[order.key], order.start
            begins = start == jnp.arange(len(key))
        of_values = value - value[start]
        lengths = (wide * norms(x) for x in (key, key - key[start], value, of_values))
        return *(_running(jnp.maximum, x, begins) for x in lengths), _running(jnp.add, of_values, begins)

    heads = jax.vmap(jax.vmap(head, (0, 0, None)))
    found = heads(inputs.key.astype(dtype), inputs.value.astype(dtype), order)
    return Limits(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (*found, apart)))


def _running(join, x: Float[Array, "S ..."], begins: Bool[Array, " S"]) -> Float[Array, "S ..."]:
    """Running maxima or sums along the first axis, which begin anew where they are told to."""

    def joined(before, after):
        begun = after[0].reshape(-1, *[1] * (x.ndim - 1))
        return before[0] | after[0], jnp.where(begun, after[1], join(before[1], after[1]))

    return lax.associative_scan(joined, (begins, x))[1]


def row_bounds(part: Inputs, tile: Tile, found: Weighted, own: Limits, box, rounding, odds, delta: float):
    """The error bound and the dropped mass of the rows of a tile; `box` are the boxes of the pages, or None."""
    sample, centre = _sample(part, tile, found, own, box)
    away = outward(rounding.dtype, centre.size) * norms(found.output - centre[None, None]) + rounding
    error, mass = sampled_bound(sample, away, odds, delta)
    error = jnp.fmin(error, own.apart[tile.at][None])
    some = (found.total > 0) | (tile.count == 0)  # an output of 0 is no mean of values
    return jnp.where(some, 1.001 * error + rounding, jnp.inf), jnp.where(some, mass, 1)


def _sample(part: Inputs, tile: Tile, found: Weighted, own: Limits, box) -> tuple[Sample, Float[Array, " E"]]:
    """The statistics of a sample, and the vector c around which those of the values are: the mean of the tail."""
    query, first, m = part.query[0, 0][:, tile.at], part.key[0, 0, tile.lead].astype(part.query.dtype), tile.sampled
    dtype, H, tail = query.dtype, query.shape[-1], tile.tail
    last = jnp.where(tail.count > tail.before, tail.resume + tail.count - tail.before, tail.begin + tail.before) - 1

    def upto(x, index):
        return jnp.where(index >= 0, jnp.take(x, tile.first + index.clip(0), axis=0, mode="clip"), 0)

    ends = (tail.begin + tail.before - 1, tail.begin - 1, last, tail.resume - 1)
    sums = [upto(own.sums, end) for end in ends]
    after = jnp.where(tail.count > tail.before, sums[2] - sums[3], 0)
    offset = (sums[0] - sums[1] + after) / jnp.maximum(tail.count, 1)
    base = part.value[0, 0, tile.lead].astype(dtype)
    wide = outward(dtype, base.size)
    centre = base + offset
    radius = jnp.minimum(upto(own.value_spread, last) + norms(base - centre), upto(own.value, last) + norms(centre))
    radius = wide * (radius + 4 * roundoff(dtype) * norms(base))
    unit = jnp.where(radius > 0, radius, 1)
    distance = norms(found.value[-m:] - centre[None]) / unit

    length, along = outward(dtype, H) * norms(query), product("GRH,H->GR", query, first)
    near = along + length * (upto(own.key_spread, last) + (2 * H + 8) * product_roundoff(dtype) * norms(first))
    reach = jnp.minimum(length * upto(own.key, last), near)
    reach = reach if part.soft_cap is None else jnp.minimum(reach, part.soft_cap)
    if box is not None and tile.rest is not None:  # of the pages that are left to the sample
        above = jnp.where(tile.rest, sound_box_bound(query, box, part.soft_cap), -jnp.inf).max(-1)
        reach = jnp.where(tile.rest.any(), jnp.minimum(reach, above), reach)
    slack = 8 * roundoff(dtype) * (jnp.abs(reach) + jnp.abs(found.level) + jnp.abs(along))
    weights, vanished = found.weights[..., -m:], float(jnp.finfo(dtype).tiny) ** 0.5
    mean = weights.mean(-1)
    return Sample(
        count=tile.count.astype(dtype),
        size=m,
        kept=found.weights[..., :-m].sum(-1),
        mean=mean,
        deviation=jnp.sqrt(((weights - mean[..., None]) ** 2).sum(-1) / max(m - 1, 1)) + vanished,
        root=jnp.sqrt((weights**2).mean(-1)) + vanished,
        moment=jnp.sqrt(((weights * distance[None, None]) ** 2).mean(-1)) + vanished,
        most=1.001 * jnp.exp(reach - found.level + slack),
        radius=radius,
    ), centre
