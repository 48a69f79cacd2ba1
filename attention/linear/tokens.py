"""Keys and queries in the order of a scan: lined up by position, or sorted where segments are packed."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.rounding import sees_any


class Keys(NamedTuple):
    """Keys `B K L H` and values `B K L E`, and what is known of each, `b L`.

    Attributes:
        key, value: the operands.
        position: where they stand; where segments are packed, from the start of their own.
        visible: whether they exist.
        segment: ids, equal ones side by side; None for one segment.
    """

    key: Float[Array, "..."]
    value: Float[Array, "..."]
    position: Int[Array, "b L"]
    visible: Bool[Array, "b L"]
    segment: Int[Array, "b L"] | None = None


class Tokens(NamedTuple):
    """What a causal scan goes over: row i sees the keys of its segment up to index i.

    Attributes:
        query: `B K G L H`.
        keys: beside them.
        sees: whether a row sees any key; the others give 0.
    """

    query: Float[Array, "..."]
    keys: Keys
    sees: Bool[Array, "b L"]


def all_keys(inputs: Inputs, start: Any = 0) -> Keys:
    """Every key of `inputs`, the first at position `start`, visible up to the lengths."""
    index, lengths = jnp.arange(inputs.mask.num_keys)[None], inputs.mask.key_lengths
    visible = jnp.ones_like(index, bool) if lengths is None else index < lengths[:, None]
    return Keys(inputs.key, inputs.value, index + start, visible)


def aligned(inputs: Inputs, keys: Keys) -> Tokens:
    """The keys rearranged so that index i holds the key at the position of query i, i + offset."""
    offset, T, S = inputs.mask.offset, inputs.mask.num_queries, inputs.mask.num_keys
    if offset is None and T == S:
        return Tokens(inputs.query, keys, rows_that_see(inputs))
    column = jnp.arange(T)[None] if offset is None else jnp.arange(T)[None] + offset[:, None]
    position, index = keys.position[:, :1] + column, column.clip(0, S - 1)
    visible = (column >= 0) & (column < S) & jnp.take_along_axis(keys.visible, index, axis=1)
    if offset is None:
        key, value = (x[:, :, :T] if T <= S else padded(x, 2, T) for x in (keys.key, keys.value))
    else:
        key, value = (jnp.take_along_axis(x, index[:, None, :, None], axis=2) for x in (keys.key, keys.value))
    return Tokens(inputs.query, Keys(key, value, position, visible), rows_that_see(inputs))


def packed(inputs: Inputs, segments: tuple[Array, Array]) -> tuple[Tokens, Int[Array, "B T"]]:
    """Queries and keys of any segment ids, `B T` and `B S`, a segment's side by side; and where each query went.

    Every query and every key becomes a token, T + S in all, the other half of which is unused. Within a segment
    they stand by position, at the same one keys before queries; where nothing is causal, all keys before all
    queries. Either way a query sees the keys that are before it in its segment.
    """
    mask = inputs.mask
    T, S = mask.num_queries, mask.num_keys
    B, index = segments[0].shape[0], jnp.arange(T + S)[None]
    column = index[:, :T] if mask.offset is None else index[:, :T] + mask.offset[:, None]
    position = jnp.concatenate([jnp.broadcast_to(column, (B, T)), jnp.broadcast_to(index[:, :S], (B, S))], axis=1)
    segment = jnp.concatenate(segments, axis=1)
    token = jnp.broadcast_to(index, (B, T + S))
    asks = token < T
    time = (position, asks) if mask.causal else (asks, position)
    segment, *time, token = lax.sort((segment, *time, token), num_keys=3)
    position, asks = time if mask.causal else reversed(time)

    begins = jnp.concatenate([jnp.ones((B, 1), bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    start = lax.cummax(jnp.where(begins, index, 0), axis=1)
    visible, answers = ~asks, asks
    if mask.key_lengths is not None:
        visible &= position < mask.key_lengths[:, None]
    if mask.query_lengths is not None:
        answers &= token < mask.query_lengths[:, None]
    sees = answers & (lax.cummax(jnp.where(visible, index, -1), axis=1) >= start)
    row, column = token.clip(0, T - 1)[:, None, None, :, None], (token - T).clip(0)[:, None, :, None]
    key, value = (jnp.take_along_axis(x, column, axis=2) for x in (inputs.key, inputs.value))
    keys = Keys(key, value, position - jnp.take_along_axis(position, start, axis=1), visible, segment)
    query = jnp.take_along_axis(inputs.query, row, axis=3)
    return Tokens(query, keys, sees), jnp.argsort(token, axis=1)[:, :T]


def rows_that_see(inputs: Inputs) -> Bool[Array, "b T"]:
    """Which queries see any key under the band and the lengths."""
    return sees_any(inputs.mask)[:, 0, 0]


def padded(x: Array, axis: int, length: int) -> Array:
    """The array with zeros appended."""
    return jnp.pad(x, [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)])
