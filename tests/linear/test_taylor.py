"""Taylor attention against its definition with every weight written out, and its certificate where it is tight."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Taylor, certified_attention, dot_product_attention
from attention.linear.taylor import query_features
from attention.monomials import monomials
from attention.testing.accuracy import certificate_failures
from attention.testing.cases import SAME, draw


def polynomial(x, order):
    return sum(x**d / math.factorial(d) for d in range(order + 1))


def quadratic(query, key, value, order, shown):
    """The definition: weights T_p of logits around the mean logit of the visible keys, `shown` being `B T S`."""
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = np.einsum("BTNH,BSNH->BNTS", query, key)
    counts = np.maximum(shown.sum(-1), 1)[:, None, :, None]
    mean = np.where(shown[:, None], logits, 0).sum(-1, keepdims=True) / counts
    weights = np.where(shown[:, None], polynomial(logits - mean, order), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("BNTS,BSNE->BTNE", weights / np.where(total == 0, 1, total), value)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_monomials_are_the_polynomial_without_duplicates(order):
    rng = np.random.default_rng(order)
    x, y, a = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)), rng.standard_normal((7, 1))
    with jax.enable_x64(True):
        theirs = jax.jit(lambda y: jnp.concatenate(monomials(y, order), -1))(y)
        for factor in (1.0, 1000.0):  # a power of two is taken from the features of the second
            mine = jax.jit(lambda q, a: query_features(q, a, order).features)(factor * x, factor * a)
            products, expected = np.asarray(mine) @ np.asarray(theirs).T, polynomial(factor * (x @ y.T - a), order)
            unit = 2.0 ** np.ceil(np.log2(np.maximum(factor * np.abs(np.hstack([x, a])).max(1) / 256, 1)))[:, None]
            # Terms of up to (factor 3 max|x||y|)^p cancel.
            largest = polynomial(factor * (np.abs(x) @ np.abs(y).T + np.abs(a)), order)
            np.testing.assert_array_less(np.abs(products * unit**order - expected), SAME * largest)
    assert theirs.shape[1] == math.comb(3 + order, order)
    assert len({row.tobytes() for row in np.asarray(theirs).T}) == theirs.shape[1]


@pytest.mark.parametrize(("order", "causal"), [(1, True), (2, False), (3, True), (4, False)])
def test_output_is_the_definition(order, causal):
    with jax.enable_x64(True):
        query, key, value = draw(order, T=9, S=13, H=3, E=5)
        options = {"is_causal": causal, "key_value_seq_lengths": np.array([13, 11])}
        if causal:
            options["causal_alignment"] = "bottom_right"
        attend = jax.jit(
            lambda *case, **given: dot_product_attention(
                *case, method=Taylor(order=order, chunk=4), scale=0.5, **options, **given
            )
        )
        offset = np.array([13 - 9, 11 - 9]) if causal else np.array([13, 13])
        i, j = np.arange(9)[None, :, None], np.arange(13)[None, None, :]
        shown = (j <= i + offset[:, None, None]) & (j < np.array([13, 11])[:, None, None])
        # What all keys share cancels: around the origin its powers would take all digits.
        for shared in (0.0, 1e3):
            output = attend(query, key + shared, value)
            expected = quadratic(0.5 * query, key, value, order, shown)
            np.testing.assert_allclose(output, expected, atol=SAME * (1 + shared), rtol=0)


@pytest.mark.parametrize("order", [1, 3, 4])
def test_certificates_hold_at_every_order(order):
    """The law has them at order 2. The denominators of order 3 change their sign in some of these rows."""
    for seed in (1, 2, 5, 6):
        error, bound, _ = certificate_failures(Taylor(order=order, chunk=5), seed, jnp.float32, True)
        seen = np.isfinite(error)
        assert np.all(error[seen] <= bound[seen])


@functools.cache
def certified(causal):
    method = Taylor()
    return jax.jit(lambda q, k, v, t: certified_attention(q, k, v, method=method, temperature=t, is_causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_diffuse_rows_are_certified(causal):
    """Independent normal operands at temperature 8: to 0.02 of the largest distance of a value from their mean.

    Every row where each sees all keys, and half of the rows where causal: the first ones see too few for a mean.
    """
    query, key, value = (np.float32(x) for x in draw(3, B=1, T=512, N=1, K=1, H=64))
    radius = np.linalg.norm(value - value.mean(1, keepdims=True), axis=-1).max()
    output, certificate = certified(causal)(query, key, value, 8.0)
    bound = np.asarray(certificate.error_bound)
    assert (np.median if causal else np.max)(bound) <= 0.02 * radius
    exact, own = certified_attention(query, key, value, temperature=8.0, is_causal=causal)
    assert np.all(np.linalg.norm(output - exact, axis=-1) <= bound + own.error_bound)


def test_the_bound_is_nearly_attained():
    """One key of n at x = R and the rest at -R / (n - 1), with values as far apart: no constant factor is to be had.

    The remainder is then all on the one key, and nearly m (e^R - T_2(R)) / R^2; what is lost is mean e^x >= 1, and
    the key's own value, which stands at (n - 1) / n of the radius.
    """
    n, R = 512, 1.0
    query, key, value = np.zeros((1, n, 1, 64)), np.full((1, n, 1, 64), -R / (n - 1)), np.full((1, n, 1, 64), -1.0)
    query[..., 0], key[:, 0], value[:, 0] = 1.0, R, 1.0
    key[..., 1:] = 0
    output, certificate = certified(False)(*(np.float32(x) for x in (query, key, value)), np.float32(1 / 8))
    weights = np.exp(key[0, :, 0, 0])
    exact = weights @ value[0, :, 0] / weights.sum()
    error = np.linalg.norm(np.asarray(output)[0, :, 0] - exact, axis=-1)
    bound = np.asarray(certificate.error_bound)[0, :, 0]
    assert np.all(error <= bound)
    assert np.all(error >= 0.25 * bound)


@pytest.mark.parametrize("order", [0, 5, True])
def test_bad_orders_are_named(order):
    with pytest.raises(ValueError, match=r"Taylor.order is .*: expected 1, 2, 3 or 4"):
        Taylor(order=order)
