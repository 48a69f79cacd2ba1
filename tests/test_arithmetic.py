"""What the rounding bounds assume of elementary functions and matrix products, on the backend at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from attention.rounding import product_roundoff, roundoff


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elementary_functions_are_as_good_as_the_bounds_assume(dtype):
    """Relative errors, but for results below the smallest normal number, which count as zero."""
    rng, tiny = np.random.default_rng(0), np.finfo(dtype).tiny
    negative = -np.concatenate([10.0 ** rng.uniform(-8, 2, 50_000), [0.0]])
    domains = {"exp": negative, "tanh": rng.choice([-1, 1], 50_000) * 10.0 ** rng.uniform(-8, 2, 50_000)}
    domains["log"] = 10.0 ** rng.uniform(0, 8, 50_000)
    with jax.enable_x64(dtype == "float64"):
        for name, units in (("exp", 4), ("tanh", 8), ("log", 4)):
            x = domains[name].astype(dtype)
            exact = getattr(np, name)(x.astype(np.longdouble))
            error = np.abs(np.asarray(jax.jit(getattr(jnp, name))(x)) - exact)
            assert np.all(error <= units * roundoff(dtype) * np.abs(exact) + tiny), name
        assert jnp.exp(jnp.zeros((), dtype)) == 1


@pytest.mark.parametrize("n", [1, 64, 1024])
def test_a_matrix_product_rounds_as_its_backend_is_said_to(n):
    """Entries of one sign, so that sum |a||b| is the product itself."""
    rng = np.random.default_rng(n)
    a, b = (rng.uniform(0.5, 2, shape).astype(np.float32) for shape in ((64, n), (n, 64)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(np.asarray(jnp.matmul(a, b, precision=lax.Precision.HIGHEST)) - exact) / exact
    assert 0 < error.max() <= n * float(product_roundoff(jnp.float32))
