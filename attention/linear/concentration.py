r"""A bound on the error of trigonometric features that holds with a stated probability; `docs/bounds.md` derives it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.bernstein import vector_deviation
from attention.inputs import Inputs
from attention.linear.chunks import chunks, flat, joined, split
from attention.linear.engine import FeatureMap, over_rows, seen
from attention.linear.moments import around_mean, output_rounding
from attention.linear.state import LinearState, absorb
from attention.linear.temperature import halves
from attention.linear.tokens import Tokens
from attention.rounding import gamma, max_over_visible, norms, product_roundoff, roundoff, sees_any


def trigonometric_bound(
    inputs: Inputs,
    output: Float[Array, "B K G T E"],
    feature_map: FeatureMap,
    projection: Float[Array, "m H"],
    *,
    confidence: float,
    chunk: int,
) -> Float[Array, "B K G T"]:
    r"""A bound on ||output - softmax attention|| of each row, true with probability `confidence` over the draw of W.

    Each of the m independent rows of W brings a term Z to the numerator around a point c, and Z0 to the denominator.
    With ranges |Z| <= b, |Z0| <= b0, their second moments s^2 and s0^2 over the rows, and D the mean of Z0,

        |error| <= (d(s, b) + |output - c| d(s0, b0)) / (D - d(s0, b0)) + rounding,
        d(s, b) = k + sqrt(k^2 + 2 L (b l + sqrt(b^2 l^2 + s^2))^2 / m),   k = 2 b L / (3 m),   l^2 = ln(4 / p) / (2 m),

    L = ln(8 / p) and p = 1 - confidence: an empirical Bernstein bound. c and b are those of the keys with weights
    e^{|y|^2 / 2}, the mean of the values and their root mean square distance from it. It is never more than the
    largest distance of a value from the output. W must not depend on the operands.

    Cost: O((T + S) M E) operations a head; where causal one token at a time.

    References:
        Pinelis, "Optimum bounds for the distributions of martingales in Banach spaces" (1994), theorem 3.4.
    """
    dtype, E, m = output.dtype, output.shape[-1], projection.shape[0]
    value = inputs.value.astype(dtype)
    squares = (value * value).sum(-1, keepdims=True)
    widened = dataclasses.replace(inputs, value=jnp.concatenate([value, squares], -1))
    rows = over_rows(widened, _with_constant(feature_map), chunk, _along, _whole)
    c, (weight, square, second, second0, mean0) = rows[..., :E], jnp.moveaxis(rows[..., E:], -1, 0)

    of_weights, of_terms = _rounding(inputs, projection, chunk)
    spread = jnp.sqrt(jnp.maximum(square - norms(c) ** 2, 0) + 8 * of_weights * square)
    largest, largest0 = weight * spread * (1 + of_weights), weight * (1 + of_weights)
    lost, lost0 = of_terms * weight * (jnp.sqrt(square) + norms(c)), of_terms * weight
    u = roundoff(dtype)
    above = _deviation(second + 8 * (E + 8) * u * largest**2, largest, lost, m, confidence)
    below = _deviation(second0 + 72 * u * largest0**2, largest0, lost0, m, confidence)
    bound = 1.001 * (above + norms(output - c) * below) / (mean0 - below)

    anchor, radius = around_mean(inputs.mask, value)
    farthest = 1.001 * (radius[:, :, None] + norms(output - anchor[:, :, None]))
    farthest += 2 * u * max_over_visible(inputs.mask, norms(value)) + float(jnp.finfo(dtype).tiny) * E
    # A row of zeros may be one whose denominator vanished.
    known = (mean0 > below) & (bound < farthest) & (norms(output) > 0)
    bound = jnp.where(known, bound, farthest) + output_rounding(inputs, output)
    bound = jnp.where(jnp.isnan(bound), jnp.inf, bound)
    return jnp.where(sees_any(inputs.mask), bound, 0)


def _deviation(second, largest, lost, m: int, confidence: float) -> Array:
    """How far a mean of m independent vectors is from its expectation, each of two events with p / 4 left out.

    Args:
        second: the mean of their squared norms.
        largest: what no norm exceeds.
        lost: the rounding of a term.
        m: how many they are.
        confidence: 1 - p.
    """
    share = (1 - confidence) / 4
    moment = jnp.sqrt(second) + lost
    return vector_deviation(moment, largest, m, failure=share, moment_failure=share) + 2 * lost


def _with_constant(feature_map: FeatureMap) -> FeatureMap:
    """The feature map whose keys have one more feature, 1: its sums are those of e^{|y|^2 / 2}, which W is not in."""

    def key(tokens, position):
        found = feature_map.key(tokens, position)
        return found._replace(
            features=jnp.concatenate([found.features, jnp.ones_like(found.features[..., :1])], axis=-1)
        )

    return dataclasses.replace(feature_map, key=key, size=feature_map.size + 1)


def _moments(state: LinearState, query: Float[Array, "B K G C M"]) -> Float[Array, "B K G C F"]:
    """What the bound reads of rows that see all of the state: c, and five numbers beside it.

    These are the weight of the keys, the mean square of their values, the second moments of numerator and denominator
    over the rows of W, and the mean of the latter.
    """
    weighted, E = state.sums[..., -1, :], state.sums.shape[-1] - 2
    weight = weighted[..., -1:]
    means = weighted[..., :-1] / jnp.where(weight > 0, weight, 1)
    c = means[..., :E]
    mass = state.sums[..., :-1, -1]
    centred = state.sums[..., :-1, :E] - mass[..., None] * c[..., None, :]
    C, S = jnp.split(centred, 2, axis=-2)
    C0, S0 = (x[..., None, :] for x in jnp.split(mass, 2, axis=-1))
    CC, CS, SS = ((a * b).sum(-1)[..., None, :] for a, b in ((C, C), (C, S), (S, S)))
    cosine, sine = jnp.split(query, 2, axis=-1)
    second = (cosine**2 * CC + 2 * cosine * sine * CS + sine**2 * SS).mean(-1, keepdims=True)
    terms = cosine * C0 + sine * S0
    of_query = [jnp.maximum(second, 0), (terms**2).mean(-1, keepdims=True), terms.mean(-1, keepdims=True)]
    of_keys = [x[..., None, :] for x in (c, weight, means[..., E:])]
    return jnp.concatenate([jnp.broadcast_to(x, (*query.shape[:-1], x.shape[-1])) for x in [*of_keys, *of_query]], -1)


def _along(state: LinearState, tokens: Tokens, feature_map: FeatureMap, chunk: int) -> tuple[LinearState, Array]:
    """`_moments` of each row of a causal scan, token by token, since each row has sums of its own."""
    del chunk
    (B, K, G, L, H), dtype = tokens.query.shape, tokens.query.dtype

    def body(state, now):
        query, own = now
        sight, key, value, _ = seen(own, tokens.keys, feature_map, dtype)
        state = absorb(state, key, value, sight)
        features = feature_map.query(query.reshape(B, K, G, 1, H), own.position).features
        return state, _moments(state, features).ravel()

    query = flat(jnp.einsum("BKGLH->BLKGH", tokens.query), 1)
    state, rows = lax.scan(body, state, (query, chunks(tokens.keys, 1)))
    return state, jnp.einsum("BLKGF->BKGLF", joined(rows, (B, L, K, G, _width(tokens.keys.value))))


def _whole(state: LinearState, inputs: Inputs, feature_map: FeatureMap, chunk: int) -> Float[Array, "B K G T F"]:
    """`_moments` of rows that all see all of the state, chunk by chunk."""
    B, K, G, T, H = inputs.query.shape
    C = min(chunk, T)

    def body(now):
        query, position = now
        features = feature_map.query(jnp.einsum("BCKGH->BKGCH", query.reshape(B, C, K, G, H)), position).features
        return jnp.einsum("BKGCF->BCKGF", _moments(state, features)).ravel()

    rows = lax.map(body, (flat(jnp.einsum("BKGTH->BTKGH", inputs.query), C), split(jnp.arange(T)[None], C)))
    return jnp.einsum("BTKGF->BKGTF", joined(rows, (B, T, K, G, _width(inputs.value))))


def _width(value: Any) -> int:
    """F, of values that carry their squares."""
    return value.shape[-1] - 1 + 5


def _rounding(inputs: Inputs, projection: Array, chunk: int) -> tuple[Array, Array]:
    """Relative errors of sums of the keys' weights, and of their products with cosines, as shares of these sums."""
    dtype, (m, H) = inputs.query.dtype, projection.shape
    u, u_p, S = roundoff(dtype), product_roundoff(dtype), inputs.mask.num_keys
    down, up = (x[..., 0] for x in halves(inputs.beta))
    x = norms(inputs.query) * down
    y = max_over_visible(inputs.mask, norms(inputs.key.astype(dtype))) * up
    # Token by token where causal; else chunk by chunk.
    depth = (
        2 * S + 2 if inputs.mask.causal or inputs.mask.query_segments is not None else 2 * chunk + 2 * -(-S // chunk)
    )
    lengths = gamma((2 * m + depth + 48) * u_p + (H + 24) * (y**2 + 2 * math.log(m) + 2) * u)
    weights = lengths + float(jnp.finfo(dtype).tiny) * S * m
    angles = (gamma(H * u_p) + 8 * u) * norms(projection).max() * (x + y)
    return weights, weights + 2 * angles + 20 * u * x * y
