"""Online softmax: the output of a query tile, gathered over tiles of keys."""

from collections.abc import Callable
from typing import Any, NamedTuple

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
from attention.chunked.spans import Span, banded, irregular, span
from attention.exponential import finite, power, unit
from attention.inputs import Inputs
from attention.rounding import CALM, max_over_visible, norms, product
from attention.tiles import Tiles


class Partial(NamedTuple):
    """What some of the keys contribute to a tile of queries.

    Attributes:
        level: a number that no logit exceeds, in units of `exponential.unit`; -inf where no key was seen.
        sums: sum(exp(logit - level) v), and in the last row sum(exp(logit - level)).
    """

    level: Float[Array, "b k G R"]
    sums: Float[Array, "b k E+1 G R"]

    def output(self) -> Float[Array, "b k E G R"]:
        """The weighted mean of the values; 0 where no key was seen."""
        total = self.sums[:, :, -1:]
        return self.sums[:, :, :-1] / jnp.where(total > 0, total, 1)

    def residual(self) -> Float[Array, "b k G R"]:
        """log(sum(exp(logits))); -inf where no key was seen."""
        return jnp.log(self.sums[:, :, -1]) + self.level / unit(self.level.dtype)


def attend(inputs: Inputs, tiling: Tiling) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
    """The output and log(sum(exp(logits))) of every query, a tile of a few heads at a time."""
    value = jnp.swapaxes(inputs.value, 2, 3)

    def group(n):
        corner = tiling.corner(n)
        part = inputs.part(corner[0], tiling.batch.size, corner[1], tiling.heads.size)
        limit, own = _limit(part), tiling.heads_of(value, corner)
        output, residual = repeated(lambda i: _query_tile(part, own, limit, tiling, i), tiling.queries.count)
        return tiling.queries.join(output, 4), tiling.queries.join(residual, 3)

    output, residual = repeated(group, tiling.groups)
    (B, K, G, T), E = inputs.query.shape[:4], inputs.value.shape[-1]
    return jnp.moveaxis(output.reshape(B, K, E, G, T), 2, 4), residual.reshape(B, K, G, T)


def _limit(inputs: Inputs) -> Float[Array, "b k G T"]:
    """An upper bound on the size of the logits that each query sees; infinite where there is a bias."""
    lengths = norms(inputs.key.astype(inputs.query.dtype))
    # Of the keys that a query sees alone: what comes after it must not move a bit of its output.
    longest = max_over_visible(inputs.mask, lengths) if banded(inputs.mask) else lengths.max(-1)[..., None, None]
    limit = norms(inputs.query) * longest
    if inputs.soft_cap is not None:
        limit = jnp.minimum(limit, inputs.soft_cap.astype(limit.dtype))
    return limit if inputs.bias is None else jnp.full_like(limit, jnp.inf)


def _query_tile(part: Inputs, value, limit, tiling: Tiling, i):
    """The output and residual of query tile i of a group of heads."""
    query, limit = upright(rows(part.query, tiling, i, axis=3)), rows(limit, tiling, i)
    calm = limit <= CALM
    level = jnp.where(calm, limit * unit(limit.dtype), -jnp.inf)
    found = Partial(level, jnp.zeros((*value.shape[:2], value.shape[2] + 1, *level.shape[2:]), level.dtype))
    for start, stop, masked in _stretches(part, span(part.mask, i, tiling.queries, tiling.keys), tiling.keys):
        found = lax.fori_loop(start, stop, _step(part, query, value, calm, tiling, i, masked), found)
    return found.output(), found.residual()


def _stretches(part: Inputs, tiles: Span, keys: Tiles) -> list[tuple[Any, Any, bool]]:
    """The loops over key tiles that a mask asks for: only the edges of a band are masked."""
    stretches = []
    if part.mask.window is not None and not irregular(part.mask):
        stretches.append((tiles.first, tiles.open, True))
    if not irregular(part.mask):
        stretches.append((tiles.open, tiles.shut, False))
    if banded(part.mask) or irregular(part.mask) or keys.overlap:
        stretches.append((tiles.shut, tiles.end, True))
    return stretches


def _step(part: Inputs, query, value, calm, tiling: Tiling, i, masked: bool) -> Callable[[Any, Partial], Partial]:
    """The loop body that adds key tile j."""

    def step(j, found: Partial) -> Partial:
        raw = scores(query, key_in_units(columns(part.key, tiling, j, query.dtype), part))

        def logits():
            shown = in_units(shaped(raw, part.soft_cap, bias_tile(part, tiling, i, j)), part)
            return jnp.where(visible(part, tiling, i, j), shown, -jnp.inf) if masked else shown

        # A row keeps its own kind of level, whatever the others in its tile do: the tile only decides what is computed.
        largest = lax.cond(calm.all(), lambda: found.level, lambda: jnp.maximum(found.level, logits().max(2)))
        level = jnp.where(calm, found.level, largest)
        weights = power(logits() - finite(level)[:, :, None])
        kept = power(found.level - finite(level))
        gained = product("BKES,BKSGT->BKEGT", _with_ones(value, tiling, j, weights.dtype), weights)
        return Partial(level, found.sums * kept[:, :, None] + gained)

    return step


def _with_ones(value: Float[Array, "b k E S"], tiling: Tiling, j, dtype: Any) -> Float[Array, "b k E+1 C"]:
    """V^T of key tile j above a row of ones: one product then gives the weighted sum and the sum of the weights."""
    tile = columns(value, tiling, j, dtype, axis=3)
    return jnp.concatenate([tile, jnp.ones_like(tile[:, :, :1])], axis=2)


def repeated(body: Callable[[Any], Any], count: int):
    """`lax.map` of `body` over range(count), without a loop around a single step."""
    if count == 1:
        output, residual = body(0)
        return output[None], residual[None]
    return lax.map(body, jnp.arange(count))
