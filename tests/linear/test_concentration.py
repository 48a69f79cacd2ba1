"""The probabilistic certificate of trigonometric features: its formula row by row, and how often it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from attention import Performer, certified_attention
from attention.testing.cases import draw
from attention.testing.oracle import oracle

P = 0.05  # what the default confidence leaves out


def deviation(second, largest, m):
    """As `trigonometric_bound` says it."""
    both, one = np.log(8 / P), np.sqrt(np.log(4 / P) / (2 * m))
    k, s = 2 * largest * both / (3 * m), largest * one + np.sqrt(largest**2 * one**2 + second)
    return k + np.sqrt(k**2 + 2 * both * s**2 / m)


def bound(q, keys, values, W, beta, output):
    """The definition for one row that sees `keys`, every term of every feature written out."""
    x, y = q * np.sqrt(beta), keys * np.sqrt(beta)
    weights = np.exp((y**2).sum(-1) / 2)
    c = weights @ values / weights.sum()
    spread = np.sqrt(weights @ ((values - c) ** 2).sum(-1) / weights.sum())
    cosines = np.cos((x - y) @ W.T).T * weights  # m S
    numerator, denominator = cosines @ (values - c), cosines.sum(-1)
    above = deviation((numerator**2).sum(-1).mean(), weights.sum() * spread, len(W))
    below = deviation((denominator**2).mean(), weights.sum(), len(W))
    return (above + np.linalg.norm(output - c) * below) / (denominator.mean() - below)


@pytest.mark.parametrize("causal", [True, False])
def test_the_bound_is_its_formula(causal):
    """With segments where causal, else with lengths; a temperature a head. Where it is below the values' width.

    1.001 is for rounding, which in float64 is less than 1e-6 of it.
    """
    method, T = Performer(kind="trigonometric", coupling="iid", features=512, chunk=5), 13
    temperature, (query, key, value) = np.array([8.0, 16.0, 32.0, 64.0]), draw(1)
    ids = np.random.default_rng(0).integers(2, size=(2, T))
    lengths = np.array([T, T - 4])
    with jax.enable_x64(True):
        params = method.init(jax.random.key(0), num_heads=4, head_dim=8)
        masks = {"query_segment_ids": ids, "key_value_segment_ids": ids} if causal else {}
        masks |= {} if causal else {"key_value_seq_lengths": lengths}
        options = {"temperature": temperature, "is_causal": causal, "params": params, **masks}
        attend = jax.jit(lambda *case: certified_attention(*case, method=method, **options))
        output, certificate = attend(query, key, value)
        output, bounds = np.asarray(output), np.asarray(certificate.error_bound)
    assert (certificate.kind, certificate.confidence) == ("probabilistic", 0.95)
    W, compared = np.asarray(params.constants["projection"], np.float64), 0
    for b, i, n in np.ndindex(output.shape[:3]):
        seen = (np.arange(T) <= i) & (ids[b] == ids[b, i]) if causal else np.arange(T) < lengths[b]
        values = value[b, seen, n // 2]
        expected = 1.001 * bound(
            query[b, i, n], key[b, seen, n // 2], values, W, 1 / np.sqrt(8) / temperature[n], output[b, i, n]
        )
        if 0.01 < expected < np.linalg.norm(values - values.mean(0), axis=-1).max():
            np.testing.assert_allclose(bounds[b, i, n], expected, rtol=1e-6)
            compared += 1
    assert compared >= output[..., 0].size / 3


def test_it_holds_as_often_as_it_says_and_says_something():
    """Over 4,000 draws of W, row by row."""
    method = Performer(kind="trigonometric", coupling="iid", features=512)
    case = draw(2, B=1, T=24, N=1, K=1, H=4)
    expected, _ = oracle(*case, temperature=2.0)
    query, key, value = (jnp.asarray(x, jnp.float32) for x in case)

    @jax.jit
    def drawn(keys):
        def one(rng):
            output, certificate = certified_attention(query, key, value, method=method, temperature=2.0, rng=rng)
            return output, certificate.error_bound

        return lax.map(one, keys, batch_size=100)

    outputs, bounds = (np.asarray(x, np.float64)[:, 0, :, 0] for x in drawn(jax.random.split(jax.random.key(3), 4000)))
    errors = np.linalg.norm(outputs - expected[0, :, 0], axis=-1)
    width = np.linalg.norm(case.value - case.value.mean(1, keepdims=True), axis=-1).max()
    failed, tightness = (errors > bounds).mean(0), np.quantile(errors / bounds, 1 - P)
    print(
        f"of 4,000 draws at most {failed.max():.2%} fail in a row; 95% of errors are below {tightness:.2g} of the bound"
    )
    assert np.all(failed <= P)
    assert np.median(bounds) <= width / 2
    assert tightness >= 0.05


def test_only_independent_trigonometric_rows_have_a_certificate():
    kinds = {
        (kind, coupling): Performer(kind=kind, coupling=coupling).capabilities.certificate
        for kind in ("positive", "trigonometric")
        for coupling in ("iid", "orthogonal", "simplex")
    }
    assert {pair for pair, kind in kinds.items() if kind != "none"} == {("trigonometric", "iid")}


def test_sines_and_cosines_are_as_good_as_the_bound_assumes():
    angles = np.random.default_rng(4).uniform(-1000, 1000, 100_000).astype(np.float32)
    for mine, exact in ((jnp.cos, np.cos), (jnp.sin, np.sin)):
        error = np.abs(np.asarray(jax.jit(mine)(angles), np.float64) - exact(angles.astype(np.float64)))
        assert error.max() <= 4 * 2.0**-24
