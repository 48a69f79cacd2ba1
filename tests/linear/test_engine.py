"""The engine against the quadratic form that it factors, and what makes it causal, constant in size and linear."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from attention import Performer, dot_product_attention

# The quadratic form and the engine differ by rounding in float64 only: sums of 17 x 24 positive terms whose
# exponents are below 100 in size, so by less than 1000 u of the largest value, about 2**-43 of numbers below 8.
SAME = 2.0**-40


def quadratic(query, key, value, projection, beta, visible) -> np.ndarray:
    """sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j) by NumPy in float64, row by row in logarithms."""
    (B, T, N, _), K = query.shape, key.shape[2]
    W, output = np.asarray(projection, np.float64), np.zeros((*query.shape[:3], value.shape[3]))
    for b, i, n in itertools.product(range(B), range(T), range(N)):
        root, kept = np.sqrt(abs(beta[n])), np.flatnonzero(visible[b, i])
        if kept.size == 0:
            continue
        x = query[b, i, n] * root * np.sign(beta[n])
        y = key[b, kept, n // (N // K)] * root
        exponents = (x + y) @ W.T - (x @ x + (y * y).sum(-1, keepdims=True)) / 2
        weights = np.exp(exponents - exponents.max()).sum(-1)
        output[b, i, n] = weights @ value[b, kept, n // (N // K)] / weights.sum()
    return output


def visibility(B, T, S, causal, alignment, lengths) -> np.ndarray:
    queries, keys = ([T] * B, [S] * B) if lengths is None else lengths
    i, j = np.arange(T)[:, None], np.arange(S)
    shown = []
    for mine, theirs in zip(queries, keys, strict=True):
        offset = theirs - mine if alignment == "bottom_right" else 0
        shown.append((i < mine) & (j < theirs) & ((j <= i + offset) | (not causal)))
    return np.stack(shown)


def draw(seed, T, S, N=4, K=2, H=8, E=5, B=2):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, E)))


BETAS = {
    "shared": np.float64(0.4),
    "negative": np.float64(-0.4),
    "a head": np.array([0.1, 0.7, -0.3, 0.0]),
}


@pytest.mark.parametrize(
    ("T", "S", "chunk", "beta"),
    [(13, 13, 5, "shared"), (17, 17, 16, "negative"), (7, 13, 4, "a head"), (13, 7, 128, "shared")],
)
def test_engine_equals_the_quadratic_form(T, S, chunk, beta):
    with jax.enable_x64(True):
        query, key, value = draw(0, T, S)
        method = Performer(features=24, chunk=chunk)
        params = method.init(jax.random.key(1), num_heads=4, head_dim=8)
        attend = jax.jit(
            lambda q, k, v, **lengths: [
                dot_product_attention(
                    q, k, v, method=method, params=params, scale=jnp.asarray(BETAS[beta]), **options, **lengths
                )
                for options in forms
            ]
        )
        forms = [{"is_causal": False}]
        forms += [{"is_causal": True, "causal_alignment": alignment} for alignment in ("top_left", "bottom_right")]
        for lengths in (None, ([T, T - 2], [S - 3, S]), ([3, T], [0, 5])):
            given = {} if lengths is None else dict(zip(LENGTHS, map(np.array, lengths), strict=True))
            for options, output in zip(forms, attend(query, key, value, **given), strict=True):
                shown = visibility(2, T, S, options["is_causal"], options.get("causal_alignment"), lengths)
                expected = quadratic(
                    query, key, value, params.constants["projection"], np.broadcast_to(BETAS[beta], 4), shown
                )
                np.testing.assert_allclose(output, expected, atol=SAME, rtol=0)


LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")
SEGMENTS = ("query_segment_ids", "key_value_segment_ids")


def test_segments_of_any_ids_in_any_order_equal_the_quadratic_form():
    """Ids that come back, that only queries or only keys have, in one call with lengths and either alignment."""
    T, S, forms = 9, 14, [{"is_causal": False}]
    forms += [{"is_causal": True, "causal_alignment": alignment} for alignment in ("top_left", "bottom_right")]
    rng, lengths = np.random.default_rng(8), (np.array([T, T - 2]), np.array([S - 3, S]))
    with jax.enable_x64(True):
        query, key, value = draw(0, T, S)
        method = Performer(features=24, chunk=4)
        params = method.init(jax.random.key(1), num_heads=4, head_dim=8)
        attend = jax.jit(
            lambda *case, **given: [
                dot_product_attention(*case, method=method, params=params, **options, **given) for options in forms
            ]
        )
        for low, high in ((0, 3), (-2, 9)):
            ids = [rng.integers(low, high, size=(2, n)) for n in (T, S)]
            given = dict(zip((*LENGTHS, *SEGMENTS), (*lengths, *ids), strict=True))
            for options, output in zip(forms, attend(query, key, value, **given), strict=True):
                shown = visibility(2, T, S, options["is_causal"], options.get("causal_alignment"), lengths)
                shown &= ids[0][:, :, None] == ids[1][:, None, :]
                expected = quadratic(query, key, value, params.constants["projection"], np.full(4, 8**-0.5), shown)
                np.testing.assert_allclose(output, expected, atol=SAME, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_of_very_different_norms_are_stabilised(causal):
    """log_scales from 0 to -1800, rising and falling along the sequence: nothing over- or underflows on the way."""
    with jax.enable_x64(True):
        query, key, value = draw(2, 13, 13)
        key = key * np.array([20, 1, 1, 3, 20, 0.1, 1, 1, 8, 20, 1, 0.1, 1])[:, None, None]
        method = Performer(features=24, chunk=4)
        params = method.init(jax.random.key(1), num_heads=4, head_dim=8)
        output = dot_product_attention(query, key, value, method=method, params=params, scale=1.0, is_causal=causal)
        shown = visibility(2, 13, 13, causal, "top_left", None)
        expected = quadratic(query, key, value, params.constants["projection"], np.ones(4), shown)
        np.testing.assert_allclose(output, expected, atol=16 * SAME, rtol=0)  # exponents up to 16 times larger


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_future_changes_no_bit_of_the_prefix(chunk):
    """Output, gradients and decoding, at a prefix that ends inside a chunk."""
    T, now = 37, 21
    method = Performer(features=16, chunk=chunk)
    params = method.init(jax.random.key(1), num_heads=4, head_dim=8)
    case = [np.float32(x) for x in draw(3, T, T)]

    def prefix(*case):
        return dot_product_attention(*case, method=method, params=params, is_causal=True)[:, :now]

    def decoded(*case):
        state = method.init_state(2, 2, 8, T, jnp.float32)
        state = dataclasses.replace(state, sums=state.sums[..., : 5 + 1])
        return method.extend(state, *case, params=params)[1][:, :now]

    @jax.jit
    def everything(*case):
        gradients = jax.grad(lambda *x: (prefix(*x) ** 2).sum(), argnums=(0, 1, 2))(*case)
        return prefix(*case), [gradient[:, :now] for gradient in gradients], decoded(*case)

    before = jax.tree.leaves(everything(*case))
    other = [np.float32(x) for x in draw(4, T, T)]
    futures = [[x[:, now:] * np.float32(factor) for x in case] for factor in (2, 40, 1e4)] + [
        [x[:, now:] for x in other]
    ]
    for future in futures:
        changed = [np.concatenate([x[:, :now], y], axis=1) for x, y in zip(case, future, strict=True)]
        for a, b in zip(jax.tree.leaves(everything(*changed)), before, strict=True):
            np.testing.assert_array_equal(a, b)


def test_extend_with_a_temperature_a_head_equals_the_whole():
    temperature = np.array([0.5, 1.0, 2.0, np.inf])
    with jax.enable_x64(True):
        case = list(draw(5, 13, 13, E=8))
        method = Performer(features=16, chunk=4)
        options = {"params": method.init(jax.random.key(1), num_heads=4, head_dim=8), "temperature": temperature}
        whole = jax.jit(lambda *case: dot_product_attention(*case, method=method, is_causal=True, **options))(*case)
        extend = jax.jit(lambda state, *new: method.extend(state, *new, **options))
        for split in ((13,), (5, 1, 7), (1,) * 13, (7, 1, 5)):
            state, outputs, start = method.init_state(2, 2, 8, 13, jnp.float64), [], 0
            for size in split:
                state, output = extend(state, *(x[:, start : start + size] for x in case))
                outputs.append(output)
                start += size
            assert int(state.length) == 13
            np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, atol=SAME, rtol=0)


def test_state_has_the_size_of_its_features_whatever_the_length():
    states = [Performer(features=16).init_state(2, 2, 8, length, jnp.bfloat16) for length in (10, 100_000)]
    assert [x.shape for x in jax.tree.leaves(states[0])] == [x.shape for x in jax.tree.leaves(states[1])]
    assert states[0].sums.dtype == jnp.float32
    assert sum(x.size for x in jax.tree.leaves(states[0])) == 2 * 2 * (16 * (8 + 1) + 1) + 1


@pytest.mark.parametrize("causal", [False, True])
def test_infinite_temperature_is_the_mean_over_visible_keys(causal):
    with jax.enable_x64(True):
        query, key, value = draw(6, 13, 13)
        method = Performer(features=16, chunk=5)

        @jax.jit
        def attend(*case):
            options = {"rng": jax.random.key(0), "temperature": np.inf, "is_causal": causal}
            output, transposed = jax.vjp(lambda *case: dot_product_attention(*case, method=method, **options), *case)
            return output, transposed(jnp.ones_like(output))[:2]

        output, gradients = attend(query, key, value)
        mean = np.cumsum(value, 1) / np.arange(1, 14)[:, None, None] if causal else value.mean(1, keepdims=True)
        np.testing.assert_allclose(output, np.broadcast_to(np.repeat(mean, 2, 2), output.shape), atol=SAME, rtol=0)
        assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


def test_vanished_denominators_are_zero_and_reported():
    """Logits of 1e4: the features of queries and keys peak in different places, and their products underflow."""
    query, key, value = (np.float32(x) for x in draw(7, 5, 5))
    method = Performer(features=4)

    @jax.jit
    def attend(scale, *case):
        def loss(*case):
            output = dot_product_attention(*case, method=method, rng=jax.random.key(0), scale=scale)
            return output.sum(), output

        gradients, output = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*case)
        return output, *gradients

    checked = jax.jit(checkify.checkify(attend))
    error, arrays = checked(4000.0, query, key, value)
    with pytest.raises(checkify.JaxRuntimeError, match="rows vanish"):
        error.throw()
    assert all(np.isfinite(x).all() for x in arrays)
    assert np.any(np.all(np.asarray(arrays[0]) == 0, axis=-1))
    clean, _ = checked(8**-0.5, query, key, value)
    clean.throw()


def test_backward_keeps_one_state_a_chunk_and_no_features_a_token():
    """From M = 64 to 256 the temporaries grow by the chunk states, and by less than one array of features."""
    T, H, C, small, large = 8192, 64, 128, 64, 256

    def temporaries(features):
        method = Performer(features=features, chunk=C)
        params = method.init(jax.random.key(0), num_heads=1, head_dim=H)
        x = jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32)

        def loss(*case):
            return dot_product_attention(*case, method=method, params=params, is_causal=True).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    growth = temporaries(large) - temporaries(small)
    states = 4 * (T // C) * (large - small) * (H + 1)
    tiles = 4 * 8 * C * (large - small)  # of the chunk at hand: features, exponents and their gradients, twice
    assert growth <= states + tiles + 4 * 4 * (large - small) * (H + 1)
    assert growth < 4 * T * (large - small)
