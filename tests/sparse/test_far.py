"""Where all keys are replaced by their moments, the error is certified, hard rows are read, and gradients are right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Certified, certified_attention
from attention.inputs import prepare
from attention.sparse import far
from attention.testing.cases import draw, families
from attention.testing.oracle import oracle

B, T, H = 8, 176, 4  # long enough for polynomials of either degree at a head size of 4
METHOD = Certified(tolerance=0.05, page=8, query_chunk=48)


@functools.partial(jax.jit, static_argnames="method")
def attended(case, temperature, lengths, method):
    options = {"key_value_seq_lengths": lengths, "query_seq_lengths": jnp.full((B,), T - 1)}
    return certified_attention(*case, method=method, temperature=temperature, **options)


def measured(seed: int, dtype: str, method=METHOD):
    """Error, bound and replaced mass of 8 hard problems with keys of different lengths."""
    rng = np.random.default_rng(seed)
    temperature = np.float32(2.0 ** rng.uniform(-1, 5))
    case = families(seed, B=B, T=T, H=H).astype(dtype)
    lengths = rng.integers(0, T + 1, B).astype(np.int32)
    output, certificate = attended(case, temperature, lengths, method)
    expected, _ = oracle(
        *case, temperature=temperature, key_value_seq_lengths=lengths, query_seq_lengths=np.full(B, T - 1)
    )
    error = np.linalg.norm(np.asarray(output).astype(np.float64) - expected, axis=-1)
    return error, np.asarray(certificate.error_bound, np.float64), np.asarray(certificate.dropped_mass)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.campaign)])
def test_error_is_within_its_bound(dtype):
    """Problems of 176 queries and 4 heads: heads of either kind, and rows of either in one head."""
    masses, ratios = [], []
    for seed in range(10):
        error, bound, mass = measured(seed, dtype)
        assert np.all(error <= bound), f"seed {seed}: {np.max(error - bound):.3g} above the bound"
        replaced = mass == 1
        masses.append(replaced[:, : T - 1].mean(1).ravel())
        ratios.append((error / np.where(bound > 0, bound, 1))[replaced])
    shares = np.concatenate(masses)
    assert np.mean(shares == 1) > 0.1
    assert np.any((shares > 0.5) & (shares < 1))
    assert np.concatenate(ratios).max() > 0.01, "a bound a hundred times too wide says little"


def test_the_derivative_is_that_of_the_output():
    """Central differences in float64: truncation of h^2 = 1e-10 and rounding of 1e-16 / h, against 1e-6."""
    rng = np.random.default_rng(0)
    case = draw(0, B=1, T=T, H=H)
    direction = [rng.standard_normal(x.shape) for x in case]
    weights = rng.standard_normal(case.query.shape)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def evaluated(case, temperature):
        output, certificate = certified_attention(*case, method=METHOD, temperature=temperature)
        return (weights * output).sum(), certificate.dropped_mass

    with jax.enable_x64(True):
        for temperature in (2.3, 6.0):  # polynomials of degree 2 and 1
            (_, mass), gradient = evaluated(case, temperature)
            shares = np.asarray(mass).mean(1)
            assert np.any((shares > 0.5) & (shares < 1)) == (temperature < 6)  # rows of both kinds in one head
            some = lambda h: type(case)(*(x + h * d for x, d in zip(case, direction, strict=True)))  # noqa: E731
            apart = [evaluated(some(h), temperature)[0][0] for h in (1e-5, -1e-5)]
            found = sum(np.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
            np.testing.assert_allclose(found, (apart[0] - apart[1]) / 2e-5, rtol=1e-6)


def test_moments_are_taken_where_they_pay_and_all_rows_see_the_same():
    case = draw(0, B=1, T=T, H=H)
    plain = functools.partial(prepare, METHOD, *case)
    assert far.degrees(plain()) == (1, 2)
    assert far.degrees(plain(is_causal=True)) == ()
    assert far.degrees(plain(local_window_size=(9, 9))) == ()
    assert far.degrees(plain(bias=np.zeros((1, 1, 1, T)))) == ()
    assert far.degrees(prepare(METHOD, *draw(0, B=1, T=T // 2, H=H))) == (1,)
    assert far.degrees(prepare(METHOD, *draw(0, B=1, T=T // 4, H=H))) == ()
