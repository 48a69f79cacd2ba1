"""Pages read by the kernel in C: what it skips, its bits, and the bounds on what 16 bits lose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Certified, Exact, certified_attention
from attention.inputs import prepare
from attention.native import build, reading
from attention.rounding import rounding_bound, sizes
from attention.sparse import by_kernel, heads, kernel
from attention.sparse.bounds import value_reach
from attention.testing.cases import Case, draw, families
from attention.testing.oracle import oracle

pytestmark = pytest.mark.skipif(bool(build.fault()), reason=f"no kernel in C: {build.fault()}")
in_16_bits = pytest.mark.skipif(not build.has_halves(), reason="the processor has no products of 16-bit numbers")

B, T, S, PAGE, H = 16, 45, 300, 24, 8
P = -(-S // PAGE)


def read_halved(inputs, pages, page):
    return reading.read_halved(inputs, reading.half_keys(inputs), pages, page)


WAYS = [reading.read, pytest.param(read_halved, marks=in_16_bits)]


def problem(seed: int) -> tuple[Case, np.ndarray]:
    """Hard operands, and which pages each row reads: some rows none, some all, most a few."""
    rng = np.random.default_rng(seed)
    case = Case(families(seed, B=B, T=T, H=H).query, *families(seed + 1, B=B, T=S, H=H)[1:]).astype(np.float32)
    pages = rng.random((B, 2, 2, P, T)) < rng.choice([0.0, 0.1, 0.5, 1.0], (B, 2, 2, 1, T))
    return case, pages


@functools.partial(jax.jit, static_argnames=("way", "causal"))
def attended(case, pages, temperature, way, causal):
    """Output and residual of the kernel, and the bounds on its error."""
    inputs = prepare(Exact(), *case, temperature=temperature, is_causal=causal)
    output, residual = way(inputs, pages, PAGE)
    steps = kernel.rescalings(S, PAGE)
    rounding = rounding_bound(inputs, rescalings=steps, depth=build.KEYS + steps)
    added = kernel.short(sizes(inputs), inputs.value, inputs.mask, value_reach(inputs), rounding)
    bound = rounding if way is reading.read else rounding + added.error
    return tuple(jnp.moveaxis(x, 3, 1).reshape(B, T, 4, -1) for x in (output, residual[..., None], bound[..., None]))


def expected(case, pages, temperature, causal):
    """By the oracle, with what a row reads as a dense mask."""
    mask = np.repeat(pages, PAGE, axis=3)[..., :S, :].reshape(B, 4, S, T).swapaxes(2, 3)
    output, residual = oracle(*case, mask=mask, temperature=temperature, is_causal=causal)
    return output, residual, mask


def ratios(seeds, way, causal) -> np.ndarray:
    """Error over bound of the rows that read something."""
    found = []
    for seed in seeds:
        case, pages = problem(seed)
        temperature = np.float32(2.0 ** np.random.default_rng(seed).uniform(-3, 3))
        output, residual, bound = (np.asarray(x, np.float64) for x in attended(case, pages, temperature, way, causal))
        right, _, mask = expected(case, pages, temperature, causal)
        seen = (mask & (np.tril(np.ones((T, S), bool)) if causal else True)).any(3).swapaxes(1, 2)
        assert not output[~seen].any()
        assert np.all(np.isneginf(residual[~seen]))
        found.append((np.linalg.norm(output - right, axis=-1) / bound[..., 0])[seen])
    return np.concatenate(found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_pages_that_a_row_reads_are_all_that_it_reads(way, causal, record_ratios):
    """512 problems of 45 rows: within the bound of its arithmetic, and rows that read nothing give nothing."""
    found = ratios(range(8), way, causal)
    assert found.max() <= 1
    assert found.max() > 0.01, "a bound a hundred times too wide says little"
    of = {"kind": "rounding", "method": way.__name__, "problems": None, "dtype": "float32", "causal": causal}
    record_ratios({"output": [float(found.max())]}, **of)


@in_16_bits
@pytest.mark.parametrize("planted", ["logits", "weights", "values"])
def test_each_part_of_what_16_bits_lose_is_needed(planted, monkeypatch):
    """Without it the bound of the others is exceeded, where operands make that part the largest."""
    rng = np.random.default_rng(3)
    if planted == "logits":  # two keys whose logits are huge and alike, of values far apart
        query, key = 60 * rng.standard_normal((B, T, 4, H)), 60 * rng.standard_normal((B, S, 2, H))
        value = 1e-4 * rng.standard_normal((B, S, 2, H))
        value[:, 0] += 1
        key[:, 1] = key[:, 0] + 1e-3 * rng.standard_normal(key[:, 0].shape)
        key[:, 2:] = -key[:, :1]
        query = np.repeat(key[:, :1], 2, axis=2) + 0 * query
    else:
        query, key = np.zeros((B, T, 4, H)), rng.standard_normal((B, S, 2, H))
        value = rng.choice([-1.0, 1.0], (B, S, 2, H)) if planted == "weights" else np.full((B, S, 2, H), 1 + 2.0**-9)
    if planted == "weights":  # at random logits, of values that bfloat16 holds
        query = rng.standard_normal((B, T, 4, H))
    case, pages = Case(query, key, value).astype(np.float32), np.ones((B, 2, 2, P, T), bool)
    if planted != "values":
        pages &= np.arange(P)[:, None] == 0
    short = kernel.short

    def without(of, value, mask, diameter, rounding):
        if planted == "logits":
            of = of._replace(query=0 * of.query)
        if planted == "values":
            value = jnp.round(value)
        return short(of, value, mask, diameter, rounding)

    def worst(**changed):
        for name, replacement in changed.items():
            monkeypatch.setattr(kernel, name, replacement)
        attended.clear_cache()
        output, _, bound = (np.asarray(x, np.float64) for x in attended(case, pages, 1.0, read_halved, False))
        right, *_ = expected(case, pages, 1.0, False)
        return (np.linalg.norm(output - right, axis=-1) / bound[..., 0]).max()

    assert worst() <= 1
    assert worst(**({"RHO": 0.0} if planted == "weights" else {"short": without})) > 1
    attended.clear_cache()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_read_may_be_anything(way):
    """NaN in the pages that no row reads, and another choice of pages in the rows beside, change no bit of a row."""
    case, pages = problem(5)
    pages[..., 3, :] = False
    poisoned = [np.array(x) for x in case]
    for x in poisoned[1:]:
        x[:, 3 * PAGE : 4 * PAGE] = np.nan
    clean = attended(case, pages, 1.0, way, False)[:2]
    other = attended(Case(*map(jnp.asarray, poisoned)), pages, 1.0, way, False)[:2]
    for one, two in zip(clean, other, strict=True):
        np.testing.assert_array_equal(one, two)
    rows = np.arange(T) % 3 == 0
    for beside in (~pages, True, False):
        apart = attended(case, np.where(rows, pages, beside), 1.0, way, False)[:2]
        for one, two in zip(clean, apart, strict=True):
            np.testing.assert_array_equal(one[:, rows], two[:, rows])


@in_16_bits
def test_operands_in_16_bits_are_near_what_they_stand_for():
    """Within half a unit of each entry, whatever the size of the vector; one that vanishes counts as 0."""
    scale = 10.0 ** np.arange(-42, 38, 5, dtype=np.float64)[:, None, None, None]
    case = Case(*(scale * x for x in draw(7, B=len(scale), T=13, S=13))).astype(np.float32)
    for x in case[:2]:
        integers, unit = jax.jit(reading.integers)(x)
        error = np.abs(np.asarray(integers, np.float64) * np.asarray(unit)[..., None] - np.asarray(x, np.float64))
        # A scale below 2^-126 counts as 0, and then the vector is shorter than that times its integers.
        allowed = np.where(np.asarray(unit) > 0, 0.51 * np.asarray(unit), reading.WHOLE * 2.0**-126)
        assert np.all(error <= allowed[..., None])
        length = np.linalg.norm(np.asarray(integers, np.float64), axis=-1)
        assert np.all(length <= reading.WHOLE + 0.5 * H**0.5 + 1)
    assert (reading.WHOLE + 0.5 * 4096**0.5 + 1) ** 2 < 2**31


def test_other_operands_are_left_to_jax():
    case = draw(9, T=13, S=16).astype(np.float32)
    inputs = prepare(Exact(), *case)
    assert kernel.able(inputs, 8)
    assert not kernel.able(inputs, 12)
    assert not kernel.able(prepare(Exact(), *case, bias=np.zeros((1, 4, 13, 16), np.float32)), 8)
    assert not kernel.able(prepare(Exact(), case.query[:, :4], *case[1:]), 8)
    with jax.enable_x64(True):
        assert not kernel.able(prepare(Exact(), *(np.asarray(x, np.float64) for x in case)), 8)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "later queries": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"local_window_size": (30, 9)},
    "lengths": {"key_value_seq_lengths": np.full(B, 70), "query_seq_lengths": np.full(B, 40)},
    "segments": {
        "query_segment_ids": np.repeat(np.arange(T) // 20, 1)[None] * np.ones((B, 1), int),
        "key_value_segment_ids": np.sort(np.arange(96) // 45)[None] * np.ones((B, 1), int),
    },
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_with_and_without_the_kernel_the_same_pages_are_read(options, monkeypatch):
    """In float32, in strips of one tile or in one: to what rounding is, whatever the mask."""
    case = Case(*(x[:, :96] for x in families(11, B=B, T=96, H=H))).astype(np.float32)
    case = case._replace(query=case.query[:, :T])
    method = Certified(tolerance=0.5, page=8, query_chunk=24)
    monkeypatch.setattr(heads, "has_halves", lambda: False)

    def now(**changed):
        for name, replacement in changed.items():
            monkeypatch.setattr(*(kernel, "able") if name == "able" else (by_kernel, name), replacement)
        jax.clear_caches()
        output, certificate = certified_attention(*case, method=method, temperature=4.0, **options)
        return np.asarray(output), np.asarray(certificate.error_bound), float(certificate.work)

    output, bound, work = now()
    strips, *_ = now(ROOM=1)
    other, limit, share = now(able=lambda *_: False)
    size = np.linalg.norm(np.asarray(case.value), axis=-1).max((1, 2)).reshape(B, 1, 1, 1)
    # Each rounds as `rounding_bound` says, which is 2e-5 of the largest value for these logits.
    assert all(np.all(np.abs(x - output) <= 4e-5 * size) for x in (strips, other))
    np.testing.assert_allclose(bound, limit, rtol=0.01, atol=4e-5 * size.max())
    assert 0 < work <= 1
    assert 0 < share <= 1
