"""Probabilistic certificates fail no more often than they say, and planted mistakes in them do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Params, Sampled, certified_attention, dot_product_attention
from attention.sparse import sampled_bounds, tail
from attention.testing.accuracy import most_failures
from attention.testing.cases import Case, draw
from attention.testing.oracle import oracle

S, T, H = 400, 4, 8
METHOD = Sampled(samples=96, window=16, sinks=4, query_block=4, delta=0.05)
DRAWS = 2048


def problem(family: str, seed: int = 0) -> Case:
    """Four queries at the end of 400 keys, with what a sample can get wrong in the tail."""
    rng = np.random.default_rng(seed)
    query, key, value = draw(seed, B=1, T=T, S=S, N=2, K=1, H=H)
    token = rng.integers(10, S - 30)
    match family:
        case "clustered pages":
            key[0] = np.repeat(rng.standard_normal((S // 16, 1, H)), 16, axis=0) + 0.1 * key[0]
            value[0] += np.repeat(rng.standard_normal((S // 16, 1, H)), 16, axis=0)
        case "power law":
            key *= 3 * np.arange(1, H + 1) ** -1.0
        case "duplicated keys":
            key[0] = key[0, rng.integers(4, size=S)]
        case "one huge key":  # which a sample rarely holds, and all weight is on it for some queries
            key[0, token] *= 20
            value[0, token] *= 3
        case "one huge value":
            value[0, token] *= 1e4
        case "a shifted end":  # values of the last quarter of the tail are elsewhere
            value[0, 3 * S // 4 :] += 5
    return Case(query, key, value).astype(np.float32)


NATURAL = ("iid", "clustered pages", "power law", "a shifted end")
ADVERSARIAL = ("duplicated keys", "one huge key", "one huge value")


@functools.partial(jax.jit, static_argnames="method")
def attended(case, seeds, temperature, method):
    """Outputs, bounds and masses, draws first."""

    def one(seed):
        params = Params(constants={"seed": seed})
        options = {"is_causal": True, "causal_alignment": "bottom_right"}
        output, found = certified_attention(*case, method=method, params=params, temperature=temperature, **options)
        return output[0], found.error_bound[0], found.dropped_mass[0]

    return jax.lax.map(one, seeds)


def measured(case: Case, temperature: float, seed: int, draws: int, method: Sampled = METHOD):
    """Errors, bounds and masses, `draws T N`, and the largest distance of two values."""
    seeds = np.random.default_rng(seed).integers(2**32, size=(draws, 2), dtype=np.uint32)
    outputs, bounds, masses = attended(case, seeds, np.float32(temperature), method)
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    expected, weights = oracle(*case, temperature=np.float32(temperature), **options)
    error = np.linalg.norm(np.asarray(outputs, np.float64) - expected[0], axis=-1)
    return error, np.asarray(bounds, np.float64), np.asarray(masses, np.float64), weights


@pytest.mark.parametrize("family", NATURAL + ADVERSARIAL)
def test_certificates_fail_no_more_often_than_they_say(family, record_property):
    """2,048 draws at each of two temperatures, of 4 rows and 2 heads; a row's draws are independent."""
    for temperature in (1.0, 8.0):
        error, bound, mass, weights = measured(problem(family), temperature, 1, DRAWS)
        assert not np.isnan(bound).any()
        failures = (error > bound).sum(0)
        assert failures.max() <= most_failures(DRAWS, 1 - METHOD.delta)
        lost = weights[0, :, :, 4 : S - T - METHOD.window].sum(-1).T  # of what is not kept in any case
        assert ((lost > mass).sum(0)).max() <= most_failures(DRAWS, 1 - METHOD.delta)
        record_property("failures", f"{family}, temperature {temperature:g}: {failures.sum()} of {error.size}")


@pytest.mark.campaign
@pytest.mark.parametrize("family", NATURAL + ADVERSARIAL)
def test_certificates_fail_no_more_often_than_they_say_in_the_campaign(family):
    """16 problems of 2,048 draws, at temperatures from 1/8 to 8."""
    for seed in range(16):
        error, bound, _, _ = measured(problem(family, seed), 2.0 ** (seed % 7 - 3), seed, DRAWS)
        assert (error > bound).sum(0).max() <= most_failures(DRAWS, 1 - METHOD.delta)


def test_the_bound_says_something_and_falls_with_the_sample():
    """At temperature 8 it is below the diameter, and three times the sample has less than 0.6 of it."""
    case = problem("iid")
    value = np.asarray(case.value[0, :, 0], np.float64)
    apart = np.linalg.norm(value[:, None] - value[None], axis=-1).max()
    medians = []
    for method in (METHOD, dataclasses.replace(METHOD, samples=3 * METHOD.samples)):
        _, bound, _, _ = measured(case, 8.0, 2, 64, method)
        medians.append(np.median(bound))
    assert medians[0] < 0.5 * apart
    assert medians[1] < 0.6 * medians[0]


PLANTS = {
    "a sign": (sampled_bounds, "sampled_bound", "one huge value"),
    "a page missing": (tail, "_tail", "a shifted end"),
    "value-blind": (sampled_bounds, "_sample", "one huge value"),
    "no range": (sampled_bounds, "_sample", "one huge key"),
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
    error, bound, _, _ = measured(problem(family), temperature, 3, 256, method)
    assert (error > bound).sum(0).max() > most_failures(256, 1 - method.delta)


def test_estimates_of_a_mean_are_unbiased():
    """At infinite temperature all weights are equal and the denominator is the number of keys, so that the output is
    an unbiased estimate of the mean value: its mean over draws is off by 5 standard errors at most."""
    case = problem("a shifted end")
    seeds = np.random.default_rng(4).integers(2**32, size=(DRAWS, 2), dtype=np.uint32)
    outputs, _, _ = attended(case, seeds, np.float32(np.inf), METHOD)
    outputs = np.asarray(outputs, np.float64)
    counts = np.arange(S - T + 1, S + 1)
    means = np.cumsum(np.asarray(case.value[0, :, 0], np.float64), axis=0)[counts - 1] / counts[:, None]
    error = np.abs(outputs.mean(0) - means[:, None])
    assert np.all(error <= 5 * outputs.std(0) / np.sqrt(DRAWS))
    assert outputs.std(0).min() > 0.01  # something is drawn


def test_rows_that_read_everything_have_rounding_alone():
    _, bound, mass, _ = measured(problem("iid"), 1.0, 5, 2, METHOD.exact_limit(S))
    assert not np.any(mass)
    assert bound.max() < 1e-3


def test_fields_and_params():
    for fields in ({"samples": 1}, {"window": 0}, {"sinks": -1}, {"query_block": 0}, {"delta": 0.0}, {"delta": 1.0}):
        with pytest.raises(ValueError, match=f"Sampled.{next(iter(fields))} is"):
            Sampled(**fields)
    case = draw(2).astype(jnp.float32)
    with pytest.raises(ValueError, match="the seed has shape"):
        dot_product_attention(*case, method=METHOD, params=Params())
    with pytest.raises(ValueError, match="draws constants"):
        dot_product_attention(*case, method=METHOD)
