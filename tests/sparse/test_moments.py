"""Soundness of what is kept of a page: the reach of its logits by each bound, and the norms of its moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.rounding import norms
from attention.sparse.bounds import REACH
from attention.sparse.moments import moments
from attention.testing.cases import families

PAGE, PAGES = 8, 4


@functools.cache
def drawn(seed: int):
    """Queries `16 4 8` and keys and values `16 32 8`: eight hard families, at scales from 1e-6 to 1e6."""
    case = families(seed, B=16, T=PAGE * PAGES, K=1, N=1)
    scale = 10.0 ** np.random.default_rng(seed).uniform(-6, 6, (16, 1, 1))
    query, key, value = (x[:, :, 0] for x in case)
    return tuple(x.astype(np.float32) for x in (query[:, :4], key * scale, value))


@functools.partial(jax.jit, static_argnames="name")
def reached(query, key, value, name):
    pages = jax.vmap(functools.partial(moments, size=PAGE, bound=name))(key, value)
    return pages, jax.vmap(REACH[name])(query, norms(query), pages)


def exact_reach(query, pages, key):
    centred = key.astype(np.float64).reshape(16, PAGES, PAGE, -1) - np.asarray(pages.key, np.float64)[:, :, None]
    return centred, np.abs(np.einsum("bth,bpsh->bpts", query.astype(np.float64), centred)).max(-1)


@pytest.mark.parametrize("name", REACH)
def test_no_logit_is_beyond_its_pages_reach(name):
    """Of 8,192 queries and pages a bound; float64 has the true reach but for 2**-50 of it."""
    looseness = []
    for seed in range(32):
        query, key, value = drawn(seed)
        pages, bound = reached(query, key, value, name)
        _, exact = exact_reach(query, pages, key)
        assert np.all(exact <= np.asarray(bound, np.float64))
        looseness.append(np.asarray(bound)[exact > 0] / exact[exact > 0])
    # Of 8 entries: the ball is sqrt(8) too large where a query is at right angles to the keys; so are others, or less.
    assert np.median(np.concatenate(looseness)) < 8


@pytest.mark.parametrize("plant", ["one key missing", "rounded to nearest", "no absolute value"])
def test_planted_bounds_on_a_page_are_caught(plant):
    """By the check that the true ones pass."""
    caught = 0
    for seed in range(8):
        query, key, value = drawn(seed)
        pages, _ = reached(query, key, value, "box")
        centred, exact = exact_reach(query, pages, key)
        half = np.abs(centred[:, :, 1:] if plant == "one key missing" else centred).max(2)
        size = query.astype(np.float64) if plant == "no absolute value" else np.abs(query.astype(np.float64))
        wrong = np.einsum("bth,bph->bpt", size, half)
        if plant == "rounded to nearest":  # the ball around a single key, whose bound is attained
            wrong = np.float32(np.linalg.norm(centred, axis=-1).max(2))[..., None] * np.ones(4)
            exact = np.linalg.norm(centred, axis=-1).max(2)[..., None] * np.ones(4)
        caught += np.sum(exact > wrong)
    assert caught > 0


def test_moments_are_bounds():
    """Each norm that a page keeps against the same in float64, and the means against theirs."""
    for seed in range(16):
        query, key, value = drawn(seed)
        pages, _ = reached(query, key, value, "ball")
        pages = jax.tree.map(lambda x: np.asarray(x, np.float64), pages)
        k, v = (x.astype(np.float64).reshape(16, PAGES, PAGE, -1) for x in (key, value))
        y, w = k - pages.key[:, :, None], v - pages.value[:, :, None]
        length = functools.partial(np.linalg.norm, axis=-1)
        assert np.all(length(y).max(2) <= pages.radius)
        assert np.all(length(y.mean(2)) <= pages.key_shift)
        assert np.all(length(w.mean(2)) <= pages.value_shift)
        for kept, other in ((pages.spread, y), (pages.coupling, w)):
            exact = np.linalg.norm(np.einsum("bpsh,bpse->bphe", y, other) / PAGE, 2, axis=(2, 3))
            assert np.all(exact <= kept)
        # No more than 8^(1/8) = 1.3 too large, and what rounding may add.
        assert np.all(
            pages.spread <= 1.3 * np.linalg.norm(y.swapaxes(2, 3) @ y / PAGE, 2, axis=(2, 3)) + 1e-3 * pages.radius**2
        )
        apart = length(v[:, :, :, None] - v[:, :, None]).max((2, 3))
        assert np.all(pages.width <= apart)


def test_equal_keys_have_no_reach():
    key = jnp.ones((PAGE, 8), jnp.float32)
    for name, reach in REACH.items():
        assert not np.any(reach(key[:2], norms(key[:2]), moments(key, key, PAGE, bound=name)) > 1e-3)
