"""Diagnostics against NumPy float64, row by row, under every mask; their limits; and in linear memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attention
from attention import Diagnostics, Exact, Performer, TopK, diagnostics
from attention.ranking import largest_sum
from attention.testing.cases import SAME, draw
from attention.testing.oracle import oracle, visibility

T, S, K_LARGEST, WINDOW = 13, 11, 3, (2, 1)
MEANS = ("entropy", "effective_keys", "sink_mass", "window_mass", "top_mass")


def masks():
    """One of each masking argument, for B = 2, N = 4, T = 13 and S = 11; empty rows in most of them."""
    rng = np.random.default_rng(0)
    lengths = {"query_seq_lengths": np.array([T, 6]), "key_value_seq_lengths": np.array([7, S])}
    return {
        "plain": {},
        "causal": {"is_causal": True, "temperature": np.array([0.25, 1.0, 4.0, 2.0])},
        "to the end": {"causal_alignment": "bottom_right", **lengths},
        "window": {"local_window_size": (3, 1), "is_causal": True, "causal_alignment": "bottom_right"},
        "lengths": lengths,
        "segments": {
            "query_segment_ids": rng.integers(3, size=(2, T)),  # in no order
            "key_value_segment_ids": rng.integers(4, size=(2, S)),
        },
        "mask and bias": {"mask": rng.random((2, 1, T, S)) < 0.5, "bias": rng.standard_normal((1, 4, T, S))},
        "cap": {"logits_soft_cap": 2.0, "bias": np.where(rng.random((1, 1, T, S)) < 0.7, 0, -np.inf), "scale": 3.0},
    }


def by_rows(query, key, **options):
    """The same numbers from the oracle's weights, one row after the other, by sorting."""
    identity = np.broadcast_to(np.eye(S)[None, :, None], (*key.shape[:3], S))
    _, p = oracle(query, key, identity, **options)
    bias = options.get("bias", np.zeros((1, 1, T, S)))
    shown = _visible(**options) & np.broadcast_to(~np.isneginf(bias), p.shape)
    logits = _logits(query, key, **options)
    segments, near = options.get("key_value_segment_ids"), _near(**options)
    heads = []
    for n in range(p.shape[1]):
        rows, largest = [], -np.inf
        for b, t in itertools.product(range(p.shape[0]), range(T)):
            seen = shown[b, n, t]
            if not seen.any():
                continue
            w, first = p[b, n, t], 0
            largest = max(largest, logits[b, n, t][seen].max())
            if segments is not None:
                first = np.flatnonzero(segments[b] == options["query_segment_ids"][b, t])[0]
            positive = w[w > 0]
            rows.append(
                [
                    -(positive * np.log(positive)).sum(),
                    1 / (w**2).sum(),
                    w[first],
                    w[near[b, 0, t]].sum(),
                    np.sort(w)[::-1][:K_LARGEST].sum(),
                ]
            )
        means = np.mean(rows, axis=0) if rows else np.full(5, np.nan)
        heads.append([*means, largest])
    return dict(zip((*MEANS, "largest_logit"), np.array(heads).T, strict=True))


def _visible(**options):
    names = {"is_causal": False, "query_seq_lengths": None, "key_value_seq_lengths": None, "local_window_size": None}
    names |= {"query_segment_ids": None, "key_value_segment_ids": None, "mask": None}
    o = names | {"causal_alignment": "top_left"} | options
    band = (o["is_causal"], o["causal_alignment"], o["query_seq_lengths"], o["key_value_seq_lengths"])
    segments = (o["query_segment_ids"], o["key_value_segment_ids"])
    return visibility((2, 4, T, S), o["mask"], *band, o["local_window_size"], *segments)


def _near(**options):
    """Keys within the window, whatever the masks: the lengths only say where the queries stand."""
    near = np.zeros((2, 1, T, S), bool)
    for b, t in itertools.product(range(2), range(T)):
        ends = (options.get(name, [whole] * 2)[b] for name, whole in zip(_LENGTHS, (S, T), strict=True))
        position = t + (lambda s, q: s - q)(*ends) * (options.get("causal_alignment") == "bottom_right")
        near[b, 0, t] = [position - WINDOW[0] <= j <= position + WINDOW[1] for j in range(S)]
    return near


_LENGTHS = ("key_value_seq_lengths", "query_seq_lengths")


def _logits(query, key, scale=None, temperature=1.0, logits_soft_cap=None, bias=0.0, **_):
    keys = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    beta = np.broadcast_to((query.shape[-1] ** -0.5 if scale is None else scale) / np.asarray(temperature), 4)
    logits = np.einsum("btnh,bsnh->bnts", query, keys) * beta[:, None, None]
    return (logits if logits_soft_cap is None else logits_soft_cap * np.tanh(logits / logits_soft_cap)) + bias


def expect_close(got: Diagnostics, expected: dict, tolerance):
    for name, want in expected.items():
        np.testing.assert_allclose(getattr(got, name), want, rtol=0, atol=tolerance, err_msg=name)


@functools.partial(jax.jit, static_argnames=("static", "method"))
def _compiled(query, key, arrays, params, *, static, method):
    options = {**arrays, **dict(static)}
    return diagnostics(query, key, window=WINDOW, k=K_LARGEST, sampled_keys=S, method=method, params=params, **options)


def measured(query, key, method=Exact(), params=None, **options):
    arrays = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    static = tuple(sorted((name, x) for name, x in options.items() if name not in arrays))
    return _compiled(query, key, arrays, params, static=static, method=method)


@pytest.mark.parametrize("name", masks())
def test_every_mask_gives_the_numbers_of_the_oracle(name):
    options, case = masks()[name], draw(1, T=T, S=S)
    with jax.enable_x64(True):
        got = measured(case.query, case.key, **options)
    # Sums over at most 11 keys and 26 rows of terms up to 11, in float64: as every equality of the laws.
    expect_close(got, by_rows(case.query, case.key, **options), SAME)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_operands_are_computed_in_float32(dtype):
    case = draw(2, T=T, S=S).astype(dtype)
    options = masks()["lengths"]
    got = measured(case.query, case.key, **options)
    exact = [np.asarray(x, np.float64) for x in (case.query, case.key)]
    # With D = (H + 5) u |q||k| beta + 12 u L a bound on the error of a logit (docs/bounds.md), a weight moves by a
    # factor of 1 + 2 D, and no number here by more than 2 D (1 + log n) times its largest value, n = 11. Sums of 11
    # and then of 26 terms add as many units.
    u, L = 2.0**-24, np.abs(_logits(*exact)).max()
    norms = [np.linalg.norm(x, axis=-1).max() for x in exact]
    D = 13 * u * norms[0] * norms[1] * 8**-0.5 + 12 * u * L
    expect_close(got, by_rows(*exact, **options), S * (2 * D * (1 + np.log(S)) + 40 * u))
    assert {x.dtype for x in got} == {jnp.dtype("float32")}


@pytest.mark.parametrize("method", [Performer(features=16), TopK(k=3)], ids=repr)
def test_monotonicity_counts_the_pairs_whose_order_a_method_keeps(method):
    with jax.enable_x64(True):
        case = draw(3, T=S, S=S)
        params = method.init(jax.random.key(0), num_heads=4, head_dim=8)
        identity = jnp.broadcast_to(jnp.eye(S)[None, :, None], (2, S, 2, S))
        apply = functools.partial(attention.dot_product_attention, method=method, is_causal=True, params=params)
        weights = np.asarray(jax.jit(apply)(case.query, case.key, identity))
        got = jax.device_get(measured(case.query, case.key, method, params, is_causal=True))
        exact = measured(case.query, case.key, is_causal=True).monotonicity
        logits = _logits(case.query, case.key)
    kept, apart = np.zeros(4), np.zeros(4)
    for b, n, t in itertools.product(range(2), range(4), range(S)):
        for i, j in itertools.permutations(range(t + 1), 2):
            if logits[b, n, t, i] > logits[b, n, t, j] and weights[b, t, n, i] != weights[b, t, n, j]:
                apart[n] += 1
                kept[n] += weights[b, t, n, i] > weights[b, t, n, j]
    np.testing.assert_allclose(got.monotonicity, 1 - 2 * (apart - kept) / apart, rtol=0, atol=SAME)
    assert np.all(got.monotonicity == 1) if isinstance(method, TopK) else np.all(np.abs(got.monotonicity) < 0.99)
    assert np.all(exact == 1)


def test_a_temperature_is_a_scale_and_may_be_traced_and_mapped():
    case = draw(4, T=T, S=S).astype(jnp.float32)

    @jax.jit
    def hot(scale, temperature):
        return diagnostics(case.query, case.key, scale=scale, temperature=temperature)

    one, other = hot(0.5, 2.0), hot(0.25, 1.0)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    together = jax.jit(jax.vmap(hot))(jnp.array([0.5, 0.125]), jnp.array([2.0, 4.0]))
    for at, alone in enumerate((one, hot(0.125, 4.0))):
        # vmap may sum in another order: 11 keys and 26 rows, numbers up to 11.
        for name, numbers in together._asdict().items():
            np.testing.assert_allclose(numbers[at], getattr(alone, name), rtol=0, atol=11 * 64 * 2.0**-24)
    assert np.all(hot(4.0, 1.0).entropy < one.entropy)


def test_has_no_gradient_and_needs_no_batch():
    case = draw(5, B=1, T=T, S=S).astype(jnp.float32)

    def both(query):
        got = diagnostics(query, case.key[0])
        return got.entropy.sum() + got.top_mass.sum(), got

    slope, got = jax.jit(jax.grad(both, has_aux=True))(case.query[0])
    assert not slope.any()
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(diagnostics)(case.query, case.key))


def test_what_no_query_sees_does_not_exist_and_nan_does():
    case = draw(6, T=T, S=S).astype(jnp.float32)
    lengths = {"key_value_seq_lengths": np.array([5, 6])}
    clean = measured(case.query, case.key, **lengths)
    jax.tree.map(np.testing.assert_array_equal, clean, measured(case.query, case.key.at[:, 6:].set(jnp.nan), **lengths))
    assert jnp.isnan(measured(case.query, case.key.at[0, 4, 0].set(jnp.nan), **lengths).entropy[:2]).all()
    blind = measured(case.query, case.key, key_value_seq_lengths=np.array([0, 0]))
    assert all(jnp.isnan(getattr(blind, name)).all() for name in MEANS)
    assert jnp.isneginf(blind.largest_logit).all()


ROW = 7
LOGITS = st.lists(st.floats(-40, 40, width=32, allow_subnormal=False), min_size=ROW, max_size=ROW)


@jax.jit
def _one_row(logits):
    """All numbers of a row with given logits, for three k and windows."""
    query, key = jnp.ones((1, 1, 1)), logits.reshape(ROW, 1, 1)
    one = functools.partial(diagnostics, query, key, scale=1.0)
    return [one(k=k, window=k - 1) for k in (1, 3, ROW)]


@given(LOGITS)
def test_numbers_keep_their_limits(logits):
    found = _one_row(jnp.array(logits, jnp.float32))
    u = 2.0**-24
    first = found[0]
    slack = 1 + 16 * ROW * u  # 7 weights, each off by 8 u (docs/bounds.md: 2 L u and the exponential), summed twice
    assert 0 <= first.entropy[0] <= np.log(ROW) + 16 * ROW * u
    assert 1 / slack <= first.effective_keys[0] <= ROW * slack
    assert first.effective_keys[0] <= np.exp(first.entropy[0]) * (1 + 2 * 40 * 16 * ROW * u)
    assert first.largest_logit[0] == np.float32(max(logits))
    top = [float(x.top_mass[0]) for x in found]
    near = [float(x.window_mass[0]) for x in found]
    for masses in (top, near):
        assert all(a <= b * slack for a, b in itertools.pairwise(masses))
        assert abs(masses[-1] - 1) <= slack - 1
    assert near[0] == pytest.approx(first.sink_mass[0], rel=slack - 1)


WEIGHTS = st.one_of(st.floats(0, 1, width=32, allow_subnormal=False), st.sampled_from([0.0, 0.5, 1.0]))


@given(st.lists(WEIGHTS, min_size=23, max_size=23), st.sampled_from([1, 5, 22, 23, 40]))
def test_the_sum_of_the_largest_is_that_of_a_sort(numbers, k):
    row = np.array(numbers, np.float32)
    expected = np.sort(row.astype(np.float64))[::-1][:k].sum()
    # eps of the sum of the row from the stop, and the rounding of a sum of 23 terms and of the mean between.
    assert abs(float(_largest(row, k)) - expected) <= 64 * 2.0**-24 * row.astype(np.float64).sum()


_largest = jax.jit(largest_sum, static_argnames="k")


def test_temporaries_are_linear_in_the_length():
    def temporaries(T, method):
        x = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32)
        params = method.init(jax.random.key(0), num_heads=1, head_dim=64)
        look = jax.jit(lambda q, k: diagnostics(q, k, method=method, params=params, is_causal=True))
        return look.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    at_32k = temporaries(32768, Performer(features=16))
    assert at_32k <= 48e6  # the matrix of one head's logits would be 4 GiB
    assert at_32k <= 2 * temporaries(16384, Performer(features=16))


OUT_OF_RANGE = [({"k": 0}, "k is 0"), ({"sampled_keys": True}, "keys is True"), ({"window": -1}, r"window is \(-1, -1")]


@pytest.mark.parametrize(("wrong", "message"), OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        diagnostics(jnp.ones((3, 1, 2)), jnp.ones((3, 1, 2)), **wrong)
