"""What floating point does to linear attention: decoding for long, and gradients of 16-bit operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from attention import Performer, dot_product_attention


def test_drift_after_100_000_decoded_tokens_is_within_its_bound():
    """Two relative errors of at most (n + 64) u, docs/bounds.md: of n additions, and of features and products."""
    n, H, size = 100_000, 4, 3.0
    method = Performer(features=8)
    params = method.init(jax.random.key(0), num_heads=1, head_dim=H)
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, n, 1, H)).astype(np.float32)
    value = value.clip(-size, size)

    @jax.jit
    def last(*case):
        def step(state, now):
            state, output = method.extend(state, *(x[None] for x in now), params=params)
            return state, output[0]

        state = method.init_state(1, 1, H, n, jnp.float32)
        return lax.scan(step, state, case)[1][-100:]

    with jax.enable_x64(True):
        whole = jax.jit(lambda *case: dot_product_attention(*case, method=method, params=params, is_causal=True)[-100:])
        expected = whole(*(x.astype(np.float64) for x in (query, key, value)))
    error = np.linalg.norm(np.asarray(last(query, key, value), np.float64) - np.asarray(expected), axis=-1).max()
    print(f"drift after {n} tokens: {error / size:.2g} of the largest value")
    assert error <= 2 * (n + 64) * 2.0**-24 * size * H**0.5


@pytest.mark.parametrize(("dtype", "u"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_gradients_of_16_bit_operands_are_rounded_once(dtype, u):
    """Within 2 u of the largest entry: one for the rounding of the gradient, one for float32 sums of 300 x 2 terms.

    Those are off by 600 x 2^-24 of sums of sizes, which are at most 2^6 of the largest entry here: 2^-9 u / u.
    Sums kept in 16 bits would be off by hundreds of u.
    """
    T, method = 300, Performer(features=32, chunk=32)
    params = method.init(jax.random.key(0), num_heads=2, head_dim=8)
    rng = np.random.default_rng(1)
    case = [jnp.asarray(rng.standard_normal((1, T, heads, 8)), dtype) for heads in (4, 2, 2)]
    cotangent = jnp.asarray(rng.standard_normal((1, T, 4, 8)), dtype)

    @jax.jit
    def gradients(cotangent, *case):
        return jax.vjp(lambda *case: dot_product_attention(*case, method=method, params=params, is_causal=True), *case)[
            1
        ](cotangent)

    found = gradients(cotangent, *case)
    with jax.enable_x64(True):
        expected = gradients(*(x.astype(jnp.float64) for x in (cotangent, *case)))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        error = np.abs(np.asarray(a, np.float64) - np.asarray(b)).max()
        assert error <= 2 * u * np.abs(b).max()
