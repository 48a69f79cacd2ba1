"""Sorted problems keep their bounds and gradients, are read less, and only those that gain by it are sorted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ratios import over

from attention import Certified, certified_attention, dot_product_attention
from attention.inputs import prepare
from attention.sparse import by_pages, order
from attention.testing.oracle import oracle

B, T, H, RUN, PAGE = 2, 173, 8, 24, 8  # too few for the moments of all keys
METHOD = Certified(tolerance=0.01, page=PAGE, query_chunk=40)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sorting pays for the problems of this file, and a block is a page."""
    monkeypatch.setattr(order, "LEAST", T)
    monkeypatch.setattr(by_pages, "READ", PAGE)


def problem(seed: int, *, shuffled: bool):
    """Runs of keys and of queries 0.1 around centres of size 2, two query heads; in any order if `shuffled`."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((B, -(-T // RUN), 1, H))
    around = np.repeat(centres, RUN, axis=1)[:, :T]
    query, key = (around + 0.1 * rng.standard_normal((B, T, n, H)) for n in (2, 1))
    value = rng.standard_normal((B, T, 1, H))
    if shuffled:
        queries, keys = rng.permutation(T), rng.permutation(T)
        query, key, value = query[:, queries], key[:, keys], value[:, keys]
    return tuple(x.astype(np.float32) for x in (query, key, value))


def lengths(*numbers: int):
    return np.array(numbers, np.int32)


@functools.partial(jax.jit, static_argnames="method")
def attended(case, keys, queries, method):
    options = {"key_value_seq_lengths": keys, "query_seq_lengths": queries}
    return certified_attention(*case, method=method, **options)


def test_error_is_within_its_bound_and_sorting_reads_less(record_ratios):
    """48 cases, with hidden keys and queries and with none; those that are left as they are by the same program."""
    everything = lengths(T, T)
    hidden = (everything, everything), (lengths(T - 5, 131), lengths(T, 77)), (lengths(0, 1), everything)
    read, worst = {}, []
    for shuffled, seed, (keys, queries) in itertools.product((False, True), range(4), hidden):
        case = problem(seed, shuffled=shuffled)
        output, certificate = attended(case, keys, queries, METHOD)
        expected, _ = oracle(*case, key_value_seq_lengths=keys, query_seq_lengths=queries)
        error = np.linalg.norm(np.asarray(output, np.float64) - expected, axis=-1)
        worst += over(error, np.asarray(certificate.error_bound, np.float64)).max((1, 2)).tolist()
        read.setdefault(shuffled, float(certificate.work))
    of = {"method": "Certified", "dtype": "float32", "causal": False, "kind": "deterministic", "problems": "sorted"}
    record_ratios({"output": worst}, **of)
    assert max(worst) <= 1, f"the error is {max(worst):.3g} of its bound"
    # In any order a page of 8 keys is of about 5 of the 8 clusters, so that every key would be read.
    assert read[True] < 0.5
    assert read[True] < 1.5 * read[False]


def test_the_derivative_is_that_of_the_output():
    """Central differences in float64: truncation of h^2 = 1e-10 and rounding of 1e-16 / h, against 1e-6."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        case = tuple(jnp.asarray(x, jnp.float64) for x in problem(1, shuffled=True))
        direction = tuple(jnp.asarray(rng.standard_normal(x.shape)) for x in case)
        weights = jnp.asarray(rng.standard_normal(case[0].shape))

        @jax.jit
        @jax.value_and_grad
        def loss(case):
            return (weights * dot_product_attention(*case, method=METHOD)).sum()

        moved = lambda h: loss(tuple(x + h * d for x, d in zip(case, direction, strict=True)))[0]  # noqa: E731
        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        found = sum(jnp.vdot(g, d) for g, d in zip(loss(case)[1], direction, strict=True))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_clusters_are_found_where_there_are_some():
    found = jax.jit(order.clusters, static_argnums=2)
    for shuffled in (False, True):
        clusters = found(problem(2, shuffled=shuffled)[1][0, :, 0], T, 24)
        assert clusters.count == -(-T // RUN)
    iid = np.random.default_rng(3).standard_normal((T, H)).astype(np.float32)
    assert found(iid, T, 24).count == 0


def test_pages_are_of_one_cluster_but_for_the_last():
    label = np.random.default_rng(4).integers(0, 5, T)
    hidden = np.arange(T) >= T - 11
    by = np.asarray(order.by_pages(jnp.where(hidden, order.MOST, label), PAGE))
    assert np.array_equal(np.sort(by), np.arange(T))
    assert np.array_equal(by[-11:], np.arange(T - 11, T))
    whole = (np.bincount(label[~hidden]) // PAGE).sum()
    pages = label[by[: whole * PAGE]].reshape(whole, PAGE)
    assert np.all(pages == pages[:, :1])


def test_nothing_is_sorted_where_order_counts():
    plain = functools.partial(prepare, METHOD, *problem(0, shuffled=False))
    assert order.pays(plain(), PAGE)
    assert not order.pays(plain(), T)
    for options in ({"is_causal": True}, {"local_window_size": (9, 9)}, {"bias": np.zeros((1, 1, 1, T), np.float32)}):
        assert not order.pays(plain(**options), PAGE)
