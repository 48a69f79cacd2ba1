"""Online softmax: the output of a query tile, gathered over tiles of keys."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.chunked.tiles import Span, Tiles, banded, irregular, span
from attention.inputs import Inputs


class Partial(NamedTuple):
    """What some of the keys contribute to a tile of queries. Any two such parts can be merged.

    Attributes:
        top: the largest logit, -inf where no key was seen.
        total: sum(exp(logit - top)).
        values: sum(exp(logit - top) v).
    """

    top: Float[Array, "b k G R"]
    total: Float[Array, "b k G R"]
    values: Float[Array, "b k G R E"]

    def merge(self, other: "Partial") -> "Partial":
        """The contribution of both sets of keys together."""
        top = jnp.maximum(self.top, other.top)
        mine, theirs = (jnp.exp(part.top - finite(top)) for part in (self, other))
        total = self.total * mine + other.total * theirs
        return Partial(top, total, self.values * mine[..., None] + other.values * theirs[..., None])

    def output(self) -> Float[Array, "b k G R E"]:
        """The weighted mean of the values; 0 where no key was seen."""
        return self.values / jnp.where(self.total > 0, self.total, 1)[..., None]

    def residual(self) -> Float[Array, "b k G R"]:
        """log(sum(exp(logits))); -inf where no key was seen."""
        return jnp.log(self.total) + self.top


def finite(top: Float[Array, "..."]) -> Float[Array, "..."]:
    """What to subtract from a row of logits: their maximum, or 0 where that is -inf."""
    return jnp.where(jnp.isneginf(top), 0, top)


def attend(inputs: Inputs, queries: Tiles, keys: Tiles) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
    """The output and log(sum(exp(logits))) of every query, a tile of one head at a time."""
    B, K = inputs.key.shape[:2]

    def head(h):
        one = inputs.one_head(h // K, h % K)
        output, residual = repeated(lambda i: query_tile(one, i, queries, keys), queries.count)
        return queries.join(output, 3), queries.join(residual, 3)

    output, residual = repeated(head, B * K)
    return output.reshape(B, K, *output.shape[3:]), residual.reshape(B, K, *residual.shape[3:])


def query_tile(head: Inputs, i, queries: Tiles, keys: Tiles):
    """The output and residual of query tile i of one head."""
    G, E = head.query.shape[2], head.value.shape[-1]
    rows = jnp.zeros((1, 1, G, queries.size), head.query.dtype)
    part = Partial(rows - jnp.inf, rows, jnp.zeros((*rows.shape, E), rows.dtype))
    for start, stop, masked in _stretches(head, span(head.mask, i, queries, keys), keys):
        part = lax.fori_loop(start, stop, _step(head, queries.start(i), queries, keys, masked), part)
    return part.output(), part.residual()


def _stretches(head: Inputs, tiles: Span, keys: Tiles) -> list[tuple[Any, Any, bool]]:
    """The loops over key tiles that a mask asks for: only the edges of a band are masked."""
    stretches = []
    if head.mask.window is not None and not irregular(head.mask):
        stretches.append((tiles.first, tiles.open, True))
    if not irregular(head.mask):
        stretches.append((tiles.open, tiles.shut, False))
    if banded(head.mask) or irregular(head.mask) or keys.overlap:
        stretches.append((tiles.shut, tiles.end, True))
    return stretches


def _step(head: Inputs, row, queries: Tiles, keys: Tiles, masked: bool) -> Callable[[Any, Partial], Partial]:
    """The loop body that adds key tile j."""

    def step(j, part: Partial) -> Partial:
        logits = head.scores(row, queries.size, keys.start(j), keys.size)
        if masked:
            logits = jnp.where(visible(head, row, queries, j, keys), logits, -jnp.inf)
        top = jnp.maximum(part.top, logits.max(-1))
        weights = jnp.exp(logits - finite(top)[..., None])
        kept = jnp.exp(part.top - finite(top))
        value = lax.dynamic_slice_in_dim(head.value, keys.start(j), keys.size, axis=2)
        gained = jnp.einsum("BKGTS,BKSE->BKGTE", weights, value.astype(weights.dtype), precision=lax.Precision.HIGHEST)
        return Partial(top, part.total * kept + weights.sum(-1), part.values * kept[..., None] + gained)

    return step


def visible(head: Inputs, row, queries: Tiles, j, keys: Tiles):
    """Which keys of tile j the queries from `row` on see, and no tile before has shown them."""
    seen = head.mask.tile(row, queries.size, keys.start(j), keys.size)
    return seen & keys.owned(j).reshape(1, 1, 1, 1, -1) if keys.overlap else seen


def repeated(body: Callable[[Any], Any], count: int):
    """`lax.map` of `body` over range(count), without a loop around a single step."""
    if count == 1:
        output, residual = body(0)
        return output[None], residual[None]
    return lax.map(body, jnp.arange(count))
