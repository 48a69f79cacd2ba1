"""Rows that read much are read apart: within their bounds, to the same bits whatever comes later, in fewer blocks."""

import functools

import jax
import numpy as np
import pytest
from ratios import over

from attention import Certified, certified_attention
from attention.sparse import by_pages, kernel
from attention.testing.oracle import oracle

T, N, H, RUN, PAGE = 192, 4, 8, 8, 8
OF = {"method": "Certified", "dtype": "float32", "kind": "deterministic"}
METHOD = Certified(tolerance=0.02, page=PAGE, query_chunk=64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A block is a page, one is many, causal tiles are planned in two parts, and no kernel reads them."""
    monkeypatch.setattr(kernel, "able", lambda *_: False)
    for name, number in {
        "READ": PAGE,
        "MANY": PAGE,
        "LATE_ROWS": 8,
        "LATE_READ": 16,
        "PAGES": 24,
        "SPANS": 2,
    }.items():
        monkeypatch.setattr(by_pages, name, number)


def problem(seed: int):
    """Runs of tokens 0.1 around centres of size 3, two query heads a key head; every 29th query is near none."""
    rng = np.random.default_rng(seed)
    around = np.repeat(3 * rng.standard_normal((1, T // RUN, N // 2, H)), RUN, axis=1)
    query, key = (np.repeat(around, n, axis=2) + 0.1 * rng.standard_normal((1, T, n * N // 2, H)) for n in (2, 1))
    query[:, ::29] = rng.standard_normal(query[:, ::29].shape)
    return tuple(x.astype(np.float32) for x in (query, key, rng.standard_normal(key.shape)))


@functools.partial(jax.jit, static_argnames="method")
def attended(case, method):
    return certified_attention(*case, method=method, is_causal=True)


def test_late_rows_are_within_their_bounds_and_tiles_read_less(monkeypatch, record_ratios):
    """24 cases."""
    worst = []
    for seed in range(24):
        case = problem(seed)
        output, certificate = attended(case, METHOD)
        expected, _ = oracle(*case, is_causal=True)
        error = np.linalg.norm(np.asarray(output, np.float64) - expected, axis=-1)
        worst.append(float(over(error, np.asarray(certificate.error_bound, np.float64)).max()))
    record_ratios({"output": worst}, **OF, causal=True, problems="late rows")
    assert max(worst) <= 1, f"seed {np.argmax(worst)}: the error is {max(worst):.3g} of its bound"
    monkeypatch.setattr(by_pages, "MANY", T)
    together = Certified(tolerance=0.0201, page=PAGE, query_chunk=64)  # a program of its own
    apart, other = attended(case, together)
    # The tolerances differ by a part in 200, so that few rows differ by more than rounding; what is read differs.
    assert np.median(np.abs(np.asarray(output - apart))) < 1e-6
    assert certificate.work < other.work


def test_what_comes_later_changes_no_bit():
    case, other = problem(1), problem(2)
    before, _ = attended(case, METHOD)
    for now in (30, 100, 150):
        later = (np.arange(T) >= now)[:, None, None]
        for changed in (tuple(np.where(later, y, x) for x, y in zip(case, other, strict=True)), (40 * case[0],)):
            query = np.where(later, changed[0], case[0])
            rest = [np.where(later, y, x) for x, y in zip(case[1:], changed[1:] or case[1:], strict=True)]
            after, _ = attended((query, *rest), METHOD)
            np.testing.assert_array_equal(np.asarray(after)[:, :now], np.asarray(before)[:, :now])
