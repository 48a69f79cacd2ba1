"""Scale rules: how many keys a row sees, how its entropy sets its temperature, and what a layer does with either."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from attention import scale_rules
from attention.flax import MultiHeadAttention, SpectralLinear
from attention.scale_rules import initial_scale, row_entropy
from attention.testing.cases import SAME, draw
from attention.testing.oracle import oracle

T, N, H = 13, 4, 8
D = N * H
CASE = draw(11)
TOKENS = np.random.default_rng(0).standard_normal((2, T, D))
MASKS = {
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "local_window_size": (3, 0)},
    "lengths": {"query_seq_lengths": np.array([5, T]), "key_value_seq_lengths": np.array([9, T])},
    "segments": {"query_segment_ids": np.sort(np.random.default_rng(1).integers(3, size=(2, T))), "is_causal": True},
    "dense": {"mask": np.random.default_rng(2).random((2, N, T, T)) < 0.6},
    "rows": {"mask": np.random.default_rng(3).random((1, 1, T, T)) < 0.1, "local_window_size": 5},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
def test_the_keys_of_each_row_are_counted(options, monkeypatch):
    """Against the oracle at scale 0, where each of n visible keys has the weight 1 / n."""
    weights = oracle(*CASE, scale=0.0, **options)[1]
    expected = np.moveaxis((weights > 0).sum(-1), 1, 2)
    monkeypatch.setattr(scale_rules, "AREA", 1)
    for rows in (T, 5):  # in one tile, and in three of which the last is moved back
        monkeypatch.setattr(scale_rules, "ROWS", rows)
        scale_rules._count.clear_cache()
        np.testing.assert_array_equal(jax.jit(lambda: attention.visible_keys(*CASE[:2], **options))(), expected)


@pytest.mark.parametrize("options", [MASKS["causal"], MASKS["dense"]])
def test_adaptive_temperature_is_the_polynomial_of_the_entropy(options, monkeypatch):
    monkeypatch.setattr(scale_rules, "AREA", 1)
    monkeypatch.setattr(scale_rules, "ROWS", 5)
    scale_rules._adaptive.clear_cache()
    temperature = np.array([0.05, 0.5, 1.0, 4.0])  # on both sides of an entropy of 0.5
    with jax.enable_x64(True):
        found = jax.jit(lambda: attention.adaptive_factor(*CASE[:2], temperature=temperature, **options))()
    weights = oracle(*CASE, temperature=temperature, **options)[1]
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
    polynomial = np.polyval([-0.037, 0.481, -2.3, 4.917, -1.791], entropy)
    expected = np.where(entropy > 0.5, np.maximum(polynomial, 1), 1)
    np.testing.assert_allclose(found, np.moveaxis(expected, 1, 2), rtol=0, atol=SAME)
    assert (expected == 1).any()
    assert (expected > 1).any()


def test_the_entropy_of_a_row():
    rows = jnp.array([[0.0, 0.0, 0.0, -jnp.inf], [1e4, 0.0, -1e4, 0.0], [-jnp.inf] * 4])
    np.testing.assert_allclose(row_entropy(rows), [math.log(3), 0, 0], rtol=4 * 2.0**-24)
    sample = jax.random.normal(jax.random.key(0), (20, 50))
    p = np.asarray(jax.nn.softmax(sample.astype(jnp.float64) if jax.config.jax_enable_x64 else sample), np.float64)
    # 50 terms of at most 1 / e each are added up, each rounded a few times.
    np.testing.assert_allclose(row_entropy(sample), -(p * np.log(p)).sum(-1), rtol=0, atol=50 * 4 * 2.0**-24)


def test_yarn_multiplies_queries_and_keys_alike():
    assert attention.yarn_factor(1) == 1
    assert attention.yarn_factor(16) == (0.1 * math.log(16) + 1) ** 2
    for stretch in (0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="stretch is"):
            attention.yarn_factor(stretch)


def test_rules_start_where_their_papers_do():
    assert initial_scale("1/sqrt(H)", 64) == initial_scale("learned", 64) == 1 / 8
    assert initial_scale("1/H", 64) == 1 / 64
    assert initial_scale("qk-norm", 64, 128) == math.log2(128**2 - 128)
    # The mean of s ln n over the rows of a causal sequence is 1 / sqrt(H); the paper's own start is 0.168 for 1,024.
    logs = np.log(np.arange(1, 129))
    np.testing.assert_allclose(initial_scale("ssmax", 64, 128) * logs.mean(), 1 / 8, rtol=1e-13)
    assert round(initial_scale("ssmax", 1, 1024), 3) == 0.168
    for length in (None, 1):
        with pytest.raises(ValueError, match=f"training_length is {length}: expected at least 2"):
            initial_scale("ssmax", 64, length)


# The layer.


def layer64(**options):
    """A layer in float64, and a function that gives its jitted methods."""
    layer = MultiHeadAttention(
        D, N, num_kv_heads=2, training_length=T, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options
    )

    def jitted(method=MultiHeadAttention.__call__, **static):
        graph, state = nnx.split(layer)
        run = jax.jit(lambda state, *args, **kw: method(nnx.merge(graph, state), *args, **static, **kw))
        return functools.partial(run, state)

    return layer, jitted


def operands(layer):
    """Query, key and value of the layer's kernels alone, in NumPy."""
    kernels = (np.asarray(linear.kernel[...]) for linear in (layer.query, layer.key, layer.value))
    return [(TOKENS @ kernel).reshape(2, T, -1, H) for kernel in kernels]


def merged(layer, heads):
    return heads.reshape(2, T, D) @ np.asarray(layer.output.kernel[...])


def test_qk_norm_is_the_cosine_times_a_learned_number():
    with jax.enable_x64(True):
        layer, jitted = layer64(scale="qk-norm")
        layer.scale[...] = jnp.array([1.0, 2.0, 4.0, 8.0])
        query, key, value = operands(layer)
        query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
        heads, _ = oracle(query, key, value, scale=np.asarray(layer.scale[...]), is_causal=True)
        np.testing.assert_allclose(jitted(is_causal=True)(TOKENS), merged(layer, heads), rtol=0, atol=SAME)


@pytest.mark.parametrize("window", [None, (4, 0)])
def test_ssmax_multiplies_each_row_by_the_log_of_its_keys(window):
    with jax.enable_x64(True):
        layer, jitted = layer64(scale="ssmax", local_window_size=window)
        query, key, value = operands(layer)
        seen = np.minimum(np.arange(1, T + 1), T if window is None else 5)
        scaled = query * np.log(seen)[:, None, None]
        options = {"scale": np.asarray(layer.scale[...]), "is_causal": True, "local_window_size": window}
        expected = merged(layer, oracle(scaled, key, value, **options)[0])
        np.testing.assert_allclose(jitted(is_causal=True)(TOKENS), expected, rtol=0, atol=SAME)
        extend, state = jitted(MultiHeadAttention.extend), layer.init_state(2, T)
        for start in range(T):
            state, output = extend(state, TOKENS[:, start : start + 1])
            np.testing.assert_allclose(output[:, 0], expected[:, start], rtol=0, atol=SAME)


def test_a_gate_multiplies_the_heads():
    with jax.enable_x64(True):
        layer, jitted = layer64(gated=True)
        heads, _ = oracle(*operands(layer), scale=1 / math.sqrt(H), is_causal=True)
        gate = 1 / (1 + np.exp(-TOKENS @ np.asarray(layer.gate.kernel[...])))
        expected = merged(layer, heads * gate.reshape(2, T, N, H))
        np.testing.assert_allclose(jitted(is_causal=True)(TOKENS), expected, rtol=0, atol=SAME)
        _, output = jitted(MultiHeadAttention.extend)(layer.init_state(2, T), TOKENS)
        np.testing.assert_allclose(output, expected, rtol=0, atol=SAME)
        with pytest.raises(ValueError, match="tokens is None"):
            layer.attended(*layer.projected(TOKENS), is_causal=True)


def test_sigma_reparametrisation_fixes_the_spectral_norm():
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        layer = SpectralLinear(6, 4, use_bias=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        layer.gamma[...], layer.bias[...] = jnp.array(3.0), jnp.array(rng.standard_normal(4))

        def reached():
            bias = np.asarray(layer.bias[...])
            return np.linalg.norm(np.asarray(layer(jnp.eye(6))) - bias, 2)

        np.testing.assert_allclose(reached(), 3, rtol=1e-14)
        kernel = layer.kernel[...] + jnp.array(rng.standard_normal((6, 4)))  # as after a step of training
        layer.kernel[...] = kernel
        singular = np.linalg.svd(np.asarray(kernel))[1]
        assert reached() > 3.001  # sigma lags behind
        for _ in range(100):
            layer.power_iteration()
        # Each iteration shrinks what is left by the square of the ratio of the first two singular values.
        assert (singular[1] / singular[0]) ** 200 < 1e-14
        np.testing.assert_allclose(reached(), 3, rtol=1e-12)


def test_singular_vectors_are_constants_and_carry_no_gradient():
    layer = MultiHeadAttention(D, N, spectral=True, rngs=nnx.Rngs(0))
    constants = nnx.to_pure_dict(nnx.state(layer, attention.flax.Constant))
    assert set(constants) == {"query", "key", "value", "output"}
    assert all(set(each) == {"left", "right"} for each in constants.values())
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.Param))["query"]) == {"kernel", "gamma"}


def test_the_layer_sharpens_rows_of_high_entropy_on_request():
    with jax.enable_x64(True):
        layer, jitted = layer64(scale=0.05)
        query, key, value = operands(layer)
        weights = oracle(query, key, value, scale=0.05, is_causal=True)[1]
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
        factor = np.maximum(np.polyval([-0.037, 0.481, -2.3, 4.917, -1.791], entropy), 1)
        factor = np.moveaxis(np.where(entropy > 0.5, factor, 1), 1, 2)[..., None]
        assert factor.max() > 1.2
        expected = merged(layer, oracle(query * factor, key, value, scale=0.05, is_causal=True)[0])
        found = jitted(is_causal=True, adaptive=True)(TOKENS)
        # SAME bounds the error of a row at given logits; those of the factor multiply scores of size below 1 here.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * SAME)
