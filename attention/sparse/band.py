"""Attention of each query to one run of keys around it, and to sinks: what a tile of queries reads is one slice."""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.cache import Cached
from attention.exact import Exact
from attention.inputs import Inputs
from attention.masks import Mask
from attention.method import Certificate, Cost
from attention.rounding import calm_limit
from attention.sparse.gathered import attend
from attention.sparse.odds import odds_certificate, odds_of_the_rest
from attention.sparse.pages import Pages, paged
from attention.tiles import Tiles

PAGE = 64  # keys in a page, whose bounds certify what was not read
UNBOUNDED = 2**28  # positions: further than any two are apart, and small enough for sums of a few in 32 bits


class Reach(NamedTuple):
    """How many keys before the first position of a tile, and after its last, some query of the tile may read."""

    before: int
    after: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Banded(Cached, register=False):
    """A method whose query at position p reads the keys from `first` to `last`, and `sinks` at the beginning."""

    capabilities = dataclasses.replace(Exact.capabilities, exact=False, residual=False, sees_all=False, bias=False)

    @abc.abstractmethod
    def tile_size(self) -> int:
        """How many queries are worked on at once."""

    @abc.abstractmethod
    def reach(self, mask: Mask) -> Reach:
        """What a tile may read beside the keys at its own positions."""

    @abc.abstractmethod
    def ranges(self, position: Int[Array, " R"], start: Int[Array, " R"]) -> tuple[Array, Array]:
        """The first and the last key that queries read, `start` being the first key of their segment."""

    def num_sinks(self) -> int:
        """How many keys at the beginning of a segment every query reads."""
        return 0

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self._over_heads(inputs, None, calm_limit(inputs))[0]

    def attend_cached(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self._over_heads(inputs, None, None)[0]  # which empties what it reads, and reads no more than that

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        pages = paged(inputs.key, inputs.value, PAGE, inputs.mask.key_lengths)
        output, against = self._over_heads(inputs, pages, calm_limit(inputs))
        reach, S = self.reach(inputs.mask), inputs.mask.num_keys
        read = min(S, min(self.tile_size(), inputs.mask.num_queries) + sum(reach)) + self.num_sinks()
        return output, odds_certificate(inputs, against, jnp.asarray(min(1.0, read / S)))

    def _over_heads(self, inputs: Inputs, pages: Pages | None, limit: Float[Array, "B K G T"] | None):
        """Outputs, and with pages the odds of what was not read, of one key head and one tile after another."""
        (B, K), T = inputs.query.shape[:2], inputs.mask.num_queries
        R = min(self.tile_size(), T)

        def head(n):
            part = inputs.part(n // K, 1, n % K, 1)
            own = jax.tree.map(lambda x: x[n // K, n % K], (pages, limit))
            if R == T:
                return self._tile(part, *own, 0, R)
            tiles = lax.map(jax.checkpoint(lambda row: self._tile(part, *own, row, R)), Tiles(T, R).starts)
            return jax.tree.map(lambda x: Tiles(T, R).join(x, 1), tiles)

        found = lax.map(head, jnp.arange(B * K))
        return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), found)

    def _tile(self, part: Inputs, pages: Pages | None, limit, row, R: int):
        """The output of the queries [row, row + R) of one key head, and the odds of what they did not read."""
        mask, S = part.mask, part.mask.num_keys
        rows = row + jnp.arange(R)
        position = rows + (0 if mask.offset is None else mask.offset[0])
        begins = segment_starts(mask)
        start = jnp.zeros_like(position) if begins is None else begins[position.clip(0, S - 1)]
        first, last = (x[:, None] for x in self.ranges(position, start))
        reach = self.reach(mask)
        width, sinks = min(S, R + reach.before + reach.after), min(S, self.num_sinks())
        corner = jnp.clip(position[0] - reach.before, 0, S - width)
        corners = [(corner, width)] + ([(jnp.minimum(start[0], S - sinks), sinks)] if sinks else [])
        keys = jnp.concatenate([begin + jnp.arange(size) for begin, size in corners])
        within = (keys[None] >= first) & (keys[None] <= last)
        # A sink that lies in the slice too counts there, in its first place.
        again = (jnp.arange(keys.size) >= width) & (keys >= corner) & (keys < corner + width)
        reads = (within | self._is_sink(keys[None], start[:, None])) & ~again[None]
        visible = mask.at(rows, keys)[0, 0] & reads[None]

        def slices(x):
            found = jnp.concatenate([lax.dynamic_slice_in_dim(x[0, 0], begin, size) for begin, size in corners])
            if mask.key_lengths is None:
                return found
            return jnp.where((keys < mask.key_lengths[0])[:, None], found, jnp.zeros_like(found))

        query = lax.dynamic_slice_in_dim(part.query[0, 0], row, R, axis=1)
        bound = None if limit is None else lax.dynamic_slice_in_dim(limit, row, R, axis=1)
        found = attend(query, slices(part.key), slices(part.value), visible, part.soft_cap, bound)
        if pages is None:
            return found.output, None
        whole = self._whole_pages(pages, first, last, start[:, None])
        return found.output, odds_of_the_rest(query, rows, found, pages, whole, mask, part.soft_cap)

    def _is_sink(self, keys, start) -> Bool[Array, "R n"]:
        return (keys >= start) & (keys < start + self.num_sinks())

    def _whole_pages(self, pages: Pages, first, last, start) -> Bool[Array, "R P"]:
        """Which pages each query reads as a whole, their ends from its range or its sinks."""
        begin = jnp.arange(pages.box.shape[0])[None] * PAGE
        end = begin + PAGE - 1
        within = (begin >= first) & (end <= last)
        return within | ((begin >= start) & (end < start + self.num_sinks()))

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        R = min(self.tile_size(), T)
        read = min(S, R + sum(self.reach(Mask(num_queries=T, num_keys=S, causal=is_causal)))) + self.num_sinks()
        flops = 4.0 * num_heads * head_dim * T * read
        return Cost(flops, 4.0 * num_heads * head_dim * 2 * (T + -(-T // R) * read))


def segment_starts(mask: Mask) -> Int[Array, " S"] | None:
    """The first key of the run of equal segment ids in which each key lies; None where there are no segments."""
    if mask.key_segments is None:
        return None
    ids = mask.key_segments[0]
    begins = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    return lax.cummax(jnp.where(begins, jnp.arange(ids.size), 0))
