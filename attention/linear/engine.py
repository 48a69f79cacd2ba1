"""The loops that every feature map shares: bidirectional, strictly causal in chunks, and over a state.

Features can be orthogonal in floating point: the products of a row underflow (positive features) or cancel
(signed ones). Where its denominator is no larger than tiny / eps, the smallest normal number over the spacing
of 1, the terms lost to underflow are no longer below rounding and the estimate is lost. Such a row gives 0 with
0 gradient, and `jax.experimental.checkify` reports it; no constant is added to hide it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.checks import traced_check
from attention.inputs import Inputs
from attention.linear.chunks import Chunk, chunks, flat, joined, split
from attention.linear.state import Features, LinearState, Sight, absorb, read, read_causally, with_ones
from attention.linear.tokens import Keys, Tokens, aligned, all_keys, packed, rows_that_see


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """How queries and keys become features. Both functions also take the positions of the tokens, `b C`.

    Attributes:
        query: features (g = G) of queries `B K G C H`, which carry beta.
        key: features of keys `B K C H`, given in the dtype of the queries.
        size: M.
        groups: g of the keys' features: 1 where the query heads of a group share them, G where they differ.
        log_decay: log gamma <= 0, `K g` or with axes of size 1: a key d positions back weighs gamma^d times what
            it would, as in retention (Sun et al., arXiv 2307.08621). None for gamma = 1. For causal calls only.
    """

    query: Callable[[Array, Array], Features]
    key: Callable[[Array, Array], Features]
    size: int
    groups: int = 1
    log_decay: Float[Array, "k g"] | None = None


def attend(inputs: Inputs, feature_map: FeatureMap, chunk: int) -> Float[Array, "B K G T E"]:
    """Linear attention under the causal mask, the lengths and the segments of `inputs`.

    Time O((T + S) M (H + E)), and O(T C (M + E)) more where causal; with segments, as if causal with T + S tokens.
    The backward pass keeps one state a chunk of C tokens, and nothing of size M a token.

    Raises:
        ValueError: a decay, and no causal mask.
    """
    return over_rows(inputs, feature_map, chunk, scan_causally, read_all)


def over_rows(
    inputs: Inputs, feature_map: FeatureMap, chunk: int, causally: Callable, whole: Callable
) -> Float[Array, "B K G T F"]:
    """What `causally`, called as `scan_causally`, or `whole`, called as `read_all`, gives for every row of `inputs`."""
    mask = inputs.mask
    if feature_map.log_decay is not None and not mask.causal:
        raise ValueError("is_causal is False: expected True, since a decay counts positions back from a query")
    (B, K), E = inputs.query.shape[:2], inputs.value.shape[-1]
    state = LinearState.empty(B, K, feature_map.groups, feature_map.size, E, inputs.query.dtype)
    if mask.query_segments is not None and mask.key_segments is not None:
        tokens, index = packed(inputs, (mask.query_segments, mask.key_segments))
        rows = causally(state, tokens, feature_map, chunk)[1]
        return jnp.take_along_axis(rows, index[:, None, None, :, None], axis=3)
    keys = all_keys(inputs)
    if not mask.causal:
        return whole(absorb_all(state, keys, feature_map, chunk), inputs, feature_map, chunk)
    if mask.offset is not None:
        # Every query sees the keys before the first query's own; the others are lined up with the queries.
        first = mask.offset[:, None]
        earlier = keys._replace(visible=keys.visible & (keys.position < first))
        # The state is as old as the key before the first query.
        earlier = earlier._replace(position=jnp.minimum(keys.position, first - 1))
        state = absorb_all(state, earlier, feature_map, chunk)
    return causally(state, aligned(inputs, keys), feature_map, chunk)[1]


def scan_causally(
    state: LinearState, tokens: Tokens, feature_map: FeatureMap, chunk: int
) -> tuple[LinearState, Float[Array, "B K G L E"]]:
    """Row i sees the state and the keys up to index i. Returns the state after all the keys as well."""
    (B, K, G, L, H), dtype = tokens.query.shape, tokens.query.dtype
    E = tokens.keys.value.shape[-1]

    @partial(jax.checkpoint, prevent_cse=False)
    def body(state, now: tuple[Array, Array, Chunk]):
        flat, sees, own = now
        query = jnp.einsum("BCKGH->BKGCH", flat.reshape(B, -1, K, G, H))
        sight, key, value, age = seen(own, tokens.keys, feature_map, dtype)
        rows = read_causally(state, feature_map.query(query, own.position).features, key, value, sight)
        output, lost = _normalised(rows, sees[:, None, None, :])
        state = absorb(state, key, value, sight)
        return state if age is None else state.aged(age), (jnp.einsum("BKGCE->BCKGE", output).ravel(), lost)

    C = min(chunk, L)
    query, sees = flat(jnp.einsum("BKGLH->BLKGH", tokens.query), C), split(tokens.sees, C)
    final, (output, lost) = lax.scan(body, state, (query, sees, chunks(tokens.keys, C)))
    _report(lost)
    return final, jnp.einsum("BLKGE->BKGLE", joined(output, (B, L, K, G, E)))


def absorb_all(state: LinearState, keys: Keys, feature_map: FeatureMap, chunk: int) -> LinearState:
    """The state with all of `keys` added, chunk by chunk."""

    @partial(jax.checkpoint, prevent_cse=False)
    def body(state, own: Chunk):
        _, key, value, age = seen(own, keys, feature_map, state.top.dtype)
        state = absorb(state, key, value)
        return state if age is None else state.aged(age), None

    return lax.scan(body, state, chunks(keys, min(chunk, keys.key.shape[2])))[0]


def read_all(state: LinearState, inputs: Inputs, feature_map: FeatureMap, chunk: int) -> Float[Array, "B K G T E"]:
    """The rows of queries that all see all of the state, chunk by chunk."""
    B, K, G, T, H = inputs.query.shape

    @partial(jax.checkpoint, prevent_cse=False)
    def body(query, position, sees):
        rows = read(
            state, feature_map.query(jnp.einsum("BCKGH->BKGCH", query.reshape(B, -1, K, G, H)), position).features
        )
        output, lost = _normalised(rows, sees[:, None, None, :])
        return jnp.einsum("BKGCE->BCKGE", output).ravel(), lost

    C = min(chunk, T)
    query = flat(jnp.einsum("BKGTH->BTKGH", inputs.query), C)
    row = split(jnp.arange(T)[None], C), split(rows_that_see(inputs), C)
    output, lost = lax.map(lambda now: body(*now), (query, *row))
    _report(lost)
    return jnp.einsum("BTKGE->BKGTE", joined(output, (B, T, K, G, inputs.value.shape[-1])))


def seen(own: Chunk, keys: Keys, feature_map: FeatureMap, dtype: Any) -> tuple[Sight, Features, Array, Array | None]:
    """Who sees whom in a chunk; its keys' features with log_scale = -inf where there is no key; values; the age.

    Ages count from the token before the chunk, or the first of a new segment. That of the state, at the end, is None
    without decay.
    """
    B, K, _, H = keys.key.shape
    key, value = own.key.reshape(B, -1, K, H), own.value.reshape(B, -1, K, keys.value.shape[-1])
    key, value = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (key, value))
    features = feature_map.key(key, own.position)
    log_scale = jnp.where(own.visible[:, None, None, :], features.log_scale, -jnp.inf)
    past = jnp.tri(own.position.shape[1], dtype=bool)[None]
    same, joined = past, jnp.ones_like(own.position, bool)
    if own.segment is not None and own.last_segment is not None:
        same = past & (own.segment[:, :, None] == own.segment[:, None, :])
        joined = own.segment == own.last_segment[:, None]
    age = None
    if feature_map.log_decay is not None:
        first = jnp.where(same, own.position[:, None, :], own.position[:, :, None]).min(-1)
        since = (own.position - jnp.where(joined, own.last[:, None], first)).astype(dtype)
        log_decay = feature_map.log_decay[None].astype(dtype)
        log_scale -= log_decay[..., None] * since[:, None, None, :]
        age = log_decay * since[:, None, None, -1]
    sight = Sight(same[:, None, None], joined[:, None, None])
    return sight, features._replace(log_scale=log_scale), with_ones(value), age


def _normalised(rows: Float[Array, "B K G C E1"], sees: Bool[Array, "b 1 1 C"]) -> tuple[Array, Array]:
    """Numerators over denominators, 0 in rows that see no key or have lost theirs; and how many these last are."""
    numerator, denominator = rows[..., :-1], rows[..., -1]
    size, info = lax.stop_gradient(jnp.abs(denominator)), jnp.finfo(denominator.dtype)
    lost = sees & (size <= float(info.tiny) / float(info.eps))
    valid = sees & ~lost
    # By its own size first: it cancels, and no gradient meets the square of a small denominator. The barrier keeps XLA
    # from turning a / unit / (denominator / unit) into a * unit / (unit * denominator), which underflows all the same.
    unit = jnp.where(valid, size, 1)
    total = lax.optimization_barrier(jnp.where(valid, denominator, 1) / unit)
    return jnp.where(valid[..., None], numerator, 0) / unit[..., None] / total[..., None], lost.sum()


def _report(lost: Int[Array, " chunks"]) -> None:
    message = "the denominators of {n} rows vanish: products of features underflow; raise the temperature"
    traced_check(~lost.any(), message, n=lost.sum())
