"""The certified error holds on drawn cases, planted mistakes in it are caught, and the tolerance is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Certified, certified_attention, dot_product_attention
from attention.sparse import by_pages, plan
from attention.testing.cases import Case, draw, families
from attention.testing.oracle import oracle

B, T = 16, 33
METHODS = {bound: Certified(tolerance=0.5, page=8, query_chunk=24, bound=bound) for bound in ("ball", "box", "sketch")}
PROGRAMS = (
    ("ball", "float32", False),
    ("box", "bfloat16", True),
    ("sketch", "float32", True),
    ("ball", "bfloat16", False),
)


@functools.partial(jax.jit, static_argnames=("method", "causal"))
def attended(case, temperature, method, causal):
    return certified_attention(*case, method=method, temperature=temperature, is_causal=causal)


def measured(method, seed: int, dtype: str, causal: bool):
    """Error, bound, largest distance of two visible values, and certificate, of 16 hard problems."""
    temperature = np.float32(2.0 ** np.random.default_rng(seed).uniform(-3, 3))
    case = families(seed, B=B, T=T).astype(dtype)
    output, certificate = attended(case, temperature, method, causal)
    expected, _ = oracle(*case, temperature=temperature, is_causal=causal)
    error = np.linalg.norm(np.asarray(output).astype(np.float64) - expected, axis=-1)
    return case, error, np.asarray(certificate.error_bound, np.float64), certificate


def sound(program: int, seeds) -> np.ndarray:
    bound, dtype, causal = PROGRAMS[program]
    ratios = []
    for seed in seeds:
        _, error, limit, certificate = measured(METHODS[bound], seed, dtype, causal)
        assert certificate.kind == "deterministic"
        assert np.all(error <= limit), f"{PROGRAMS[program]}, seed {seed}: {np.max(error - limit):.3g} above the bound"
        assert np.all(np.asarray(certificate.dropped_mass) <= 1)
        known = np.asarray(certificate.dropped_mass) > 0.01
        ratios.append((error / np.where(limit > 0, limit, 1))[known])
    return np.concatenate(ratios)


@pytest.mark.parametrize("program", range(4))
def test_error_is_within_its_bound(program):
    """1,024 cases of 33 queries and 4 heads, 256 a program."""
    ratios = sound(program, range(1000 * program, 1000 * program + 16))
    assert ratios.size > 100  # the means are used
    assert ratios.max() > 0.01, "a bound a hundred times too wide says little"


@pytest.mark.campaign
@pytest.mark.parametrize("program", range(4))
def test_error_is_within_its_bound_in_the_campaign(program):
    """10,240 cases."""
    sound(program, range(10_000 * (program + 1), 10_000 * (program + 1) + 160))


def test_certified_error_is_within_the_tolerance():
    """Of the largest distance of two visible values, or of rounding where that is more than the tolerance."""
    for tolerance in (0.1, 0.5):
        method = dataclasses.replace(METHODS["ball"], tolerance=tolerance)
        for seed in range(4):
            case, _, bound, _ = measured(method, seed, "float32", False)
            value = np.asarray(case.value, np.float64)
            apart = np.linalg.norm(value[:, :, None] - value[:, None], axis=-1).max((1, 2))  # B K
            _, _, rounding, _ = measured(METHODS["ball"].exact_limit(T), seed, "float32", False)
            allowed = np.maximum(tolerance * np.repeat(apart, 2, axis=1)[:, None], 1.01 * rounding)
            # A mean's rounding is counted twice, once in the limits of the plan; 1 part in 1,000 for both.
            assert np.all(bound <= 1.01 * allowed + rounding)


def planted(monkeypatch, plant: str) -> None:
    """A mistake in the plan, where the certificate comes from."""
    true = plan.plan

    def wrong(query, pages, visible, known, own, **options):
        if plant == "a sign":
            right = true(query, pages, visible, known, own, **options)
            return right._replace(error=-right.error)
        if plant == "value-blind":
            pages = pages._replace(coupling=0 * pages.coupling)
            return true(query, pages, visible, known, own._replace(diameter=0 * own.diameter + 1), **options)
        if plant == "a page missing":
            right = true(query, pages, visible, known, own, **options)
            return right._replace(read=right.read.at[0].set(False))
        raise ValueError(plant)

    monkeypatch.setattr(by_pages, "plan", wrong)


@pytest.mark.parametrize("plant", ["a sign", "value-blind", "a page missing"])
def test_planted_mistakes_are_caught(plant, monkeypatch):
    """By the check that the true certificate passes."""
    planted(monkeypatch, plant)
    method = dataclasses.replace(METHODS["ball"], tolerance=float(0.5 + len(plant) / 1000))  # a program of its own
    caught = 0
    for seed in range(6):
        _, error, bound, _ = measured(method, seed, "float32", False)
        caught += np.sum(error > bound)
    assert caught > 0


def test_tolerance_zero_reads_everything():
    case = draw(1, T=T).astype(jnp.float32)
    _, certificate = attended(case, np.float32(1), METHODS["ball"].exact_limit(T), False)
    assert certificate.work == 1
    assert not np.any(certificate.dropped_mass)


def test_distant_pages_are_not_read_and_the_error_is_within_the_tolerance():
    """Two clusters 10 apart, in blocks of 256: each query reads its own, and half of all blocks is read."""
    rng = np.random.default_rng(0)
    side = np.repeat([5.0, -5.0], 512)[None, :, None, None]
    query, key, value = (rng.standard_normal((1, 1024, 1, 8)) for _ in range(3))
    case = Case(side + 0.1 * query, side + 0.1 * key, value).astype("float32")
    output, certificate = attended(case, np.float32(1), Certified(tolerance=0.01, query_chunk=512), False)
    expected, _ = oracle(*case)
    error = np.linalg.norm(np.asarray(output, np.float64) - expected, axis=-1)
    assert certificate.work == 0.5
    assert np.all(error <= np.asarray(certificate.error_bound))
    apart = np.linalg.norm(value[0, :, 0][:, None] - value[0, :, 0][None], axis=-1).max()
    assert np.all(np.asarray(certificate.error_bound) <= 0.01 * apart + 1e-4)


def test_fields():
    for fields in (
        {"tolerance": -0.1},
        {"tolerance": float("nan")},
        {"page": 0},
        {"query_chunk": 0},
        {"bound": "oval"},
    ):
        with pytest.raises(ValueError, match=f"Certified.{next(iter(fields))} is"):
            Certified(**fields)
    assert Certified().exact_limit(9) == Certified(tolerance=0.0)
    case = draw(2).astype(jnp.float32)
    assert np.isfinite(dot_product_attention(*case, method=Certified())).all()
