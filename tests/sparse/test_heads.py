"""What a head knows of all its values before it decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.sparse import heads

S, E = 96, 5
apart = jax.jit(heads.apart)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_two_values_are_so_far_apart_and_none_twice_as_far(size):
    """Of the first keys alone, whatever stands behind them."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 17, S):
        for value in (rng.standard_normal((S, E)), rng.standard_cauchy((S, E)), np.ones((S, E))):
            value = (size * value).astype(np.float32)
            value[count:] = 1e3 * size
            some = value[:count].astype(np.float64)
            largest = np.linalg.norm(some[:, None] - some[None], axis=-1).max()
            found = apart(value, np.arange(S) < count)
            # A relative (E + 8) 2^-22 inward, and where squares vanish or overflow the first value is any.
            assert 0.49 * largest * (size == 1) <= found <= largest


def test_two_sweeps_find_more_than_pages_do():
    value = jnp.asarray(np.random.default_rng(1).standard_normal((4096, 64)), jnp.float32)
    pages = value.reshape(-1, 128, 64)
    first = np.linalg.norm(pages - pages[:, :1], axis=-1).max()
    assert apart(value, jnp.ones(4096, bool)) > 1.05 * first
