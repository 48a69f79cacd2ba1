"""Laws of numbers: the exact limit against the oracle, certificates, precision, temperature."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from attention.method import Method
from attention.testing.cases import (
    LONG,
    PRECISIONS,
    SAME,
    Case,
    attended,
    call,
    draw,
    families,
    limit_cases,
    params_for,
    rounding,
    run,
)
from attention.testing.law import expect, expect_same, law
from attention.testing.oracle import oracle

CASES = 256  # drawn problems of a certificate's law, of 13 queries and 4 heads each


def _within_rounding(method: Method, case: Case, what: str, **options) -> None:
    """The error against the oracle is at most the rounding bound of a softmax over tiles of one key."""
    expected, _ = oracle(*case, **options)
    error = np.asarray(run(method, case, **options)).astype(np.float64) - expected
    size = np.linalg.norm(error, axis=-1)
    expect_same(size, 0, rounding(method, case, **options), f"{what}: further from the oracle than rounding allows")


def _limit(method: Method, length: int) -> Method | None:
    return method if method.capabilities.exact else method.exact_limit(length)


@law(float64=True)
def exact_limit_equals_the_oracle(method: Method) -> None:
    limit = _limit(method, 13)
    if limit is None:
        return
    with jax.enable_x64(False):
        for what, options in (("plain", {}), ("logits of 1e4", {"scale": 2e3})):
            _within_rounding(limit, draw(22).astype(jnp.float32), what, **options)
    for what, options in limit_cases(method):
        expected, _ = oracle(*draw(22), **options)
        expect_same(attended(limit, draw(22), **options), expected, SAME, f"{what}: is not the oracle")


@law("cross")
def exact_limit_holds_at_any_length(method: Method) -> None:
    ends = ("top_left", "bottom_right")
    for T, S, end in ((LONG, LONG, 0), (1, 13, 0), (5, 13, 1), (13, 5, 1)):
        limit = _limit(method, S)
        if limit is None:
            return
        options: dict[str, Any] = {"is_causal": True} if method.capabilities.causal else {}
        if options and T != S:
            options["causal_alignment"] = ends[end]
        _within_rounding(limit, draw(23, T=T, S=S).astype(jnp.float32), f"T = {T}, S = {S}, {options}", **options)


@law()
def error_falls_with_the_budget(method: Method) -> None:
    case = draw(24, B=4, T=64).astype(jnp.float32)
    expected, _ = oracle(*case)
    errors = [np.linalg.norm(np.asarray(run(rung, case)) - expected) for rung in method.ladder(64)]
    for rung, larger in itertools.pairwise(errors):
        expect(larger < rung, f"errors {[float(f'{e:.3g}') for e in errors]} do not fall from rung to rung")


def certificate_failures(method: Method, seed: int, dtype, causal: bool, *, B: int = 16, T: int = 13) -> tuple:
    """Errors and bounds, `B T N` in float64, of hard problems at a temperature from 1/8 to 8, all from one seed."""
    temperature = np.float32(2.0 ** np.random.default_rng(seed).uniform(-3, 3))
    case = families(seed, B=B, T=T).astype(dtype)
    with np.errstate(invalid="ignore"):  # float16 overflows at the largest drawn values
        expected, _ = oracle(*case, temperature=temperature, is_causal=causal)
    outputs, bounds, certificate = [], [], None
    for b in range(0, B, 2):  # by the program of the laws of precision
        pair = Case(*(x[b : b + 2] for x in map(np.asarray, case)))
        _, (output, certificate) = run(method, pair, "both", seed=seed, temperature=temperature, is_causal=causal)
        outputs.append(np.asarray(output).astype(np.float64))
        bounds.append(np.asarray(certificate.error_bound).astype(np.float64))
    return np.linalg.norm(np.concatenate(outputs) - expected, axis=-1), np.concatenate(bounds), certificate


@law()
def certificates_hold(method: Method) -> None:
    errors, bounds, kinds = [], [], set()
    # A bound that the entry point fills in, since there is none, is the same for all problems.
    draws = CASES // 16 if type(method).certify is not Method.certify else 1
    for seed in range(draws):
        dtype, causal = PRECISIONS[seed % len(PRECISIONS)]
        causal = causal and method.capabilities.causal
        error, bound, certificate = certificate_failures(method, seed, dtype, causal)
        errors.append(error)
        bounds.append(bound)
        kinds.add((certificate.kind, certificate.confidence))
    (kind, confidence), *others = kinds
    expect(not others and kind == method.capabilities.certificate, f"certificates are {kinds}, not what is declared")
    promised = 0 < confidence < 1 if kind == "probabilistic" else confidence == 1
    expect(promised, f"a certificate of kind {kind} has confidence {confidence}")
    error, bound = np.stack(errors), np.stack(bounds)
    expect(not np.any(np.isnan(bound)), "a bound is NaN")
    if kind == "none":
        expect(np.all(np.isinf(bound)), "a certificate of kind none has a finite bound")
    # Rows may share what was drawn for them; what was drawn for one row, once a draw, is independent.
    failures = (np.isfinite(error) & ~(error <= bound)).sum(0)
    allowed = most_failures(draws, confidence, rows=failures.size)
    worst = f"in {failures.max()} of {draws} draws at a row, and {failures.sum()} of {error.size} ({kind})"
    expect(failures.max() <= allowed, f"the error exceeds its bound {worst}")


def most_failures(draws: int, confidence: float, *, rows: int = 1) -> int:
    """The failures that with probability 1 - 1e-6 none of so many rows exceeds whose bounds keep their word."""
    if confidence == 1:
        return 0
    odds = math.log(1 - confidence), math.log(confidence)
    ways = [math.lgamma(draws + 1) - math.lgamma(i + 1) - math.lgamma(draws - i + 1) for i in range(draws + 1)]
    beyond = np.cumsum([math.exp(ways[i] + i * odds[0] + (draws - i) * odds[1]) for i in range(draws, -1, -1)])[::-1]
    return int(np.argmax(rows * np.append(beyond[1:], 0) <= 1e-6))


@law()
def low_precision_is_rounding(method: Method) -> None:
    for dtype, causal in PRECISIONS:
        causal = causal and method.capabilities.causal
        for temperature in (1.0, 1 / 8):  # the logits of the second show operands rounded on the way
            case = draw(25).astype(dtype)
            options: dict[str, Any] = {"temperature": temperature, "is_causal": causal}
            with jax.enable_x64(True):
                wide = case.astype(jnp.float64)
                expected = np.asarray((attended if causal else run)(method, wide, **options))
            output, (certified, certificate) = run(method, case, "both", **options)
            allowed = rounding(method, case, **options)
            if method.capabilities.coarse:
                allowed = allowed + np.asarray(certificate.error_bound, np.float64)
            for what, narrow in (("output", output), ("certified output", certified)):
                size = np.linalg.norm(np.asarray(narrow).astype(np.float64) - expected, axis=-1)
                expect_same(
                    size, 0, allowed, f"{what} in {jnp.dtype(dtype)}: further from float64 than rounding allows"
                )


@law()
def huge_logits_stay_finite(method: Method) -> None:
    for dtype, causal in PRECISIONS[:2]:
        causal = causal and method.capabilities.causal
        output, _ = run(method, draw(26).astype(dtype), "both", scale=2e3, is_causal=causal)
        finite = np.isfinite(np.asarray(output, np.float64)).all()
        expect(finite, f"logits of 1e4 give Inf or NaN in {jnp.dtype(dtype)}")


@law("residual", float64=True)
def residual_is_the_log_normaliser(method: Method) -> None:
    case = draw(27)
    _, residual = run(method, case, "residual", temperature=0.5)
    logits = np.einsum("btngh,bsnh->btngs", case.query.reshape(2, 13, 2, 2, 8), case.key) / np.sqrt(8) / 0.5
    expect_same(residual, np.log(np.exp(logits).sum(-1)).reshape(2, 13, 4), 1e-9, "the residual is not log sum exp")


@law("sees_all", float64=True)
def infinite_temperature_gives_the_mean(method: Method) -> None:
    case = draw(28)
    for causal in (False, True) if method.capabilities.causal else (False,):
        attend = attended if causal else run
        counts = np.arange(1, 14)[:, None, None] if causal else 13
        mean = (np.cumsum(case.value, axis=1) if causal else case.value.sum(1, keepdims=True)) / counts
        output = attend(method, case, temperature=math.inf, is_causal=causal)
        expect_same(output, np.broadcast_to(np.repeat(mean, 2, axis=2), output.shape), SAME, "is not the mean")


@law(float64=True)
def low_temperature_gives_the_argmax(method: Method) -> None:
    limit = _limit(method, 13)
    if limit is not None:
        # By a program of the exact limit: the causal one, or with nothing hidden that a window does not hide.
        case, cases = draw(29), dict(limit_cases(method))
        options = cases.get("causal", cases["none of them"])
        cold = options | {"temperature": 1e-6}
        expected, _ = oracle(*case, **cold)
        expect_same(attended(limit, case, **cold), expected, SAME, "temperature 1e-6 is not the argmax")


@law()
def impossible_temperatures_are_refused(method: Method) -> None:
    case = draw(30).astype(jnp.float32)
    params = params_for(method, case)
    checked = checkify.checkify(lambda t: call(method, case, params, temperature=t), errors=checkify.user_checks)
    failure = jax.jit(lambda t: checked(t)[0])  # of the program, what the error needs
    for temperature in (0.0, -1.0, math.nan, 1e-45):
        try:
            call(method, case, params, temperature=temperature)
        except ValueError:
            pass
        else:
            expect(False, f"temperature {temperature} is taken")
        error = failure(np.float32(temperature))
        expect(error.get() is not None, f"a traced temperature {temperature} passes checkify")
