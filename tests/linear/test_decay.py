"""A fixed decay a head against its dense formula, through a small method that has one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from attention import dot_product_attention
from attention.linear.base import Linear
from attention.linear.engine import FeatureMap
from attention.linear.state import Features
from attention.method import Capabilities, Params

# Both forms differ by rounding in float64 only: 13 positive terms, exponents below 100, values and gradients below
# 64: less than 1000 u of that, 2**-37. What an error in the algebra moves is of order one.
SAME = 2.0**-36


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention(Linear, register=False):
    """phi(x) = e^x entry by entry, M = H; log gamma, `K 1`, is trained."""

    chunk: int = 4

    capabilities = Capabilities(causal=True, lengths=True, segments=True, cross=True, decoding=True)

    def num_features(self, head_dim):
        return head_dim

    def feature_map(self, inputs):
        def phi(x, position):
            top = lax.stop_gradient(x.max(-1))
            return Features(jnp.exp(x - top[..., None]), top)

        return FeatureMap(
            query=phi,
            key=lambda y, position: phi(y[:, :, None], position),
            size=inputs.query.shape[-1],
            log_decay=inputs.params.trained["log_decay"],
        )


def dense(query, key, value, log_decay, visible, distance):
    """sum_j gamma^(p_i - j) phi(q_i).phi(k_j) v_j over the same without v, with `visible` and `distance` `B T S`."""
    N, K = query.shape[2], key.shape[2]
    query = query / np.sqrt(query.shape[-1])
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    decay = jnp.repeat(log_decay[:, 0], N // K)[None, :, None, None]
    weights = jnp.einsum("BTNH,BSNH->BNTS", jnp.exp(query), jnp.exp(key))
    weights *= jnp.where(visible[:, None], jnp.exp(decay * np.where(visible, distance, 0)[:, None]), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("BNTS,BSNE->BTNE", weights / jnp.where(total > 0, total, 1), value)


def draw(T, S, K=2):
    rng = np.random.default_rng(T)
    query, key, value = (rng.standard_normal((2, n, k, 8)) for n, k in ((T, 2 * K), (S, K), (S, K)))
    return query, key, value, np.array([[-0.7], [-0.01]])


def seen(T, S, offset, ids):
    position, column = np.arange(T) + offset, np.arange(S)
    distance = np.broadcast_to(position[:, None] - column, (2, T, S))
    return (distance >= 0) & (ids[0][:, :, None] == ids[1][:, None, :]), distance


@pytest.mark.parametrize(("T", "S", "segments"), [(13, 13, 1), (5, 13, 1), (7, 11, 3)])
def test_decay_is_the_dense_formula(T, S, segments):
    """Output and gradients, log gamma's too: aligned to the end, and with segments of any ids in any order."""
    rng = np.random.default_rng(1)
    ids = rng.integers(segments, size=(2, T)), rng.integers(segments, size=(2, S))
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    if segments > 1:
        options |= {"query_segment_ids": ids[0], "key_value_segment_ids": ids[1]}
    visible, distance = seen(T, S, S - T, ids)
    with jax.enable_x64(True):
        case = draw(T, S)
        cotangent = rng.standard_normal(case[0].shape)

        def attend(query, key, value, log_decay):
            params = Params(trained={"log_decay": log_decay})
            return dot_product_attention(query, key, value, method=Retention(), params=params, **options)

        def everything(function):
            output, transposed = jax.vjp(function, *case)
            return output, transposed(cotangent)

        actual = jax.jit(lambda: everything(attend))()
        expected = jax.jit(lambda: everything(lambda *case: dense(*case, visible, distance)))()
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=SAME)


def test_a_first_key_that_outweighs_all_others_is_forgotten():
    """Its log_scale is 60, and 300 tokens later it weighs 2^-300: the state's maximum must have followed it down."""
    T = 300
    query, key, value, _ = draw(T, T)
    key[:, 0] += 60
    params = Params(trained={"log_decay": jnp.full((2, 1), np.log(0.5), jnp.float32)})
    method = Retention()
    tokens = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]

    @jax.jit
    def decoded(*tokens):
        def step(state, now):
            state, output = method.extend(state, *(x[:, None] for x in now), params=params)
            return state, output[:, 0]

        state = method.init_state(2, 2, 8, T, jnp.float32)
        return jnp.moveaxis(lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in tokens])[1], 0, 1)

    whole = jax.jit(lambda *case: dot_product_attention(*case, method=method, params=params, is_causal=True))(*tokens)
    everyone = np.zeros((2, T), int)
    with jax.enable_x64(True):
        expected = dense(query, key, value, np.full((2, 1), np.log(0.5)), *seen(T, T, 0, (everyone, everyone)))
    # A weight's exponent is below 64 in size and rounded 3 times, 3 x 64 u; its age of n tokens is rounded n times but
    # weighs 2^-n, sum n 2^-n = 2: below 256 u for weights and as much for their sum, times values below 5.
    for output in (decoded(*tokens), whole):
        np.testing.assert_allclose(output, expected, rtol=0, atol=512 * 5 * 2.0**-24)


def test_a_decay_without_a_causal_mask_is_refused():
    query, key, value, log_decay = draw(5, 5)
    with pytest.raises(ValueError, match="is_causal is False: expected True"):
        dot_product_attention(query, key, value, method=Retention(), params=Params(trained={"log_decay": log_decay}))
