"""Probabilistic certificates fail no more often than they say, and planted mistakes in them do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Params, Sampled, dot_product_attention
from attention.sparse import sampled_bounds, tail
from attention.testing.accuracy import most_failures
from attention.testing.cases import draw
from attention.testing.oracle import oracle
from experiments.coverage import FAMILIES, QUERIES, Drawn, drawn, farthest, problem

S, H, DRAWS = 400, 8, 2048
METHOD = Sampled(samples=96, window=16, sinks=4, query_block=4, delta=0.05)
HEAVY = dataclasses.replace(METHOD, heavy=4, page=16)
# That is exceeded by a row whose certificate keeps its word with probability 1e-6.
ALLOWED = most_failures(DRAWS, 1 - METHOD.delta)


def measured(family: str, temperature: float, draws: int, method: Sampled = METHOD, *, seed: int = 0) -> Drawn:
    """So many draws on the problem of a seed."""
    return drawn(problem(family, S, H, seed), temperature, method, seed=seed + 1, draws=draws)


def most(outcomes) -> int:
    """How often the row at which it is most often true has it: its draws are independent, those of rows are not."""
    return outcomes.sum(0).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_certificates_fail_no_more_often_than_they_say(family):
    """2,048 draws at each of two temperatures, of 4 rows and 2 heads."""
    for temperature in (1.0, 8.0):
        found = measured(family, temperature, DRAWS)
        assert not np.isnan(found.bound).any()
        assert most(found.error > found.bound) <= ALLOWED
        lost = found.weights[:, :, METHOD.sinks : S - QUERIES - METHOD.window].sum(-1).T  # what is not kept in any case
        assert most(lost > found.mass) <= ALLOWED


@pytest.mark.parametrize("family", FAMILIES)
def test_certificates_fail_no_more_often_with_heavy_pages(family):
    """2,048 draws at temperature 2."""
    found = measured(family, 2.0, DRAWS, HEAVY)
    assert not np.isnan(found.bound).any()
    assert most(found.error > found.bound) <= ALLOWED


@pytest.mark.parametrize("method", [METHOD, HEAVY], ids=["sampled", "with heavy pages"])
def test_certificates_of_a_segment_are_what_they_are_alone(method):
    """The tokens of a problem among twice as many of another, twice as large: 2,048 draws, and the same sample."""
    operands, others = problem("shifted end", S, H), [2 * x for x in problem("iid", 2 * S, H)]
    where = np.random.default_rng(0).permutation(3 * S - 2 * QUERIES) < S - QUERIES
    where = np.append(where, np.repeat([False, True], QUERIES))  # the queries are the last tokens
    packed = [np.empty((1, 3 * S, *x.shape[2:]), x.dtype) for x in operands[1:]]
    for x, mine, theirs in zip(packed, operands[1:], others[1:], strict=True):
        x[:, where], x[:, ~where] = mine, theirs
    ids = np.where(where, 5, 0)[None]
    segments = {"query_segment_ids": ids[:, -2 * QUERIES :], "key_value_segment_ids": ids}
    query = np.concatenate([others[0], operands[0]], axis=1)
    alone = drawn(operands, 8.0, method, seed=1, draws=DRAWS)
    both = drawn((query, *packed), 8.0, method, seed=1, draws=DRAWS, **segments)
    found = Drawn(*(x[:, QUERIES:] for x in both))
    assert most(found.error > found.bound) <= ALLOWED
    # The same keys in the same order: sums of at most S terms, each with a relative error of S units of float32.
    np.testing.assert_allclose(found.output, alone.output, atol=2 * S * 2**-24 * np.abs(operands[2]).max())
    # Certificates count the rounding of sums over all 3 S keys, e = 3 S 2^-24 of each of fewer than 10 sums, which the
    # difference below the fraction line can make twice as large at the median row.
    assert np.median(np.abs(found.bound / alone.bound - 1)) < 20 * 3 * S * 2**-24


def test_no_visible_key_of_a_segment_is_outside_of_what_is_kept_and_sampled():
    """With as many samples as keys all are read: in a window, where a query is no such number of its segment's queries
    as its key is of the keys."""
    case = draw(5, T=8, S=24).astype(jnp.float32)
    keys = np.repeat([[1, 0]], [6, 18], axis=1).repeat(2, axis=0)
    ids = {"query_segment_ids": np.zeros((2, 8), int), "key_value_segment_ids": keys}
    method = Sampled(samples=24, window=1, sinks=1, query_block=2)
    options = {"local_window_size": (1, 1), "rng": jax.random.key(0)}
    output = dot_product_attention(*case, method=method, **ids, **options)
    expected, _ = oracle(*case, local_window_size=(1, 1), **ids)
    assert np.abs(expected).max() > 0
    # A logit is off by (H + 2) u |q| |k| / sqrt(H) at most, above and below the fraction line; 3 terms, each rounded.
    longest = [np.linalg.norm(x, axis=-1).max() for x in case]
    relative = (8 + 2) * 2**-24 * longest[0] * longest[1] / 8**0.5 + 8 * 2**-24
    np.testing.assert_allclose(output, expected, rtol=0, atol=2 * relative * longest[2])


def test_a_heavy_key_is_kept_and_its_weight_out_of_the_range():
    """The page of one key 20 times as long as the others is chosen, and the median bound falls below half of what it
    is where samples have to find that key."""
    bounds = [np.median(measured("huge key", 8.0, 64, method).bound) for method in (METHOD, HEAVY)]
    assert bounds[1] < 0.5 * bounds[0]


@pytest.mark.campaign
@pytest.mark.parametrize("family", FAMILIES)
def test_certificates_fail_no_more_often_than_they_say_in_the_campaign(family):
    """16 problems of 2,048 draws, at temperatures from 1/8 to 8."""
    for seed in range(16):
        found = measured(family, 2.0 ** (seed % 7 - 3), DRAWS, seed=seed)
        assert most(found.error > found.bound) <= ALLOWED


def test_the_bound_says_something_and_falls_with_the_sample():
    """At temperature 8 it is below half the diameter, and with three times the sample below 0.6 of that."""
    methods = (METHOD, dataclasses.replace(METHOD, samples=3 * METHOD.samples))
    few, many = (np.median(measured("iid", 8.0, 64, method).bound) for method in methods)
    assert few < 0.5 * farthest(problem("iid", S, H)[2][0, :, 0])
    assert many < 0.6 * few


PLANTS = {
    "a sign": (sampled_bounds, "sampled_bound", "huge value"),
    "a page missing": (tail, "_tail", "shifted end"),
    "value-blind": (sampled_bounds, "_sample", "huge value"),
    "no range": (sampled_bounds, "_sample", "huge key"),
}


def planted(plant: str, right):
    """A function of the certificate with a mistake in it."""

    def wrong(*arguments):
        found = right(*arguments)
        match plant:
            case "a sign":
                return -found[0], found[1]
            case "a page missing":
                return found._replace(before=found.before - S // 4, count=found.count - S // 4)
            case "value-blind":
                return found[0]._replace(radius=jnp.ones_like(found[0].radius)), found[1]
            case "no range":
                return found[0]._replace(most=jnp.zeros_like(found[0].most)), found[1]
        raise ValueError(plant)

    return wrong


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_mistakes_fail_more_often(plant, monkeypatch):
    """By the check that the true certificate passes."""
    module, name, family = PLANTS[plant]
    monkeypatch.setattr(module, name, planted(plant, getattr(module, name)))
    samples = 97 + list(PLANTS).index(plant)  # a program of its own
    method = Sampled(samples=samples, window=16, sinks=4, query_block=4)
    temperature = 1.0 if plant == "no range" else 8.0
    found = measured(family, temperature, 256, method)
    assert most(found.error > found.bound) > most_failures(256, 1 - method.delta)


@pytest.mark.parametrize("method", [METHOD, HEAVY], ids=["sampled", "with heavy pages"])
def test_estimates_of_a_mean_are_unbiased(method):
    """At infinite temperature all weights are equal and the denominator is the number of keys, so that the output is
    an unbiased estimate of the mean value: its mean over draws is off by 5 standard errors at most."""
    outputs = measured("shifted end", np.inf, DRAWS, method).output
    value = problem("shifted end", S, H)[2][0, :, 0].astype(np.float64)
    counts = np.arange(S - QUERIES + 1, S + 1)
    means = np.cumsum(value, axis=0)[counts - 1] / counts[:, None]
    error = np.abs(outputs.mean(0) - means[:, None])
    assert np.all(error <= 5 * outputs.std(0) / np.sqrt(DRAWS))
    assert outputs.std(0).min() > 0.01  # something is drawn


def test_fields_and_params():
    for fields in (
        {"samples": 1},
        {"window": 0},
        {"heavy": -1},
        {"page": 0},
        {"sinks": -1},
        {"query_block": 0},
        {"delta": 0.0},
        {"delta": 1.0},
    ):
        with pytest.raises(ValueError, match=f"Sampled.{next(iter(fields))} is"):
            Sampled(**fields)
    case = draw(2).astype(jnp.float32)
    with pytest.raises(ValueError, match="the seed has shape"):
        dot_product_attention(*case, method=METHOD, params=Params())
    with pytest.raises(ValueError, match="draws constants"):
        dot_product_attention(*case, method=METHOD)
