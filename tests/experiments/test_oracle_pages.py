"""What is reported of `Certified` is what it did, and the oracle beside it is the one that its definition names."""

import functools

import jax
import numpy as np
import pytest

from attention import Certified, certified_attention
from attention.testing.cases import draw
from experiments.oracle_pages import diameters, looked_at, oracle

T, H, PAGE = 176, 4, 8
METHOD = Certified(tolerance=0.1, page=PAGE, query_chunk=48)


def head(seed=0):
    return tuple(np.asarray(x, np.float32) for x in draw(seed, B=1, T=T, K=1, N=1, H=H))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("temperature", [0.125, 16.0])
def test_what_is_read_is_the_work_of_the_path_that_ran(temperature, causal):
    """At 16, without a mask, all keys are taken at once: no page is read, whatever a plan of pages would have said."""
    operands, temperature = head(), np.float32(temperature)
    found = looked_at(operands, temperature, METHOD, causal=causal)
    call = jax.jit(functools.partial(certified_attention, method=METHOD, is_causal=causal))
    _, certificate = call(*operands, temperature=temperature)
    assert float(found.read) == float(certificate.work)
    np.testing.assert_array_equal(found.fires, np.asarray(certificate.dropped_mass)[0, :, 0] > 0)
    # Two programs, whose roundings may differ by a few in the sum of three terms that a bound is.
    np.testing.assert_allclose(found.bound, np.asarray(certificate.error_bound)[0, :, 0], rtol=2.0**-21)
    assert np.all(found.error <= found.bound)
    if temperature == 16 and not causal:
        assert float(found.read) == 0
        assert np.all(found.fires)


def by_definition(operands, temperature, tolerance, causal, row):
    """Pages in the order of what they change alone, as many as leave the error within the tolerance."""
    query, key, value = (np.asarray(x[0, :, 0], np.float64) for x in operands)
    keys = row + 1 if causal else len(key)
    weights = np.exp(key[:keys] @ query[row] / (temperature * H**0.5))
    exact = weights @ value[:keys] / weights.sum()
    allowed = tolerance * diameters(value[:keys], causal=False)[0]

    def error(pages):
        changed, kept = weights.copy(), value[:keys].copy()
        for page in pages:
            those = slice(page * PAGE, (page + 1) * PAGE)
            changed[those] = np.exp(key[those].mean(0) @ query[row] / (temperature * H**0.5))
            kept[those] = value[those].mean(0)
        return np.linalg.norm(changed @ kept / changed.sum() - exact), changed.sum()

    order = sorted(range(keys // PAGE), key=lambda page: np.prod(error([page])))  # |e_p| is the error times the sum
    most = max((n for n in range(len(order) + 1) if error(order[:n])[0] <= allowed), default=0)
    return 1 - most * PAGE / keys


@pytest.mark.parametrize("causal", [False, True])
def test_the_oracle_is_that_of_its_definition(causal):
    operands, tolerances = head(1), (0.2, 0.02)
    shares = oracle(operands, 2.0, tolerances, PAGE, causal=causal)
    assert shares.shape == (2, T)
    assert np.any((shares > 0) & (shares < 1))
    for row in (0, 6, 7, 60, 130, T - 1):
        expected = [by_definition(operands, 2.0, tolerance, causal, row) for tolerance in tolerances]
        np.testing.assert_allclose(shares[:, row], expected, rtol=0, atol=1e-6)  # a page is at least 0.04
