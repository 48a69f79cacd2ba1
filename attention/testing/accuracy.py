"""Laws of numbers: the exact limit against the oracle, certificates, precision, temperature."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from attention.method import Method
from attention.testing.cases import SAME, Case, call, draw, families, params_for, possible, rounding, run
from attention.testing.law import expect, expect_same, law
from attention.testing.oracle import oracle

CASES = 256  # drawn problems of a certificate's law, of 13 queries and 4 heads each
CERTIFIED = ((jnp.float32, False), (jnp.bfloat16, True), (jnp.float32, True), (jnp.float16, False))
LENGTHS = (1, 2, 13, 16, 17)


def _within_rounding(method: Method, case: Case, what: str, **options) -> None:
    """The error against the oracle is at most the rounding bound of a softmax over tiles of one key."""
    expected, _ = oracle(*case, **options)
    error = np.asarray(run(method, case, **options)).astype(np.float64) - expected
    size = np.linalg.norm(error, axis=-1)
    expect_same(size, 0, rounding(method, case, **options), f"{what}: further from the oracle than rounding allows")


def _limit(method: Method, length: int) -> Method | None:
    return method if method.capabilities.exact else method.exact_limit(length)


@law()
def exact_limit_equals_the_oracle(method: Method) -> None:
    limit = _limit(method, 13)
    rng = np.random.default_rng(21)
    mask = rng.random((2, 4, 13, 13)) < 0.6
    segments = np.sort(rng.integers(3, size=(2, 13)))
    head = {"scale": np.array([0.1, 0.2, 0.5, 1.0]), "temperature": 0.5}
    late, causal = {"query_seq_lengths": np.array([13, 6])}, {"is_causal": True}
    bias = rng.standard_normal((1, 4, 13, 13))
    # Each entry is one call with what the method can of it, so that few programs see every option.
    asked: list[tuple[str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = [
        ("plain", []),
        ("logits of 1e4", [((), {"scale": 2e3})]),
        ("mask, soft cap", [(("dense_mask",), {"mask": mask}), (("soft_cap",), {"logits_soft_cap": 2.0})]),
        ("window, lengths of queries", [(("window",), {"local_window_size": (3, 1)}), (("lengths",), late)]),
        ("bias, scale a head", [(("bias",), {"bias": bias}), ((), head)]),
        ("-inf bias, scale a head", [(("bias",), {"bias": np.where(mask[:1], 0.0, -np.inf)}), ((), head)]),
        ("causal", [(("causal",), causal)]),
        ("causal window", [(("causal", "window"), causal | {"local_window_size": (4, 2)})]),
        ("lengths", [(("lengths",), late | {"key_value_seq_lengths": np.array([5, 12])})]),
        ("causal segments", [(("segments",), {"query_segment_ids": segments}), (("causal",), causal)]),
    ]
    for what, parts in asked:
        options = possible(method, parts)
        if limit is not None and (options or not parts):
            _within_rounding(limit, draw(22).astype(jnp.float32), what, **options)


@law("cross")
def exact_limit_holds_at_any_length(method: Method) -> None:
    for T, S in [(n, n) for n in LENGTHS] + [(1, 17), (17, 1), (5, 13), (13, 5)]:
        limit = _limit(method, S)
        if limit is None:
            return
        options: dict[str, Any] = {"is_causal": method.capabilities.causal}
        for end in ({}, {"causal_alignment": "bottom_right"}) if options["is_causal"] and S != T else ({},):
            _within_rounding(
                limit, draw(23, T=T, S=S).astype(jnp.float32), f"T = {T}, S = {S}, {end}", **options, **end
            )


@law()
def error_falls_with_the_budget(method: Method) -> None:
    case = draw(24, B=4, T=64).astype(jnp.float32)
    expected, _ = oracle(*case)
    errors = [np.linalg.norm(np.asarray(run(rung, case)) - expected) for rung in method.ladder(64)]
    for rung, larger in itertools.pairwise(errors):
        expect(larger < rung, f"errors {[float(f'{e:.3g}') for e in errors]} do not fall from rung to rung")


def certificate_failures(method: Method, seed: int, dtype, causal: bool, *, B: int = 16, T: int = 13) -> tuple:
    """Errors and bounds, `B T N` in float64, on one draw of hard problems at a temperature from 1/8 to 8."""
    temperature = np.float32(2.0 ** np.random.default_rng(seed).uniform(-3, 3))
    case = families(seed, B=B, T=T).astype(dtype)
    output, certificate = run(method, case, "certified", temperature=temperature, is_causal=causal)
    with np.errstate(invalid="ignore"):  # float16 overflows at the largest drawn values
        expected, _ = oracle(*case, temperature=temperature, is_causal=causal)
    error = np.linalg.norm(np.asarray(output).astype(np.float64) - expected, axis=-1)
    return error, np.asarray(certificate.error_bound).astype(np.float64), certificate


@law()
def certificates_hold(method: Method) -> None:
    errors, bounds, kinds = [], [], set()
    for seed in range(CASES // 16):
        # Every dtype, causal and not, in four programs: what is drawn differs in each of the sixteen.
        dtype, causal = CERTIFIED[seed % 4]
        causal = causal and method.capabilities.causal
        error, bound, certificate = certificate_failures(method, seed, dtype, causal)
        representable = np.isfinite(error)
        errors.append(error[representable])
        bounds.append(bound[representable])
        kinds.add((certificate.kind, certificate.confidence))
    (kind, confidence), *others = kinds
    expect(not others and kind == method.capabilities.certificate, f"certificates are {kinds}, not what is declared")
    error, bound = np.concatenate(errors), np.concatenate(bounds)
    expect(not np.any(np.isnan(bound)), "a bound is NaN")
    failures = int(np.sum(~(error <= bound)))
    if kind == "none":
        expect(np.all(np.isinf(bound)), "a certificate of kind none has a finite bound")
    # A count above mean + 4 standard deviations has probability below 1e-4 for a bound that keeps its word.
    mean = error.size * (1 - confidence)
    allowed = mean + 4 * math.sqrt(mean * confidence)
    expect(failures <= allowed, f"the error exceeds its bound in {failures} of {error.size} rows ({kind})")


@law()
def low_precision_is_rounding(method: Method) -> None:
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        for temperature in (1.0, 1 / 8):  # the logits of the second show operands rounded on the way
            case = draw(25).astype(dtype)
            with jax.enable_x64(True):
                expected = np.asarray(run(method, case.astype(jnp.float64), temperature=temperature))
            error = np.asarray(run(method, case, temperature=temperature)).astype(np.float64) - expected
            allowed = rounding(method, case, temperature=temperature)
            size = np.linalg.norm(error, axis=-1)
            expect_same(size, 0, allowed, f"{jnp.dtype(dtype)}: further from float64 than rounding allows")


@law()
def huge_logits_stay_finite(method: Method) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        output = np.asarray(run(method, draw(26).astype(dtype), scale=2e3), np.float64)
        expect(np.isfinite(output).all(), f"logits of 1e4 give Inf or NaN in {jnp.dtype(dtype)}")


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
        counts = np.arange(1, 14)[:, None, None] if causal else 13
        mean = (np.cumsum(case.value, axis=1) if causal else case.value.sum(1, keepdims=True)) / counts
        output = run(method, case, temperature=math.inf, is_causal=causal)
        expect_same(output, np.broadcast_to(np.repeat(mean, 2, axis=2), output.shape), SAME, "is not the mean")


@law(float64=True)
def low_temperature_gives_the_argmax(method: Method) -> None:
    limit = _limit(method, 13)
    if limit is not None:
        case = draw(29)
        expected, _ = oracle(*case, temperature=1e-6)
        expect_same(run(limit, case, temperature=1e-6), expected, SAME, "temperature 1e-6 is not the argmax")


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
