"""The kernel in C: how it is built, its bits, what it leaves unread, and its derivatives."""

import ctypes
import dataclasses
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Exact, Fused
from attention.inputs import prepare, ungrouped
from attention.native import build
from attention.testing import oracle
from attention.testing.cases import Case, draw, rounding, run

NATIVE = Fused(implementation="native")


@pytest.mark.parametrize("above", [0, 1])
def test_the_polynomials_are_what_the_bound_takes_them_for(above):
    """0.1 units of roundoff at most, and exactly 1 at 0, so that a row's largest weight is exact."""
    assert build.remainder(build.DEGREE, above) < 0.1 * 2.0**-24
    rising = build.coefficients(build.DEGREE, above)
    assert rising[0] == 1
    f = np.linspace(0, 1, 10_001) - (0 if above else 0.5)
    # Coefficients but the first are rounded by a roundoff each, which their terms, up to half of 2^f together, halve.
    assert np.max(np.abs(np.polynomial.polynomial.polyval(f, rising) / np.exp2(f) - 1)) < (0.1 + 0.5) * 2.0**-24
    if not above:  # the cap takes 2^f - 1 from it
        slope = np.expm1(f * np.log(2)) / np.where(f == 0, np.inf, f) + np.where(f == 0, np.log(2), 0)
        assert np.max(np.abs(np.polynomial.polynomial.polyval(f, rising[1:]) / slope - 1)) < 2.0**-24


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "attention-lab"


def test_without_a_compiler_it_says_what_to_do(bare, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "no C compiler" in build.fault.__wrapped__()
    assert "pip install attention-lab[native]" in build.fault.__wrapped__()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert build.compiler() == [sys.executable, "-m", "ziglang", "cc"]


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(bare, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such instruction >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert "no such instruction" in build.fault.__wrapped__()
    assert not list(bare.iterdir())
    monkeypatch.setenv("CC", str(tmp_path / "nowhere"))
    assert "does not run" in build.fault.__wrapped__()


def test_two_may_build_it_at_once(bare):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build.built(), range(2))
    assert first == second
    assert list(bare.iterdir()) == [first]
    assert all(hasattr(ctypes.CDLL(str(first)), target) for target in build.TARGETS)


# Two blocks of queries and three tiles of keys, neither whole; so many items that threads share them.
CASE, COTANGENT = draw(81, B=1, T=300, H=8).astype(jnp.float32), draw(82, B=1, T=300, N=4, H=8).query.astype(np.float32)


@jax.jit
def results(*case):
    output, pull = jax.vjp(lambda *x: attention.dot_product_attention(*x, method=NATIVE, is_causal=True), *case)
    return output, *pull(jnp.asarray(COTANGENT))


def digest() -> str:
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in results(*CASE))).hexdigest()


def test_the_bits_do_not_depend_on_the_threads():
    """In a process whose pool has one thread, so that the caller does everything, and in one that has three."""
    assert digest() == digest()
    for threads in ("1", "3"):
        program = "import sys; sys.path[:0] = ['.', 'tests']; import test_native; print(test_native.digest())"
        environment = os.environ | {"NPROC": threads}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == digest(), done.stderr


@pytest.mark.parametrize("T", [1, 12, 300])
def test_what_no_query_sees_is_not_read(T):
    """Neither by the kernel for few queries nor by that for many, in one block or in several, which share whole tiles.

    NaN lies before the window and behind the length. Nor has it a gradient.
    """
    case = draw(83, T=T, S=300).astype(jnp.float32)
    inputs = prepare(NATIVE, *case)
    offset, lengths = jnp.array([200, 131]), jnp.array([201, 0])
    mask = dataclasses.replace(inputs.mask, causal=True, window=(70, 0), offset=offset, key_lengths=lengths)
    first, last = mask.key_range()
    seen = (np.arange(300) >= np.asarray(first).min(1)[:, None]) & (np.arange(300) <= np.asarray(last).max(1)[:, None])

    @jax.jit
    def found(*operands):
        def attend(key, value):
            return NATIVE.attend(dataclasses.replace(inputs, key=key, value=value, mask=mask))

        output, pull = jax.vjp(attend, *operands)
        return output, *pull(jnp.ones_like(output))

    clean, poisoned = (
        found(*(jnp.where(seen[:, None, :, None], x, garbage) for x in (inputs.key, inputs.value)))
        for garbage in (0, np.nan)
    )
    for one, other in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.any(one[0])
        assert not np.any(one[1])


def test_what_is_not_a_number_is_seen():
    """A NaN that a query sees reaches its output, whatever its bits, and those of no other sequence."""
    case = draw(84, T=12).astype(jnp.float32)
    for bits in (0x7FC00000, 0x7FC00155, 0xFFC000FF):
        nan = np.array(bits, np.uint32).view(np.float32)
        output = attention.dot_product_attention(case.query, case.key.at[0, 5].set(nan), case.value, method=NATIVE)
        assert np.all(np.isnan(output[0]))
        assert np.all(np.isfinite(output[1]))


def test_the_level_of_exponentials_follows_logits_that_rise():
    """By less than it may lag behind in all 300 keys, by as much in every few blocks, and by more in each."""
    case = draw(87, B=3, T=12, S=300, H=8, N=1, K=1).astype(jnp.float32)
    rise = np.array([0.005, 0.1, 1.0])[:, None] * np.arange(300)
    key = np.zeros(case.key.shape, np.float32)
    key[:, :, 0, 0] = rise
    case = Case(jnp.ones_like(case.query), jnp.asarray(key), case.value)
    output = attention.dot_product_attention(*case, method=NATIVE, scale=1.0)
    expected, _ = oracle(*case, scale=1.0)
    error = np.linalg.norm(np.asarray(output) - expected, axis=-1)
    assert np.all(error <= rounding(NATIVE, case, scale=1.0))


@pytest.mark.parametrize("without", ["avx512f", "avx"])
def test_processors_with_narrower_vectors_follow_them_too(without, bare):
    """By the kernel as it is compiled for them, whose 2^y has no instructions of its own and must not wrap around."""
    if platform.machine() != "x86_64":
        pytest.skip(f"needs a compiler for x86-64 that can leave out {without}, found {platform.machine()}")
    environment = os.environ | {"CC": f"{shlex.join(build.compiler())} -mno-{without}"}
    program = "import sys; sys.path[:0] = ['.', 'tests']; import test_native as t; "
    program += "t.test_the_level_of_exponentials_follows_logits_that_rise()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(bare.iterdir())


@pytest.mark.parametrize("T", [1, 12])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_numbers_of_16_bits_are_read_as_they_are(T, dtype):
    """All of them: the value of a row's only key is its output. Below 2**-126 float32 may count them as 0."""
    every = np.arange(2**16).astype(np.uint16).view(dtype).reshape(64, 1, 1, 1024)
    ones = np.ones((64, 1, 1, 1024), dtype)
    output = jax.jit(NATIVE.attend)(prepare(NATIVE, np.repeat(ones[..., :8], T, axis=1), ones[..., :8], every))
    expected = every.astype(np.float32)
    expected = np.where(np.abs(expected) < np.finfo(np.float32).tiny, 0, expected)
    np.testing.assert_array_equal(output[:, 0, 0], np.repeat(expected[:, :, 0], T, axis=1))


@pytest.mark.parametrize("T", [1, 12])
def test_a_cap_far_above_the_logits_is_none(T):
    """Their ratio to it is then all that the hyperbolic tangent gives, to a relative rounding."""
    case, cap = draw(87, T=T).astype(jnp.float32), np.array(1e9, np.float32)
    error = np.linalg.norm(run(NATIVE, case, logits_soft_cap=cap) - oracle(*case)[0], axis=-1)
    assert np.all(error <= rounding(NATIVE, case, logits_soft_cap=cap))


def test_a_cap_has_a_gradient():
    case, cap, cotangent = draw(88, T=12), np.array(0.5, np.float32), draw(89, T=12, N=4).query.astype(np.float32)
    single = case.astype(jnp.float32)

    def loss(cap, case, method):
        return (attention.dot_product_attention(*case, method=method, logits_soft_cap=cap) * cotangent).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    ours, others = gradient(cap, single, NATIVE)
    with jax.enable_x64(True):
        theirs = float(gradient(cap.astype(np.float64), Case(*map(np.float64, single)), Exact())[0])
    # A row's dS is off by at most 5 b |d| |v| in all, where b is how far its weights move (see test_fused.py; one more
    # for the hyperbolic tangent r). It is multiplied by r <= 1 in one sum, and by (1 - r^2) |l| / c < 1/2 in the other,
    # whose products with 12 keys cost 18 u each besides. Then 96 rows are added, and 768 numbers of dQ and Q.
    u, d, q, dq = 2.0**-24, *(np.linalg.norm(x, axis=-1) for x in (cotangent, case.query, others.query))
    v, k = (np.linalg.norm(x, axis=-1).max() for x in (case.value, case.key))
    moved = rounding(NATIVE, single, logits_soft_cap=cap) / v
    tolerance = ((7.5 * moved + 36 * u * q * k / 8**0.5 / cap + 192 * u) * d * v + 780 * u * dq * q / cap).sum()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    assert abs(theirs) > 5 * tolerance


def test_the_residual_has_a_gradient():
    """That of log(sum(exp(q.k))) by q is the output whose values are the keys; its rounding is theirs."""
    case = draw(85, T=9).astype(jnp.float32)
    case = Case(case.query, case.key, case.key)

    def total(query):
        inputs = prepare(NATIVE, query, case.key, case.value, is_causal=True, scale=1.0)
        return NATIVE.attend_with_residual(inputs)[1].sum()

    expected, _ = oracle(*case, is_causal=True, scale=1.0)
    error = np.linalg.norm(np.asarray(jax.jit(jax.grad(total))(case.query)) - expected, axis=-1)
    # The weights are recomputed from the residual, whose rounding and that of a difference move them by as much again.
    assert np.all(error <= 2 * rounding(NATIVE, case, is_causal=True, scale=1.0))


def test_a_batch_by_vmap_has_the_same_bits():
    """But in the gradients of keys and values, whose sums over the queries have an order that depends on the batch."""
    case = [np.stack([x, 2 * x]) for x in map(np.asarray, CASE)]
    together = jax.jit(jax.vmap(results))(*case)[:2]
    for n in range(2):
        for one, all_ in zip(results(*(x[n] for x in case)), together, strict=False):
            np.testing.assert_array_equal(one, all_[n])


def test_it_works_within_shard_map():
    """On one device: what is tested is that results and gradients vary over the axes that their operands vary over."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")

    def both(*case):
        output, pull = jax.vjp(lambda *x: attention.dot_product_attention(*x, method=NATIVE), *case)
        return output, *pull(output)

    inside = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec))
    for one, other in zip(jax.jit(both)(*CASE), inside(*CASE), strict=True):
        np.testing.assert_array_equal(one, other)


def test_segments_of_64_bits_are_told_apart():
    """Ids that are equal in their last 32 bits."""
    case = draw(86, B=1, T=6, S=6).astype(jnp.float32)
    with jax.enable_x64(True):
        small, large = (np.repeat([[0, step]], 3, axis=1).astype(np.int64) for step in (1, 2**32))
        outputs = [
            attention.dot_product_attention(*case, method=NATIVE, query_segment_ids=ids, key_value_segment_ids=ids)
            for ids in (small, large)
        ]
    np.testing.assert_array_equal(*outputs)
    assert not np.array_equal(outputs[0], attention.dot_product_attention(*case, method=NATIVE))


def test_other_derivatives_are_refused():
    query = jnp.ones((1, 3, 1, 4))

    def attend(x):
        return attention.dot_product_attention(x, query, query, method=NATIVE).sum()

    def pushed(x):
        return jax.jvp(attend, (x,), (x,))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (attend(x) * x, None), x, length=2)[0]

    mapped = lambda x: jax.vmap(pushed)(x[None])  # noqa: E731
    for refused in (pushed, jax.jit(pushed), mapped, jax.hessian(attend), jax.jacfwd(scanned)):
        with pytest.raises(attention.UnsupportedError, match=r"forward mode.*Chunked\(\)"):
            refused(query)
    with pytest.raises(attention.UnsupportedError, match=r"second order.*Chunked\(\)"):
        jax.grad(lambda x: jax.grad(attend)(x).sum())(query)


def test_it_works_within_scan_and_remat():
    step = jax.checkpoint(lambda x, _: (attention.dot_product_attention(x, *CASE[1:], method=NATIVE), None))
    gradient = jax.jit(jax.grad(lambda x: (jax.lax.scan(step, x, length=2)[0] * COTANGENT).sum()))(CASE.query)
    once = jax.jit(lambda x: ungrouped(NATIVE.attend(prepare(Exact(), x, *CASE[1:])), x))
    _, first = jax.vjp(once, CASE.query)
    _, second = jax.vjp(once, once(CASE.query))
    np.testing.assert_array_equal(gradient, first(second(jnp.asarray(COTANGENT))[0])[0])
