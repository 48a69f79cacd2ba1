"""Softmax attention over sinks, a window, and a sample of the keys between them, with a bound that holds by chance."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.cache import Cached
from attention.exact import Exact
from attention.inputs import Inputs
from attention.logits import soft_capped
from attention.masks import Mask
from attention.method import Certificate, Cost, Params, check_positive
from attention.rounding import norms, product_roundoff, rounding_bound, roundoff, sees_any
from attention.sparse.bounds import odds_rounding, value_reach
from attention.sparse.deviations import Sample, sampled_bound
from attention.sparse.moments import outward


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
        return self._over_tiles(inputs, lambda part, tile: _weighted(part, tile).output)

    def attend_cached(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self.attend(inputs)  # which empties what it reads, and reads no more than that

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        limits = lax.stop_gradient(_limits(inputs))
        numbers = (2 * rounding_bound(inputs, rescalings=1), odds_rounding(inputs, rescalings=0))
        shape = (-1, *inputs.query.shape[2:4])
        numbers = tuple(jnp.broadcast_to(x, inputs.query.shape[:-1]).reshape(shape) for x in numbers)

        def result(part: Inputs, tile: _Tile):
            found = _weighted(part, tile)
            own, (rounding, odds) = jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, tile.head, keepdims=False), (limits, numbers)
            )
            return found.output, *_bounds(part, tile, found, own, rounding[:, tile.at], odds[:, tile.at], self.delta)

        output, bound, mass = self._over_tiles(inputs, result)
        seen, S = sees_any(inputs.mask), inputs.mask.num_keys
        read = min(1.0, (self._width(inputs.mask) + min(self.sinks, S) + min(self.samples, S)) / S)
        return output, Certificate(
            error_bound=jnp.where(seen, bound, 0),
            dropped_mass=jnp.where(seen, mass, 0),
            work=jnp.full((), read, bound.dtype),
            kind="probabilistic",
            confidence=1 - self.delta,
        )

    def _width(self, mask: Mask) -> int:
        """How many keys around a tile it keeps, beside the sinks."""
        return min(mask.num_keys, self.query_block + self.window * (1 if mask.causal else 2))

    def _over_tiles(self, inputs: Inputs, result) -> Any:
        """`result(part, tile)` for one key head and tile after another, `B K G T ...`."""
        (B, K), T, C = inputs.query.shape[:2], inputs.mask.num_queries, self.query_block
        seed = self._seed(inputs)
        moves = inputs.mask.offset is not None
        R = 1 if moves and T < C else min(C, T)

        def head(n):
            part = inputs.part(n // K, 1, n % K, 1)
            offset = jnp.zeros((), jnp.int32) if part.mask.offset is None else part.mask.offset[0]
            shift = offset % R
            count = -(-(T + (R - 1 if moves else 0)) // R)
            first = jnp.arange(count) * R - shift
            tile = jax.checkpoint(lambda row: result(part, self._tile(part, seed, n, row, R, offset)))
            tiles = lax.map(tile, first)
            return jax.tree.map(lambda x: _joined(x, shift, T), tiles)

        found = lax.map(head, jnp.arange(B * K))
        return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), found)

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

    def _tile(self, part: Inputs, seed, n, row, R: int, offset) -> "_Tile":
        """What the queries [row, row + R) read."""
        mask, C, S = part.mask, self.query_block, part.mask.num_keys
        block = (row + offset) // C
        start, width = block * C, self._width(mask)
        low = (start - self.window).clip(0, S)
        high = start + C - 1 + (0 if mask.causal else self.window)
        around = (start - self.window).clip(0, S - width) + jnp.arange(width)
        sinks = jnp.arange(min(self.sinks, S))
        tail = _tail(mask, start, start + C - 1, low, high, sinks.size)
        m = min(self.samples, S)
        rng = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), block.astype(jnp.uint32))
        drawn = jax.random.randint(rng, (m,), 0, jnp.maximum(tail.count, 1), jnp.int32)
        whole, ranks = tail.count <= m, jnp.arange(m, dtype=jnp.int32)
        rank = jnp.where(whole, ranks, drawn)
        sampled = jnp.where(rank < tail.before, tail.begin + rank, tail.resume + rank - tail.before)
        return _Tile(
            head=n,
            at=(row + jnp.arange(R)).clip(0, mask.num_queries - 1),
            keys=jnp.concatenate([sinks, around, sampled]).clip(0, S - 1),
            reads=jnp.concatenate(
                [(sinks < low) | (sinks > high), (around >= low) & (around <= high), ~whole | (ranks < tail.count)]
            ),
            sampled=m,
            weight=jnp.where(whole, 1, tail.count / jnp.asarray(m, part.query.dtype)).astype(part.query.dtype),
            count=jnp.where(whole, 0, tail.count),
            tail=tail,
        )

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        around = self.query_block + self.window * (1 if is_causal else 2)
        read = min(S, min(S, around) + self.sinks + min(self.samples, S))
        tiles = -(-T // min(self.query_block, T))
        return Cost(4.0 * num_heads * head_dim * T * read, 4.0 * num_heads * head_dim * 2 * (T + tiles * read))


class _Tail(NamedTuple):
    """The keys between sinks and window: `before` of them from `begin` on, the others from `resume` on."""

    begin: Int[Array, ""]
    before: Int[Array, ""]
    resume: Int[Array, ""]
    count: Int[Array, ""]


class _Tile(NamedTuple):
    """Rows, and what they read: keys, of which the last `sampled` stand for `weight` keys each.

    Attributes:
        head: the number of the batch element and key head.
        at: the rows.
        keys, reads: keys, and which of the slots hold one.
        count: of how many keys the sample is one; 0 where all are read.
    """

    head: Int[Array, ""]
    at: Int[Array, " R"]
    keys: Int[Array, " n"]
    reads: Bool[Array, " n"]
    sampled: int
    weight: Float[Array, ""]
    count: Int[Array, ""]
    tail: _Tail


class _Weighted(NamedTuple):
    """Output, the sum of weights, each e^(l - level), and the level; weights of a sample without their multiple."""

    output: Float[Array, "G R E"]
    total: Float[Array, "G R"]
    weights: Float[Array, "G R n"]
    level: Float[Array, "G R"]
    value: Float[Array, "n E"]


class _Limits(NamedTuple):
    """Running maxima along the keys of each head, rounded outward, and how far apart two values of a row may be."""

    key: Float[Array, "BK S"]
    key_spread: Float[Array, "BK S"]
    value_spread: Float[Array, "BK S"]
    sums: Float[Array, "BK S E"]
    apart: Float[Array, "BK T"]


def _tail(mask: Mask, start, end, low, high, sinks: int) -> _Tail:
    """What lies between the sinks and the window of a tile at [start, end], as far as some of its rows may see."""
    left, right = mask.window or (mask.num_keys + mask.num_queries,) * 2
    span = mask.num_keys + mask.num_queries  # a window of 2**31 - 1 must not overflow
    begin = jnp.maximum(start - min(left, span), sinks)
    stop = jnp.minimum(end + min(right, span) + 1, mask.num_keys)
    if mask.key_lengths is not None:
        stop = jnp.minimum(stop, mask.key_lengths[0])
    resume = jnp.maximum(high + 1, begin)
    before = (jnp.minimum(low, stop) - begin).clip(0)
    after = jnp.zeros_like(before) if mask.causal else (stop - resume).clip(0)
    return _Tail(begin, before, resume, before + after)


def _weighted(part: Inputs, tile: _Tile) -> _Weighted:
    """Softmax over what a tile reads, the sampled keys weighted by the number that each stands for."""
    mask, dtype = part.mask, part.query.dtype
    there = tile.reads if mask.key_lengths is None else tile.reads & (tile.keys < mask.key_lengths[0])
    key, value = (jnp.take(x[0, 0], tile.keys, axis=0).astype(dtype) for x in (part.key, part.value))
    key, value = (jnp.where(there[:, None], x, 0) for x in (key, value))
    visible = mask.at(tile.at, tile.keys)[0, 0] & there[None, None]
    logits = soft_capped(_product("GRH,nH->GRn", part.query[0, 0][:, tile.at], key), part.soft_cap)
    logits = jnp.where(visible, logits, -jnp.inf)
    level = lax.stop_gradient(logits.max(-1))
    level = jnp.where(jnp.isneginf(level), 0, level)
    weights = jnp.exp(logits - level[..., None])
    multiple = jnp.where(jnp.arange(tile.keys.size) < tile.keys.size - tile.sampled, 1, tile.weight)
    scaled = weights * multiple[None, None]
    total = scaled.sum(-1)
    output = _product("GRn,nE->GRE", scaled, value) / jnp.where(total > 0, total, 1)[..., None]
    return _Weighted(output, total, weights, level, value)


def _limits(inputs: Inputs) -> _Limits:
    dtype = inputs.query.dtype
    key, value = (x.astype(dtype).reshape(-1, *x.shape[2:]) for x in (inputs.key, inputs.value))
    wide = outward(dtype, max(key.shape[-1], value.shape[-1]))
    apart = jnp.broadcast_to(value_reach(inputs)[:, :, 0], (*inputs.key.shape[:2], inputs.mask.num_queries))
    return _Limits(
        *(wide * lax.cummax(norms(x), axis=1) for x in (key, key - key[:, :1], value - value[:, :1])),
        jnp.cumsum(value - value[:, :1], axis=1),
        apart.reshape(-1, inputs.mask.num_queries),
    )


def _sample(part: Inputs, tile: _Tile, found: _Weighted, own: _Limits) -> tuple[Sample, Float[Array, " E"]]:
    """The statistics of a sample, and the vector c around which those of the values are: the mean of the tail."""
    query, first, m = part.query[0, 0][:, tile.at], part.key[0, 0, 0].astype(part.query.dtype), tile.sampled
    dtype, H, tail = query.dtype, query.shape[-1], tile.tail
    last = jnp.where(tail.count > tail.before, tail.resume + tail.count - tail.before, tail.begin + tail.before) - 1

    def upto(x, index):
        return jnp.where(index >= 0, jnp.take(x, index.clip(0), axis=0, mode="clip"), 0)

    ends = (tail.begin + tail.before - 1, tail.begin - 1, last, tail.resume - 1)
    sums = [upto(own.sums, end) for end in ends]
    after = jnp.where(tail.count > tail.before, sums[2] - sums[3], 0)
    offset = (sums[0] - sums[1] + after) / jnp.maximum(tail.count, 1)
    base = part.value[0, 0, 0].astype(dtype)
    wide = outward(dtype, base.size)
    radius = wide * (upto(own.value_spread, last) + norms(offset) + 2 * roundoff(dtype) * norms(base))
    unit = jnp.where(radius > 0, radius, 1)
    distance = norms(found.value[-m:] - (base + offset)[None]) / unit

    length, product = outward(dtype, H) * norms(query), _product("GRH,H->GR", query, first)
    near = product + length * (upto(own.key_spread, last) + (2 * H + 8) * product_roundoff(dtype) * norms(first))
    reach = jnp.minimum(length * upto(own.key, last), near)
    reach = reach if part.soft_cap is None else jnp.minimum(reach, part.soft_cap)
    slack = 8 * roundoff(dtype) * (jnp.abs(reach) + jnp.abs(found.level) + jnp.abs(product))
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
    ), base + offset


def _bounds(part: Inputs, tile: _Tile, found: _Weighted, own: _Limits, rounding, odds, delta: float):
    """The error bound and the dropped mass of the rows of a tile."""
    sample, centre = _sample(part, tile, found, own)
    away = outward(rounding.dtype, centre.size) * norms(found.output - centre) + rounding
    error, mass = sampled_bound(sample, away, odds, delta)
    error = jnp.fmin(error, own.apart[tile.at][None])
    some = (found.total > 0) | (tile.count == 0)  # an output of 0 is no mean of values
    return jnp.where(some, 1.001 * error + rounding, jnp.inf), jnp.where(some, mass, 1)


def _joined(tiles: Array, shift, T: int) -> Array:
    """The T rows from `shift` on, `G T ...`, of `tiles G R ...`."""
    tiles = jnp.moveaxis(tiles, 1, 0)
    rows = tiles.reshape(tiles.shape[0], -1, *tiles.shape[3:])
    return lax.dynamic_slice_in_dim(rows, shift, T, axis=1)


def _product(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)
