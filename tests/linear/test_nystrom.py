"""Landmark attention against its definition, with lengths shorter than the number of landmarks."""

import jax
import numpy as np
import pytest

from attention import Nystrom, dot_product_attention
from attention.testing.cases import SAME, draw


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def defined(query, key, value, landmarks):
    """One sequence and head, `T H`: three tables of weights and NumPy's pseudo-inverse."""

    def means(x):
        m = min(landmarks, len(x))
        run = np.arange(len(x)) * m // len(x)
        return np.stack([x[run == r].mean(0) for r in range(m)])

    middle = softmax(means(query) @ means(key).T)
    outer = softmax(query @ means(key).T), softmax(means(query) @ key.T)
    return outer[0] @ np.linalg.pinv(middle) @ outer[1] @ value


def test_output_is_the_definition():
    query, key, value = draw(1, T=11, S=13, E=5)
    lengths = np.array([[11, 6], [13, 3]])
    with jax.enable_x64(True):
        # Queries and keys twice as long keep the singular values of the middle table above 0.01, so that the
        # iteration, which squares its distance from the inverse and more in each step, ends at rounding.
        output = jax.jit(
            lambda *case: dot_product_attention(
                *case,
                method=Nystrom(landmarks=4, iterations=24),
                scale=2.0,
                query_seq_lengths=lengths[0],
                key_value_seq_lengths=lengths[1],
            )
        )(query, key, value)
        for b, n in np.ndindex(2, 4):
            T, S = lengths[:, b]
            expected = defined(2 * query[b, :T, n], key[b, :S, n // 2], value[b, :S, n // 2], 4)
            np.testing.assert_allclose(output[b, :T, n], expected, atol=2**10 * SAME, rtol=0)
            assert not np.any(np.asarray(output)[b, T:])


@pytest.mark.parametrize("fields", [{"landmarks": 0}, {"iterations": -1}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=f"Nystrom.{next(iter(fields))} is"):
        Nystrom(**fields)
