"""Soundness: the diameter of the values, the dropped mass and the certified error, over drawn cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import TopK, certified_attention
from attention.inputs import prepare, ungrouped
from attention.sparse import bounds
from attention.testing.cases import Case, draw, families
from attention.testing.oracle import oracle

METHOD = TopK(k=4, query_chunk=8)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
SEEDS = st.integers(0, 10_000)


def visible(options, B, T, S) -> np.ndarray:
    """`B T S`, from the oracle's weights at equal logits: above zero where a key is seen."""
    _, weights = oracle(np.zeros((B, T, 1, 1)), np.zeros((B, S, 1, 1)), np.zeros((B, S, 1, 1)), **options)
    return np.asarray(weights)[:, 0] > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "local_window_size": (4, 0)},
        {"query_seq_lengths": np.array([13, 6, 13]), "key_value_seq_lengths": np.array([5, 13, 1])},
        {"is_causal": True, "query_segment_ids": np.sort(np.random.default_rng(0).integers(3, size=(3, 13)))},
    ],
    ids=["all", "causal", "window", "lengths", "segments"],
)
def test_value_diameter_bounds_every_visible_pair(options):
    case = draw(0, B=3)
    operands = [np.float32(x) for x in (case.query, case.key)]
    bounded = jax.jit(lambda value: bounds.value_diameter(prepare(METHOD, *operands, value, **options)))
    seen = visible(options, 3, 13, 13)
    both = (seen[..., None] & seen[..., None, :])[..., None]  # B T S S 1
    for offset in (0.0, 100.0):
        value = (case.value * 10.0 ** np.array([-30, 0, 15])[:, None, None, None] + offset).astype(np.float32)
        bound = np.moveaxis(np.asarray(bounded(value), np.float64)[:, :, 0], 1, 2)  # B T K
        exact = value.astype(np.float64)
        pairs = np.linalg.norm(exact[:, :, None] - exact[:, None], axis=-1)  # B S S K
        diameter = np.where(both, pairs[:, None], 0).max((2, 3))
        assert np.all(diameter <= bound)
        if offset == 0 and "local_window_size" not in options and "query_segment_ids" not in options:
            # Twice the largest norm is at most twice the diameter, and the norm of one value more; not vacuous.
            norm = np.where(seen[..., None], np.linalg.norm(exact, axis=-1)[:, None], 0).max(2)
            assert np.all(bound <= 2.001 * norm)


@functools.partial(jax.jit, static_argnames="causal")
def certified(case, temperature, causal, **lengths):
    return certified_attention(*case, method=METHOD, temperature=temperature, is_causal=causal, **lengths)


@functools.partial(jax.jit, static_argnames="causal")
def planted(case, temperature, causal):
    """The certificate with a mistake in it: a wrong sign, no values, or no rounding."""
    inputs = prepare(METHOD, *case, temperature=temperature, is_causal=causal)
    _, certificate = METHOD.certify(inputs)
    mass, spread = certificate.dropped_mass, bounds.value_diameter(inputs)
    rounding = certificate.error_bound - mass * spread
    wrong = {"sign": rounding - mass * spread, "value-blind": mass + rounding, "unrounded": mass * spread}
    return {plant: ungrouped(bound, case.query) for plant, bound in wrong.items()}


def drawn(seed: int, dtype: str, temperature: float, causal: bool):
    """Eight hard problems, their error against the oracle, and the exact mass dropped from what was kept."""
    case = families(seed, B=8, T=13).astype(dtype)
    temperature = np.float32(temperature)
    with np.errstate(all="ignore"):  # values of 1e4 and more overflow float16
        expected, weights = oracle(*case, temperature=temperature, is_causal=causal)
        output, certificate = certified(case, temperature, causal)
        error = np.linalg.norm(np.asarray(output).astype(np.float64) - expected, axis=-1)
    return case, error, weights, certificate


@given(SEEDS, DTYPES, st.floats(1 / 8, 8), st.booleans())
@settings(max_examples=40)
def test_error_is_within_its_certificate(seed, dtype, temperature, causal):
    _, error, _, certificate = drawn(seed, dtype, temperature, causal)
    bound = np.asarray(certificate.error_bound, np.float64)
    assert certificate.kind == "deterministic"
    assert not np.isnan(bound).any()
    representable = np.isfinite(error)
    assert np.all(error[representable] <= bound[representable])


@given(SEEDS, DTYPES, st.floats(1 / 8, 8), st.booleans())
@settings(max_examples=20)
def test_dropped_mass_is_bounded_and_tight(seed, dtype, temperature, causal):
    """What was kept is read off the outputs of one-hot values; the mass of the rest, from the oracle's weights."""
    case, _, weights, certificate = drawn(seed, dtype, temperature, causal)
    one_hot = np.broadcast_to(np.eye(13, 16)[None, :, None], (8, 13, 2, 16)).astype(dtype)
    halves = (Case(case.query, case.key, half) for half in np.split(one_hot, 2, axis=-1))  # of the values' usual size
    kept = np.concatenate([certified(half, np.float32(temperature), causal)[0] for half in halves], -1)[..., :13]
    dropped = np.where(np.asarray(kept).astype(np.float64) > 0, 0, np.moveaxis(weights, 1, 2)).sum(-1)
    bound = np.asarray(certificate.dropped_mass, np.float64)
    # A kept weight below float16's smallest number reads as dropped: at most 13 of them, 2**-25 each.
    assert np.all(dropped <= bound + 13 * 2.0**-25)
    # Logits of up to about 13 |q||k| carry an error of D < 1e-3, so that the bound is within e^{2 D} of the truth.
    usual = np.arange(8) % 8 != 4  # all but the family with one huge key
    assert np.all(bound[usual] <= 1.01 * dropped[usual] + 1e-6)


@pytest.mark.parametrize("plant", ["sign", "value-blind", "unrounded"])
def test_planted_false_certificates_are_caught(plant):
    """By the check that the true one passes: some drawn error is above the bound."""
    caught = 0
    for seed in range(8):
        temperature, causal = np.float32(2.0 ** (seed % 7 - 3)), bool(seed % 2)
        case, error, _, certificate = drawn(seed, "float32", temperature, causal)
        assert np.all(error <= np.asarray(certificate.error_bound))
        caught += np.sum(error > np.asarray(planted(case, temperature, causal)[plant]))
    assert caught > 0


def test_nothing_dropped_leaves_rounding_alone():
    query, key, value = draw(3).astype(jnp.float32)
    _, certificate = certified_attention(query, key, value, method=TopK(k=13))
    assert not np.any(certificate.dropped_mass)
    # A thousand units of roundoff of the largest value: `rounding_bound` at these lengths and logits.
    assert np.all(certificate.error_bound <= 1000 * 2.0**-24 * np.linalg.norm(value, axis=-1).max())


def test_rows_that_see_nothing_have_no_error():
    query, key, value = draw(4).astype(jnp.float32)
    lengths = {"query_seq_lengths": np.array([13, 4]), "key_value_seq_lengths": np.array([0, 13])}
    output, certificate = certified(Case(query, key, value), np.float32(1), False, **lengths)
    for array in map(np.asarray, (output, certificate.error_bound, certificate.dropped_mass)):
        assert not np.any(array[0])
        assert not np.any(array[1, 4:])
    assert np.all(np.asarray(certificate.error_bound[1, :4]) > 0)
