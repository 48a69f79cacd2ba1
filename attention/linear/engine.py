"""The loops that every feature map shares: bidirectional, strictly causal in chunks, and over a state.

Features can be orthogonal in floating point: the products of a row underflow (positive features) or cancel
(signed ones). Where its denominator is no larger than tiny / eps, the smallest normal number over the spacing
of 1, the terms lost to underflow are no longer below rounding and the estimate is lost. Such a row gives 0 with
0 gradient, and `jax.experimental.checkify` reports it; no constant is added to hide it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.checks import traced_check
from attention.inputs import Inputs
from attention.linear.state import Features, LinearState, absorb, read, read_causally
from attention.rounding import sees_any


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """How queries and keys become features. Both functions also take the positions of the tokens, `b C`.

    Attributes:
        query: features (g = G) of queries `B K G C H`, which carry beta.
        key: features of keys `B K C H`, given in the dtype of the queries.
        size: M.
        groups: g of the keys' features: 1 where the query heads of a group share them, G where they differ.
    """

    query: Callable[[Array, Array], Features]
    key: Callable[[Array, Array], Features]
    size: int
    groups: int = 1


class Keys(NamedTuple):
    """Keys `B K C H` and values `B K C E`, their positions, and whether they exist, both `b C`."""

    key: Float[Array, "..."]
    value: Float[Array, "..."]
    position: Int[Array, "b C"]
    visible: Bool[Array, "b C"]

    def features(self, feature_map: FeatureMap, dtype: Any) -> Features:
        """Their features, with log_scale = -inf where there is no key."""
        mapped = feature_map.key(self.key.astype(dtype), self.position)
        return mapped._replace(log_scale=jnp.where(self.visible[:, None, None, :], mapped.log_scale, -jnp.inf))


def attend(inputs: Inputs, feature_map: FeatureMap, chunk: int) -> Float[Array, "B K G T E"]:
    """Linear attention under the causal mask and the lengths of `inputs`.

    Time O((T + S) M (H + E)), and O(T C (M + E)) more where causal. The backward pass keeps one state a
    chunk of C tokens, and nothing of size M a token.
    """
    (B, K), E = inputs.query.shape[:2], inputs.value.shape[-1]
    state = LinearState.empty(B, K, feature_map.groups, feature_map.size, E, inputs.query.dtype)
    keys, offset = all_keys(inputs), inputs.mask.offset
    if not inputs.mask.causal:
        return read_all(absorb_all(state, keys, feature_map, chunk), inputs, feature_map, chunk)
    if offset is not None:
        # Every query sees the keys before the first query's own; the others are lined up with the queries.
        earlier = keys._replace(visible=keys.visible & (keys.position < offset[:, None]))
        state = absorb_all(state, earlier, feature_map, chunk)
    return scan_causally(state, inputs, _aligned(keys, offset, inputs.mask.num_queries), feature_map, chunk)[1]


def scan_causally(
    state: LinearState, inputs: Inputs, keys: Keys, feature_map: FeatureMap, chunk: int
) -> tuple[LinearState, Float[Array, "B K G T E"]]:
    """Row i sees the state and the keys up to index i. Returns the state after all the keys as well."""
    T, dtype = inputs.mask.num_queries, inputs.query.dtype
    C = min(chunk, T)

    @jax.checkpoint
    def body(state, now):
        query, own = now
        key, value = own.features(feature_map, dtype), own.value.astype(dtype)
        rows = read_causally(state, feature_map.query(query, own.position).features, key, value)
        return absorb(state, key, value), rows

    final, rows = lax.scan(body, state, (_split(inputs.query, 3, C), _split_keys(keys, C)))
    return final, _normalised(rows, inputs)


def absorb_all(state: LinearState, keys: Keys, feature_map: FeatureMap, chunk: int) -> LinearState:
    """The state with all of `keys` added, chunk by chunk."""

    @jax.checkpoint
    def body(state, own):
        return absorb(state, own.features(feature_map, state.top.dtype), own.value.astype(state.top.dtype)), None

    return lax.scan(body, state, _split_keys(keys, min(chunk, keys.key.shape[2])))[0]


def read_all(state: LinearState, inputs: Inputs, feature_map: FeatureMap, chunk: int) -> Float[Array, "B K G T E"]:
    """The rows of queries that all see all of the state, chunk by chunk."""
    T = inputs.mask.num_queries
    C = min(chunk, T)
    body = jax.checkpoint(lambda now: read(state, feature_map.query(*now).features))
    rows = lax.map(body, (_split(inputs.query, 3, C), _split(jnp.arange(T)[None], 1, C)))
    return _normalised(rows, inputs)


def all_keys(inputs: Inputs, start: Int[Array, ""] | int = 0) -> Keys:
    """Every key of `inputs`, the first at position `start`, visible up to the lengths."""
    index, lengths = jnp.arange(inputs.mask.num_keys)[None], inputs.mask.key_lengths
    visible = jnp.ones_like(index, bool) if lengths is None else index < lengths[:, None]
    return Keys(inputs.key, inputs.value, index + start, visible)


def _aligned(keys: Keys, offset: Int[Array, " b"] | None, T: int) -> Keys:
    """The keys rearranged so that index i holds the key at the position of query i, i + offset."""
    S = keys.key.shape[2]
    position = jnp.arange(T)[None] if offset is None else jnp.arange(T)[None] + offset[:, None]
    index = position.clip(0, S - 1)
    inside = (position >= 0) & (position < S)
    if offset is None:
        key, value = (x[:, :, :T] if T <= S else _padded(x, 2, T) for x in (keys.key, keys.value))
    else:
        key, value = (jnp.take_along_axis(x, index[:, None, :, None], axis=2) for x in (keys.key, keys.value))
    return Keys(key, value, position, inside & jnp.take_along_axis(keys.visible, index, axis=1))


def _normalised(rows: tuple[Array, Array], inputs: Inputs) -> Float[Array, "B K G T E"]:
    """Numerators over denominators, both `chunks B K G C ...`; 0 in rows that see no key, or have lost theirs."""
    numerator, denominator = (_joined(x, 3, inputs.mask.num_queries) for x in rows)
    size, info = lax.stop_gradient(jnp.abs(denominator)), jnp.finfo(denominator.dtype)
    sees = sees_any(inputs.mask)
    lost = sees & (size <= float(info.tiny) / float(info.eps))
    message = "the denominators of {n} rows vanish: products of features underflow; raise the temperature"
    traced_check(~lost.any(), message, n=lost.sum())
    valid = sees & ~lost
    # By its own size first: it cancels, and no gradient meets the square of a small denominator. The barrier keeps XLA
    # from turning a / unit / (denominator / unit) into a * unit / (unit * denominator), which underflows all the same.
    unit = jnp.where(valid, size, 1)
    total = lax.optimization_barrier(jnp.where(valid, denominator, 1) / unit)
    return jnp.where(valid[..., None], numerator, 0) / unit[..., None] / total[..., None]


def _split(x: Array, axis: int, C: int) -> Array:
    """The axis padded with zeros to a multiple of C and cut into chunks, which come first."""
    chunks = -(-x.shape[axis] // C)
    x = _padded(x, axis, chunks * C)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, C, *x.shape[axis + 1 :]), axis, 0)


def _split_keys(keys: Keys, C: int) -> Keys:
    return Keys(
        _split(keys.key, 2, C), _split(keys.value, 2, C), _split(keys.position, 1, C), _split(keys.visible, 1, C)
    )


def _joined(chunks: Array, axis: int, length: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(chunks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _padded(x: Array, axis: int, length: int) -> Array:
    return jnp.pad(x, [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)])
