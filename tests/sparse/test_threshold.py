"""The threshold selects what `lax.top_k` does, ties apart, and never uses the order of the entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from attention.sparse.threshold import kth_largest

S = 23
selected = jax.jit(lambda x, k: x >= kth_largest(x, k), static_argnames="k")
by_sorting = jax.jit(lambda x, k: lax.top_k(x, k)[0][..., -1:], static_argnames="k")


def expect_the_k_largest(x, k: int) -> None:
    """Against NumPy's sort: every entry above -inf that is not below the k-th of them."""
    kept = np.asarray(selected(jnp.asarray(x), k))
    for row, mine in zip(x, kept, strict=True):
        exists = np.sort(row[row > -np.inf])[::-1]
        expected = row >= exists[min(k, exists.size) - 1] if exists.size else np.zeros(row.size, bool)
        np.testing.assert_array_equal(mine, expected)


# No subnormal numbers: XLA may flush them to zero, with which they then tie.
ENTRIES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_subnormal=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1.0 + 2.0**-23]),
)


@given(st.lists(ENTRIES, min_size=S, max_size=S), st.sampled_from([1, 2, 7, S, 40]))
def test_any_floats(entries, k):
    expect_the_k_largest(np.array([entries], np.float32), k)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 8, 200])
def test_equals_top_k_where_nothing_ties(dtype, k):
    with jax.enable_x64(dtype == np.float64):
        x = np.random.default_rng(0).standard_normal((64, 512)).astype(dtype)
        kept = np.asarray(selected(x, k))
        np.testing.assert_array_equal(kept.sum(-1), k)
        np.testing.assert_array_equal(kept, x >= np.asarray(by_sorting(x, k)))


def test_ties_are_all_kept_in_any_order():
    x = np.random.default_rng(1).integers(-3, 4, (64, S)).astype(np.float32)
    expect_the_k_largest(x, 5)
    order = np.random.default_rng(2).permutation(S)
    np.testing.assert_array_equal(selected(x[:, order], 5), np.asarray(selected(x, 5))[:, order])


def test_has_no_gradient():
    x = jnp.arange(12.0).reshape(2, 6)
    assert not jax.grad(lambda x: kth_largest(x, 3).sum())(x).any()
