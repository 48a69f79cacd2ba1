"""The certified error holds on drawn cases, planted mistakes in it are caught, and the tolerance is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from as_users import AS_USERS
from captured import with_trained
from ratios import over

from attention import Certified, certified_attention, dot_product_attention
from attention.sparse import by_pages, plan
from attention.testing.cases import Case, draw, families
from attention.testing.oracle import oracle

B, T = 16, 33
METHODS = {bound: Certified(tolerance=0.5, page=8, query_chunk=24, bound=bound) for bound in ("ball", "box", "sketch")}
LONG = Certified(tolerance=0.05, page=16, query_chunk=48)
# Without a mask 256 keys of size 8 are enough for polynomials of either degree.
PROGRAMS = (
    (LONG, 256, "float32", False),
    (METHODS["box"], T, "bfloat16", True),
    (METHODS["sketch"], T, "float32", True),
    (LONG, 256, "bfloat16", False),
)


def attended(case, temperature, method, causal):
    return certified_attention(*case, method=method, temperature=temperature, is_causal=causal)


as_users = jax.jit(attended, static_argnames=("method", "causal"), compiler_options=AS_USERS)
attended = jax.jit(attended, static_argnames=("method", "causal"))


def measured(method, seed: int, dtype: str, causal: bool, T: int = T, attended=attended):
    """Error, bound, largest distance of two visible values, and certificate, of 16 hard problems."""
    temperature = np.float32(2.0 ** np.random.default_rng(seed).uniform(-3, 3))
    case = with_trained(families(seed, B=B, T=T), seed).astype(dtype)
    output, certificate = attended(case, temperature, method, causal)
    expected, _ = oracle(*case, temperature=temperature, is_causal=causal)
    error = np.linalg.norm(np.asarray(output).astype(np.float64) - expected, axis=-1)
    return case, error, np.asarray(certificate.error_bound, np.float64), certificate


def sound(program: int, seeds, record_ratios) -> tuple[np.ndarray, np.ndarray]:
    """Ratios and replaced masses of all rows."""
    method, length, dtype, causal = PROGRAMS[program]
    ratios, masses = [], []
    for seed in seeds:
        _, error, limit, certificate = measured(method, seed, dtype, causal, length, as_users)
        assert certificate.kind == "deterministic"
        ratios.append(over(error, limit))
        masses.append(np.asarray(certificate.dropped_mass))
    of = {"method": "Certified", "dtype": dtype, "causal": causal, "kind": "deterministic"}
    worst = np.stack(ratios).max((2, 3))
    record_ratios({"output": worst.ravel().tolist()}, **of, problems=f"{length} tokens")
    broken = [seed for seed, some in zip(seeds, worst, strict=True) if some.max() > 1]
    assert not broken, f"{PROGRAMS[program]}, seeds {broken}: {worst.max():.3g} of the bound"
    assert np.all(np.stack(masses) <= 1)
    return np.stack(ratios), np.stack(masses)


@pytest.mark.parametrize("program", range(4))
def test_error_is_within_its_bound(program, record_ratios):
    """1,024 cases of 33 or 256 queries and 4 heads, 256 a program; two of each 16 are those of a trained model."""
    ratios, masses = sound(program, range(1000 * program, 1000 * program + 16), record_ratios)
    known = ratios[masses > 0.01]
    assert known.size > 100  # the means are used
    assert known.max() > 0.01, "a bound a hundred times too wide says little"
    if PROGRAMS[program][0] == LONG:  # heads of either kind, and rows of either in one head
        shares = (masses == 1).mean(2)
        assert np.mean(shares == 1) > 0.05
        assert np.any((shares > 0.5) & (shares < 1))


@pytest.mark.campaign
@pytest.mark.parametrize("program", range(4))
def test_error_is_within_its_bound_in_the_campaign(program, record_ratios):
    """10,240 cases."""
    sound(program, range(10_000 * (program + 1), 10_000 * (program + 1) + 160), record_ratios)


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


PLANTS = ("none", "a sign", "value-blind", "a page missing")


@functools.partial(jax.jit, static_argnames=("method", "causal"))
def planted(case, temperature, plant, method, causal):
    """With a mistake in the plan, where the certificate comes from: that of number `plant`, in one program for all."""
    true, is_ = plan.plan, {name: plant == n for n, name in enumerate(PLANTS)}

    def wrong(query, pages, visible, known, own, **options):
        blind = is_["value-blind"]
        pages = pages._replace(coupling=jnp.where(blind, 0, pages.coupling))
        own = own._replace(diameter=jnp.where(blind, 1, own.diameter))
        right = true(query, pages, visible, known, own, **options)
        read = right.read.at[0].set(right.read[0] & ~is_["a page missing"])
        return right._replace(error=jnp.where(is_["a sign"], -right.error, right.error), read=read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_pages, "plan", wrong)
        return certified_attention(*case, method=method, temperature=temperature, is_causal=causal)


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_mistakes_are_caught(plant):
    """By the check that the true certificate passes."""
    method = dataclasses.replace(METHODS["ball"], tolerance=0.501)  # a program of its own
    by = lambda case, temperature, *given: planted(case, temperature, PLANTS.index(plant), *given)  # noqa: E731
    caught = 0
    for seed in range(6):
        _, error, bound, _ = measured(method, seed, "float32", False, T, by)
        caught += np.sum(error > bound)
    assert (caught > 0) == (plant != "none")


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
