"""Buckets of a random hash, and which keys of its bucket a query reads.

A key's bucket is a function of that key alone, and what a query reads of it is counted from the query's own position:
no later token moves an earlier one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.cache import KeyValueCache
from attention.inputs import Inputs
from attention.rounding import norms, product

HIDDEN = -1  # the bucket of keys that do not exist


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HashedCache:
    """A decoding state: the keys and values, and the bucket of each key in every round, `B L K R`."""

    cache: KeyValueCache
    code: Int[Array, "B L K R"]

    @classmethod
    def empty(
        cls, batch: int, num_kv_heads: int, head_dim: int, max_length: int, rounds: int, dtype: Any
    ) -> "HashedCache":
        """Room for `max_length` tokens, of which none is there."""
        code = jnp.full((batch, max_length, num_kv_heads, rounds), HIDDEN, jnp.int32)
        return cls(cache=KeyValueCache.empty(batch, num_kv_heads, head_dim, max_length, dtype), code=code)


def query_codes(query: Float[Array, "*B H"], directions: Float[Array, "R b X"]) -> Int[Array, "*B R"]:
    """The bucket of (q, 0) in each of R rounds: the signs of b projections, as the bits of a number."""
    return _codes(query, jnp.zeros_like(query[..., :1]), directions)


def key_codes(key: Float[Array, "*B H"], directions: Float[Array, "R b X"], radius) -> Int[Array, "*B R"]:
    """The bucket of (k, sqrt(M^2 - |k|^2)) for M = radius, 0 in the last place of keys beyond it."""
    share = norms(key)[..., None] / radius
    return _codes(key, radius * jnp.sqrt(jnp.maximum((1 - share) * (1 + share), 0)), directions)


def existing_codes(inputs: Inputs, directions: Float[Array, "R b X"], radius) -> Int[Array, "B K S R"]:
    """`key_codes` of a call; keys beyond their sequence are in no bucket."""
    key = lax.stop_gradient(inputs.key.astype(inputs.query.dtype))
    code = key_codes(key, directions, radius.astype(key.dtype))
    if inputs.mask.key_lengths is None:
        return code
    exists = jnp.arange(inputs.mask.num_keys)[None] < inputs.mask.key_lengths[:, None]
    return jnp.where(exists[:, None, :, None], code, HIDDEN)


def _codes(x: Float[Array, "*B H"], last: Float[Array, "*B 1"], directions: Float[Array, "R b X"]):
    x, directions = (lax.stop_gradient(y) for y in (jnp.concatenate([x, last], axis=-1), directions))
    signs = product("...h,rbh->...rb", x, directions.astype(x.dtype)) >= 0
    weights = (2 ** jnp.arange(signs.shape[-1], dtype=jnp.int32)).astype(jnp.int32)
    return jnp.where(signs, jnp.broadcast_to(weights, signs.shape), 0).sum(-1, dtype=jnp.int32)


class Table(NamedTuple):
    """The keys of one head in the order of segment, bucket and position, once a round.

    Attributes:
        columns: segment (where there are any), bucket and position of the key at each place, `R S` each.
        code: `S R`, the bucket of each key.
        place: `S R`, its place.
    """

    columns: tuple[Int[Array, "R S"], ...]
    code: Int[Array, "S R"]
    place: Int[Array, "S R"]


def table(code: Int[Array, "S R"], segments: Int[Array, " S"] | None) -> Table:
    """Sorts the keys of one head for every round. Cost: R sorts of S numbers."""
    S, R = code.shape
    position = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (R, S))
    columns = (code.T, position)
    if segments is not None:
        columns = (jnp.broadcast_to(segments.astype(jnp.int32), (R, S)), *columns)
    columns = lax.sort(columns, num_keys=len(columns))
    place = jnp.zeros((S, R), jnp.int32).at[columns[-1], jnp.arange(R)[:, None]].set(position)
    return Table(columns, code, place)


class Asked(NamedTuple):
    """What rows look for: their bucket in each round, and the place behind the last key of it up to their position."""

    code: Int[Array, "C R"]
    end: Int[Array, "C R"]


def asked(own: Table, code: Int[Array, "C R"], position: Int[Array, " C"], segments: Int[Array, " C"] | None) -> Asked:
    """Finds each row's place in every round by bisection. Cost: R log2 S comparisons a row."""
    at = jnp.broadcast_to(position.astype(jnp.int32)[None], code.T.shape)
    bounds = (code.T, at)
    if segments is not None:
        bounds = (jnp.broadcast_to(segments.astype(jnp.int32)[None], at.shape), *bounds)
    return Asked(code, jax.vmap(_count_up_to)(own.columns, bounds).T)


def _count_up_to(columns: tuple[Int[Array, " S"], ...], bounds: tuple[Int[Array, " C"], ...]) -> Int[Array, " C"]:
    """How many of the sorted entries are not above each bound, in lexicographic order."""
    S = columns[0].size

    def halve(_, ends):
        low, high = ends
        middle = (low + high) // 2
        below = jnp.ones(middle.shape, bool)
        for column, bound in zip(columns[::-1], bounds[::-1], strict=True):
            entry = column[middle.clip(0, S - 1)]
            below = (entry < bound) | ((entry == bound) & below)
        open_ = low < high
        return jnp.where(open_ & below, middle + 1, low), jnp.where(open_ & ~below, middle, high)

    start = jnp.zeros(bounds[0].shape, jnp.int32)
    return lax.fori_loop(0, S.bit_length(), halve, (start, start + S))[0]


def found(rows: Asked, code: Int[Array, "C n R"], place: Int[Array, "C n R"], before: int, after: int):
    """Which rounds find which keys, `C n R`: those of the row's bucket at the places around the row's own."""
    end = rows.end[:, None]
    return (code == rows.code[:, None]) & (place >= end - before) & (place < end + after)


def listed(own: Table, rows: Asked, before: int, after: int) -> tuple[Int[Array, "C n"], Bool[Array, "C n"]]:
    """The keys at the places around each row's own, all rounds one after another, and which a round finds first."""
    (C, R), S = rows.end.shape, own.code.shape[0]
    place = rows.end[:, :, None] + jnp.arange(-before, after)[None, None]  # C R m
    inside = (place >= 0) & (place < S)
    at = own.columns[-1][jnp.arange(R)[None, :, None], place.clip(0, S - 1)]
    keys = at.reshape(C, -1)
    finds = found(rows, own.code[keys], own.place[keys], before, after).reshape(C, R, before + after, R)
    each = jnp.arange(R)
    earlier = (finds & (each[None] < each[:, None])[None, :, None]).any(-1)
    here = jnp.take_along_axis(finds, each.reshape(1, R, 1, 1), axis=-1)[..., 0]
    return keys, (here & inside & ~earlier).reshape(C, -1)


def latest(code: Int[Array, "S R"], own: Int[Array, " R"], exists: Bool[Array, " S"], count: int) -> Bool[Array, " S"]:
    """Which keys some round finds for one query behind them all, without a sort: the last `count` of its bucket.

    Cost: a comparison and an addition a key and round.
    """
    match = (code == own[None]) & exists[:, None]
    rank = jnp.cumsum(match, axis=0, dtype=jnp.int32)
    return (match & (rank[-1:] - rank < count)).any(-1)
