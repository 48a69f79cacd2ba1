"""Which keys are kept, in what memory, and with what gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from attention import TopK, dot_product_attention
from attention.testing.cases import draw


def kept_keys(logits: np.ndarray, k: int) -> np.ndarray:
    """By `lax.top_k`: every finite entry that is not below the k-th of its row."""
    return np.isfinite(logits) & (logits >= np.asarray(lax.top_k(logits, min(k, logits.shape[-1]))[0])[..., -1:])


def softmax_over(logits, kept) -> np.ndarray:
    weights = np.where(kept, np.exp(logits - np.where(kept, logits, -np.inf).max(-1, keepdims=True)), 0)
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("query_chunk", [1, 5, 13, 64])
@pytest.mark.parametrize("k", [1, 4, 13, 99])
def test_keeps_the_k_largest(k, query_chunk):
    with jax.enable_x64(True):
        case = draw(0)
        output = dot_product_attention(
            *case, method=TopK(k=k, query_chunk=query_chunk), is_causal=True, temperature=0.5
        )
        logits = np.einsum("btkgh,bskh->bkgts", case.query.reshape(2, 13, 2, 2, 8), case.key) / np.sqrt(8) / 0.5
        logits = np.where(np.tri(13, dtype=bool), logits, -np.inf)
        weights = softmax_over(logits, kept_keys(logits, k))
        expected = np.einsum("bkgts,bske->btkge", weights, case.value).reshape(2, 13, 4, 8)
        # Both are float64 sums of at most 13 products of order one.
        np.testing.assert_allclose(output, expected, atol=2.0**-45, rtol=0)


def test_ties_are_kept_whatever_the_order_of_the_keys():
    """Keys in duplicate pairs with different values: k = 3 keeps two pairs."""
    with jax.enable_x64(True):
        query, key, value = draw(1, T=12)
        key = np.repeat(key[:, ::2], 2, axis=1)
        order = np.random.default_rng(2).permutation(12)
        outputs = [
            dot_product_attention(query, key[:, o], value[:, o], method=TopK(k=k)) for k in (3, 4) for o in (..., order)
        ]
        for output in outputs[1:]:
            np.testing.assert_allclose(output, outputs[0], atol=2.0**-45, rtol=0)


def test_equal_logits_give_the_mean():
    query, key, value = draw(3).astype(jnp.float32)
    output = dot_product_attention(query, key, value, method=TopK(k=2), temperature=jnp.inf)
    mean = np.repeat(np.mean(value, axis=1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(output, np.broadcast_to(mean, output.shape), atol=16 * 2.0**-24 * 4, rtol=0)


def test_gradient_is_that_of_the_kept_set():
    """Against central differences, step 1e-5, of softmax over the set that the unmoved operands keep."""
    with jax.enable_x64(True):
        case, k, step = draw(4, B=1, T=7, N=2, K=2, H=3), 3, 1e-5
        cotangent = np.random.default_rng(5).standard_normal((1, 7, 2, 3))

        def logits(query, key):
            return np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(3)

        kept = kept_keys(logits(case.query, case.key), k)

        def loss(query, key, value):
            weights = softmax_over(logits(query, key), kept)
            return (np.einsum("bnts,bsne->btne", weights, value) * cotangent).sum()

        method = TopK(k=k, query_chunk=4)
        gradients = jax.grad(
            lambda *case: (dot_product_attention(*case, method=method) * cotangent).sum(), argnums=(0, 1, 2)
        )(*map(jnp.asarray, case))
        for which, gradient in enumerate(gradients):
            numeric = np.zeros(case[which].shape)
            for index in np.ndindex(numeric.shape):
                ends = []
                for sign in (1, -1):
                    moved = [x.copy() for x in case]
                    moved[which][index] += sign * step
                    ends.append(loss(*moved))
                numeric[index] = (ends[0] - ends[1]) / (2 * step)
            # Truncation: step^2 / 6 times third derivatives of order ten; cancellation: 1e-16 / step.
            np.testing.assert_allclose(gradient, numeric, atol=1e-8, rtol=0)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_in_length(backward):
    """Four times the length, four times the temporaries, far below one T x S array of float32."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)

        def attend(*case):
            return dot_product_attention(*case, method=TopK(k=32), is_causal=True)

        def loss(*case):
            return attend(*case).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2)) if backward else attend).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long <= 4.4 * short
    assert long < 4 * 4096**2 / 4


def test_nan_in_a_visible_key_is_not_hidden():
    query, key, value = draw(6).astype(jnp.float32)
    output = dot_product_attention(query, key.at[0, 3].set(jnp.nan), value, method=TopK(k=2))
    assert np.isnan(output[0]).all()
    assert np.isfinite(output[1]).all()


def test_limit_and_fields():
    assert TopK(k=3).exact_limit(100) == TopK(k=100)
    for fields in ({"k": 0}, {"k": -3}, {"query_chunk": 0}, {"k": True}):
        with pytest.raises(ValueError, match=f"TopK.{next(iter(fields))} is"):
            TopK(**fields)
