"""Softmax attention over sinks, a window, and a sample of the keys between them, with a bound that holds by chance."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.cache import Cached
from attention.exact import Exact
from attention.inputs import Inputs
from attention.method import Certificate, Cost, Params, check_positive
from attention.rounding import rounding_bound, sees_any
from attention.sparse.bounds import odds_rounding
from attention.sparse.sampled_bounds import limits_of, row_bounds
from attention.sparse.tail import Rule, Tile, tile_at, weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Cached):
    r"""Softmax over sinks and a window of keys, and over m of the n keys between them, drawn with replacement.

        o = N / Z,    N = sum_{j kept} e^{l_j} v_j + (n / m) sum_{s <= m} e^{l_{j_s}} v_{j_s},
                      Z = sum_{j kept} e^{l_j}     + (n / m) sum_{s <= m} e^{l_{j_s}}.

    A tile of queries, counted from position 0, keeps the first `sinks` keys and those from `window` before the tile
    to its end (`window` after it where not causal), and its rows and all heads share one sample of the rest, the tail.
    Where the tail has no more than m keys, all of it is read. What is drawn depends on `params` and on the number of
    the tile alone, so that no later token changes it and decoding draws as the whole does. Gradients flow through what
    was read, by its weight.

    Attributes:
        samples: m.
        window: keys before a tile that it keeps.
        sinks: keys at the beginning that every tile keeps.
        query_block: queries of a tile.
        delta: the probability with which a row's certificate may fail.

    Cost: with n = sinks + query_block + window (twice that where not causal) + samples keys a tile, 2 T n (H + E)
    operations a head: linear in T. Memory O((T + S) (H + E) + G query_block n).
    Error bound: probabilistic, at each row with probability 1 - delta over the draw of `params`: numerator and
    denominator by Bernstein bounds for samples of any size (`attention.sparse.deviations`), given a sound range of
    the tail's e^l from norms; never more than the distance of two values. Rows of a tile share their luck.

    Raises:
        ValueError: a size is out of range, delta is not between 0 and 1, or `params` are not those of a `Sampled`.

    References:
        Desai et al., "vAttention: verified sparse attention", arXiv 2510.05688, section 4 (kept keys and a sampled
        tail, with a guarantee by the central limit theorem).
    """

    samples: int = 256
    window: int = 128
    sinks: int = 4
    query_block: int = 128
    delta: float = 0.05

    capabilities = dataclasses.replace(
        Exact.capabilities,
        exact=False,
        residual=False,
        sees_all=False,
        bias=False,
        segments=False,
        random=True,
        certificate="probabilistic",
        rounding=2.0,
    )

    def __post_init__(self) -> None:
        check_positive(self, "window", "query_block", "samples")
        if self.sinks != 0:
            check_positive(self, "sinks")
        if self.samples < 2:
            raise ValueError(f"Sampled.samples is {self.samples}: expected at least 2, which have a variance")
        if not (isinstance(self.delta, float) and 0 < self.delta < 1):
            raise ValueError(f"Sampled.delta is {self.delta!r}: expected a number between 0 and 1")

    @classmethod
    def examples(cls) -> "tuple[Sampled, ...]":
        return (cls(samples=4, window=2, sinks=1, query_block=3),)

    def ladder(self, length: int) -> "tuple[Sampled, ...]":
        return tuple(dataclasses.replace(self, samples=max(2, length // share)) for share in (16, 4, 1))

    def exact_limit(self, length: int) -> "Sampled":
        return dataclasses.replace(self, samples=max(2, length))

    def init(self, rng: Array | None, *, num_heads: int, head_dim: int) -> Params:
        """Draws the seed of all samples."""
        del num_heads, head_dim
        if rng is None:
            raise ValueError("Sampled.init: rng is None: expected a key, since the samples are drawn from it")
        return Params(constants={"seed": jax.random.bits(rng, (2,), jnp.uint32)})

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self._over_tiles(inputs, lambda part, tile: weighted(part, tile).output)

    def attend_cached(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self.attend(inputs)  # which empties what it reads, and reads no more than that

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        limits = lax.stop_gradient(limits_of(inputs))
        numbers = (2 * rounding_bound(inputs, rescalings=1), odds_rounding(inputs, rescalings=0))
        shape = (-1, *inputs.query.shape[2:4])
        numbers = tuple(jnp.broadcast_to(x, inputs.query.shape[:-1]).reshape(shape) for x in numbers)

        def result(part: Inputs, tile: Tile):
            found = weighted(part, tile)
            own, (rounding, odds) = jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, tile.head, keepdims=False), (limits, numbers)
            )
            return found.output, *row_bounds(part, tile, found, own, rounding[:, tile.at], odds[:, tile.at], self.delta)

        output, bound, mass = self._over_tiles(inputs, result)
        seen, S = sees_any(inputs.mask), inputs.mask.num_keys
        read = min(1.0, (self._rule().width(inputs.mask) + min(self.sinks, S) + min(self.samples, S)) / S)
        return output, Certificate(
            error_bound=jnp.where(seen, bound, 0),
            dropped_mass=jnp.where(seen, mass, 0),
            work=jnp.full((), read, bound.dtype),
            kind="probabilistic",
            confidence=1 - self.delta,
        )

    def _over_tiles(self, inputs: Inputs, result) -> Any:
        """`result(part, tile)` for one key head and tile after another, `B K G T ...`."""
        (B, K), T, C = inputs.query.shape[:2], inputs.mask.num_queries, self.query_block
        seed, rule = self._seed(inputs), self._rule()
        moves = inputs.mask.offset is not None
        R = 1 if moves and T < C else min(C, T)

        def head(n):
            part = inputs.part(n // K, 1, n % K, 1)
            offset = jnp.zeros((), jnp.int32) if part.mask.offset is None else part.mask.offset[0]
            shift = offset % R
            count = -(-(T + (R - 1 if moves else 0)) // R)
            first = jnp.arange(count) * R - shift
            each = jax.checkpoint(lambda row: result(part, tile_at(rule, part, seed, n, row, R, offset)))
            tiles = lax.map(each, first)
            return jax.tree.map(lambda x: _joined(x, shift, T), tiles)

        found = lax.map(head, jnp.arange(B * K))
        return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), found)

    def _rule(self) -> Rule:
        return Rule(self.samples, self.window, self.sinks, self.query_block)

    def _seed(self, inputs: Inputs) -> Array:
        params = inputs.params
        if params is None:
            params = self.init(inputs.rng, num_heads=1, head_dim=1)
        seed = jnp.asarray(params.constants["seed"]) if "seed" in params.constants else jnp.zeros(())
        if seed.shape != (2,) or seed.dtype != jnp.uint32:
            raise ValueError(
                f"params: the seed has shape {seed.shape} and dtype {seed.dtype}: expected two of uint32; "
                "pass what this method's init(rng, num_heads=, head_dim=) returns"
            )
        return seed

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        around = self.query_block + self.window * (1 if is_causal else 2)
        read = min(S, min(S, around) + self.sinks + min(self.samples, S))
        tiles = -(-T // min(self.query_block, T))
        return Cost(4.0 * num_heads * head_dim * T * read, 4.0 * num_heads * head_dim * 2 * (T + tiles * read))


def _joined(tiles: Array, shift, T: int) -> Array:
    """The T rows from `shift` on, `G T ...`, of `tiles G R ...`."""
    tiles = jnp.moveaxis(tiles, 1, 0)
    rows = tiles.reshape(tiles.shape[0], -1, *tiles.shape[3:])
    return lax.dynamic_slice_in_dim(rows, shift, T, axis=1)
