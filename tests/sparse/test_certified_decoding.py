"""Decoding within a tolerance, from moments that the state keeps: sound, as the whole has it, and reading no more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Certified
from attention.sparse import certified_step
from attention.sparse.moments import moments
from attention.sparse.summaries import SummarisedCache
from attention.testing.cases import draw, families, rounding
from attention.testing.oracle import oracle

B, T, C = 16, 33, 8
METHODS = {bound: Certified(tolerance=0.5, page=C, bound=bound) for bound in ("ball", "box", "sketch")}
append = jax.jit(SummarisedCache.append, static_argnames="bound")


@functools.partial(jax.jit, static_argnames=("method", "options"))
def decoded(case, temperature, method, options=()):
    """All tokens of a case, one after another from the empty state, `B T N E`."""
    state = method.init_state(B, 2, 8, T, case.key.dtype, num_heads=4)

    def one(state, token):
        return method.extend(state, *token, temperature=temperature, **dict(options))

    tokens = tuple(jnp.moveaxis(x, 1, 0)[:, :, None] for x in case)
    return jnp.moveaxis(jax.lax.scan(one, state, tokens)[1][:, :, 0], 0, 1)


def measured(method, seed: int, dtype: str = "float32", **options):
    """The error of every row, what the tolerance and rounding allow, and rounding alone.

    The tolerance is of the largest distance of two values up to the row. Rounding may take what a softmax over tiles of
    one key may, and as much again for what means of C keys and values lose: 2 (C + 8) u of the largest value.
    """
    temperature = np.float32(2.0 ** np.random.default_rng(seed).uniform(-3, 3))
    case = families(seed, B=B, T=T).astype(dtype)
    output = np.asarray(decoded(case, temperature, method, tuple(options.items()))).astype(np.float64)
    expected, _ = oracle(*case, temperature=temperature, is_causal=True, **options)
    value = np.asarray(case.value).astype(np.float64)
    apart = np.linalg.norm(value[:, :, None] - value[:, None], axis=-1)
    apart = np.repeat(np.stack([apart[:, : t + 1, : t + 1].max((1, 2)) for t in range(T)], axis=1), 2, axis=2)
    lost = 2 * rounding(method, case, temperature=temperature, is_causal=True)
    return np.linalg.norm(output - expected, axis=-1), method.tolerance * apart + lost, lost


@pytest.mark.parametrize(("bound", "dtype"), [("ball", "float32"), ("box", "bfloat16")])
def test_error_is_within_the_tolerance(bound, dtype):
    """48 problems of 33 steps and 4 heads each; in 5% of the rows some page is not read, as the error shows."""
    replaced = []
    for seed in range(3):
        error, allowed, lost = measured(METHODS[bound], seed, dtype)
        assert np.all(error <= allowed), f"seed {seed}: {np.max(error - allowed):.3g} above the tolerance"
        replaced.append(error > lost)
    assert np.mean(replaced) > 0.05


@pytest.mark.parametrize("option", [{"local_window_size": (20, 0)}, {"logits_soft_cap": 2.0}])
def test_options_are_those_of_the_whole(option):
    for seed in range(2):
        error, allowed, _ = measured(METHODS["ball"], seed, **option)
        assert np.all(error <= allowed)


@pytest.mark.parametrize("plant", ["a page missing", "a stale maximum"])
def test_planted_mistakes_are_caught(plant, monkeypatch):
    """By the check that the true step passes."""
    plan, limits = certified_step.plan, certified_step.limits_of

    def wrong_plan(query, pages, visible, known, own, **options):
        right = plan(query, pages, visible, known, own, **options)
        return right._replace(read=right.read.at[0].set(False)) if plant == "a page missing" else right

    def wrong_limits(of, reach, page, **options):
        return limits(of, 0 * reach if plant == "a stale maximum" else reach, page, **options)

    monkeypatch.setattr(certified_step, "plan", wrong_plan)
    monkeypatch.setattr(certified_step, "limits_of", wrong_limits)
    method = dataclasses.replace(METHODS["ball"], query_chunk=100 + len(plant))  # a program of its own
    caught = 0
    for seed in range(6):
        error, allowed, _ = measured(method, seed)
        caught += np.sum(error > allowed)
    assert caught > 0


def test_a_state_has_the_moments_of_its_full_pages():
    case = draw(1, T=21).astype("float32")
    key, value = (jnp.moveaxis(x, 2, 1) for x in case[1:])
    for bound in METHODS:
        state = SummarisedCache.empty(2, 2, 8, 40, C, bound, jnp.float32)
        for start, end in ((0, 7), (7, 8), (8, 21)):
            state = append(state, key[:, :, start:end], value[:, :, start:end], bound=bound)
        expected = moments(key, value, C, bound=bound)
        for name, kept in state.pages._asdict().items():
            if kept is not None:
                # Sums of at most 64 products of order ten, in the orders that two programs have.
                np.testing.assert_allclose(kept[:, :, :2], getattr(expected, name), atol=2.0**-14, rtol=2.0**-14)
        norm = lambda x: np.linalg.norm(x, axis=-1).max(-1)  # noqa: E731
        for kept, longest in zip(state.longest, map(norm, (key, value, value - value[:, :, :1])), strict=True):
            np.testing.assert_allclose(kept, longest, rtol=1e-6)


def test_pages_that_are_not_wanted_are_not_read():
    """Two clusters 10 apart, and NaN in the keys of the far one once its moments are made; garbage beyond the end."""
    rng = np.random.default_rng(0)
    side = np.repeat([5.0, -5.0], 16)[None, :, None, None] * np.ones((1, 1, 2, 8))
    query, key, value = side[:, -1:], side + 0.1 * rng.standard_normal(side.shape), rng.standard_normal(side.shape)
    method = Certified(tolerance=0.1, page=C)
    state = method.init_state(1, 2, 8, 48, jnp.float32)
    state = state.append(*(jnp.asarray(np.moveaxis(x, 2, 1), jnp.float32) for x in (key, value)), bound="ball")
    token = [jnp.asarray(x, jnp.float32) for x in (query, key[:, -1:], value[:, -1:])]
    _, expected = method.extend(state, *token)
    for garbage in (7.0, np.inf, np.nan):
        rooms = {name: getattr(state, name).at[:, :, 4:].set(garbage) for name in ("key", "value")}
        hidden = {name: room.at[:, :, :2].set(np.nan) for name, room in rooms.items()}
        _, output = method.extend(dataclasses.replace(state, **hidden), *token)
        np.testing.assert_array_equal(output, expected)


def test_several_tokens_take_the_moments_that_are_kept():
    """Two clusters 10 apart, of which the far one moves to the near one once its moments are made."""
    rng = np.random.default_rng(0)
    side = np.repeat([5.0, -5.0], 16)[None, :, None, None] * np.ones((1, 1, 2, 8))
    key, value = (jnp.asarray(np.moveaxis(x, 2, 1), jnp.float32) for x in (side, rng.standard_normal(side.shape)))
    method = Certified(tolerance=0.1, page=C)
    state = method.init_state(1, 2, 8, 48, jnp.float32).append(key, value, bound="ball")
    moved = jnp.abs(key) * -1
    tokens = [jnp.moveaxis(x[:, :, -3:], 1, 2) for x in (moved, moved, value)]
    longer, expected = method.extend(state, *tokens)
    kept = dataclasses.replace(state, key=state.key.at[:, :, :4].set(moved.reshape(1, 2, 4, C, 8)))
    _, output = method.extend(kept, *tokens)
    np.testing.assert_array_equal(output, expected)
    remade = method.init_state(1, 2, 8, 48, jnp.float32).append(moved, value, bound="ball")
    _, other = method.extend(remade, *tokens)
    assert np.abs(np.asarray(other - expected)).max() > 0.1
    assert longer.length == 35


def test_a_full_state_says_so():
    state = SummarisedCache.empty(2, 2, 8, 12, C, "ball", jnp.float32)  # two pages, 16 tokens
    with pytest.raises(ValueError, match="cache holds 0 tokens of max_length 16: 17 more do not fit"):
        state.append(jnp.zeros((2, 2, 17, 8)), jnp.zeros((2, 2, 17, 8)), "ball")


def test_a_step_has_the_derivative_of_what_it_computes():
    """In both modes, by the query, where some pages are read and others are means: by differences in float64."""
    rng = np.random.default_rng(3)
    side = np.repeat([2.0, -2.0], 24)[None, :, None, None] * np.ones((1, 1, 2, 8))
    key, value = side + 0.3 * rng.standard_normal(side.shape), rng.standard_normal(side.shape)
    with jax.enable_x64(True):
        method = Certified(tolerance=0.2, page=C)
        state = method.init_state(1, 2, 8, 56, jnp.float64)
        state = state.append(*(jnp.asarray(np.moveaxis(x, 2, 1)) for x in (key, value)), bound="ball")
        query, tangent, cotangent = (jnp.asarray(rng.standard_normal((1, 1, 2, 8))) for _ in range(3))

        @jax.jit
        def output(query):
            return method.extend(state, query, *(jnp.asarray(x[:, -1:]) for x in (key, value)))[1]

        _, along = jax.jvp(output, (query,), (tangent,))
        _, pull = jax.vjp(output, query)
        step = 1e-5
        by_difference = (output(query + step * tangent) - output(query - step * tangent)) / (2 * step)
        # The third derivative is of order one, and so is its step squared times it; rounding is 1e-16 / step.
        np.testing.assert_allclose(along, by_difference, rtol=0, atol=1e-8)
        np.testing.assert_allclose((pull(cotangent)[0] * tangent).sum(), (along * cotangent).sum(), rtol=1e-12)
