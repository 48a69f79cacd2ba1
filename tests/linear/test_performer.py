"""Performer as a method: its constants, how they are drawn, redrawn and fitted, and what they may not depend on.

The kernel estimates themselves are tested in `test_random_features.py`.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Performer, dot_product_attention
from attention.linear.couplings import gaussian_rows
from attention.linear.kernel_maps import Kind
from attention.linear.random_features import positive_features
from attention.testing import LAWS
from attention.testing.law import counted_compilations

H = 16


def test_features_are_the_formula():
    """W x has H products of size |w||x|: off by (H + 2) u |w||x| in the exponent, and e^a by 2 u more."""
    w = jax.random.normal(jax.random.key(1), (H, H))
    for z in 10 * np.random.default_rng(0).standard_normal((2, H)) / H**0.5:
        mapped = positive_features(jnp.asarray(z, jnp.float32)[None], w)
        found = np.exp(np.asarray(mapped.log_scale, np.float64)) * np.asarray(mapped.features, np.float64)[0]
        w64, z32 = np.asarray(w, np.float64), np.asarray(z, np.float32).astype(np.float64)
        size = np.linalg.norm(w64, axis=1).max() * np.linalg.norm(z32) + z32 @ z32
        naive = np.exp(w64 @ z32 - z32 @ z32 / 2) / np.sqrt(H)
        np.testing.assert_allclose(found, naive, rtol=2 * (H + 4) * 2.0**-24 * size)


@pytest.mark.parametrize(("coupling", "cosine"), [("orthogonal", 0.0), ("simplex", -1 / (H - 1))])
def test_rows_stand_at_their_angle_in_blocks_with_chi_norms(coupling, cosine):
    rows = np.asarray(gaussian_rows(coupling, jax.random.key(3), (200 * H + 5, H)), np.float64)
    assert rows.shape == (200 * H + 5, H)
    for block in (rows[:H], rows[H : 2 * H], rows[-5:]):
        unit = block / np.linalg.norm(block, axis=1, keepdims=True)
        # Householder QR is orthogonal to about H^1.5 u.
        angles = np.where(np.eye(len(block)) == 1, 1, cosine)
        np.testing.assert_allclose(unit @ unit.T, angles, atol=4 * H**1.5 * 2.0**-24)
    squared = (rows**2).sum(1)  # chi-squared with H degrees: mean H, variance 2 H, standard error of it 2 H sqrt(...)
    assert abs(squared.mean() - H) <= 4 * np.sqrt(2 * H / len(rows))
    assert abs(squared.var() / (2 * H) - 1) <= 4 * np.sqrt((2 + 12 / H) / len(rows))


def test_constants_depend_on_the_key_alone():
    """Not on the heads, the dtype, or whether they come as params or from rng."""
    method, key = Performer(features=24), jax.random.key(5)
    query = jax.random.normal(jax.random.key(6), (1, 9, 4, 8))
    params = method.init(key, num_heads=4, head_dim=8)
    np.testing.assert_array_equal(
        params.constants["projection"], method.init(key, num_heads=1, head_dim=8).constants["projection"]
    )
    drawn, given = (
        dot_product_attention(query, query, query, method=method, **constants)
        for constants in ({"rng": key}, {"params": params})
    )
    # Compiled with the rest or alone, QR differs by about H^1.5 u, which moves exponents of at most |w||x|.
    size = float(jnp.linalg.norm(params.constants["projection"], axis=1).max() * jnp.abs(query).max() * 8**0.5)
    np.testing.assert_allclose(drawn, given, atol=2 * 8**1.5 * 2.0**-24 * size * float(jnp.abs(query).max()), rtol=0)
    with jax.enable_x64(True):
        wide = method.init(key, num_heads=4, head_dim=8).constants["projection"]
    np.testing.assert_array_equal(wide, params.constants["projection"])


def test_error_falls_as_one_over_the_root_of_the_features():
    """Four times the features halve the error: between 16 and 1024 it falls by 8, here within a factor 1.5."""
    q, k, v = np.random.default_rng(7).standard_normal((3, 4, 64, 4, 16)).astype(np.float32)
    exact = dot_product_attention(q, k, v, temperature=4.0)

    def error(features):
        output = dot_product_attention(
            q, k, v, method=Performer(features=features), rng=jax.random.key(8), temperature=4.0
        )
        return float(jnp.sqrt(jnp.square(output - exact).mean()))

    assert 8 / 1.5 <= error(16) / error(1024) <= 8 * 1.5


@pytest.mark.parametrize("kind", ["hyperbolic", "relu", "optimal"])
def test_kinds_that_no_example_has_are_causal_bit_for_bit(kind):
    LAWS["the_future_does_not_exist"](Performer(kind=kind, features=24, chunk=5))


def test_decoding_knows_no_future_with_any_kind():
    """Tokens appended with those before them change no bit of these, whatever they are."""
    now, query = 6, np.random.default_rng(8).standard_normal((1, 13, 2, 8)).astype(np.float32)

    @jax.jit
    def decoded(query):
        outputs = []
        for kind in get_args(Kind):
            method = Performer(kind=kind, coupling="iid", features=24, chunk=5)
            params = method.init(jax.random.key(1), num_heads=2, head_dim=8)
            state = method.init_state(1, 2, 8, 13, jnp.float32)
            outputs.append(method.extend(state, query, query, query, params=params)[1][:, :now])
        return outputs

    before = decoded(query)
    for factor in (2, 40, 1e4):
        changed = np.concatenate([query[:, :now], np.float32(factor) * query[:, now:]], axis=1)
        for kind, after, same in zip(get_args(Kind), decoded(changed), before, strict=True):
            np.testing.assert_array_equal(after, same, err_msg=kind)


def test_fitted_statistics_are_those_of_each_head_and_causal():
    """Heads that have been fitted apart are what each is by itself, and no future token reaches the past."""
    method = Performer(kind="data_dependent", features=24, chunk=5)
    rng = np.random.default_rng(9)
    query, key, value = (rng.standard_normal((1, 13, n, 8)).astype(np.float32) for n in (4, 2, 2))
    key = key * np.array([[0.5], [2.0]], np.float32) + 1
    drawn = method.init(jax.random.key(2), num_heads=4, head_dim=8)
    params = method.fitted(drawn, jnp.asarray(query), jnp.asarray(key))
    scale = np.array([0.1, 0.2, 0.3, 0.4], np.float32)

    @jax.jit
    def attend(query, key, value, scale, params):
        return dot_product_attention(
            query, key, value, method=method, params=params, scale=scale, temperature=2.0, is_causal=True
        )

    whole = np.asarray(attend(query, key, value, scale, params))
    later = np.arange(13)[:, None, None] >= 6
    for factor in (2, 40, 1e4):
        changed = (np.where(later, np.float32(factor) * x, x) for x in (query, key, value))
        np.testing.assert_array_equal(np.asarray(attend(*changed, scale, params))[:, :6], whole[:, :6])
    for head in (0, 1):
        own = slice(2 * head, 2 * head + 2)
        alone = method.fitted(drawn, jnp.asarray(query[:, :, own]), jnp.asarray(key[:, :, head : head + 1]))
        for name in ("query_mean", "key_mean", "spread"):  # the signs of the maps' rows are free
            np.testing.assert_allclose(alone.constants[name][0], params.constants[name][head], rtol=1e-3, atol=1e-4)
        constants = {n: x if n == "projection" else x[head : head + 1] for n, x in params.constants.items()}
        tokens = (query[:, :, own], key[:, :, head : head + 1], value[:, :, head : head + 1])
        output = attend(*tokens, scale[own], params._replace(constants=constants))
        # The same sums in another order: features of exponents up to 30, each good to 30 u, over 13 keys.
        np.testing.assert_allclose(output, whole[:, :, own], atol=13 * 30 * 2.0**-24 * np.abs(value).max(), rtol=0)


def test_statistics_that_do_not_fit_are_refused():
    query = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="kind is 'positive': expected one of"):
        Performer().fitted(Performer().init(jax.random.key(0), num_heads=2, head_dim=8), query, query)
    method = Performer(kind="optimal", features=24)
    drawn = method.init(jax.random.key(0), num_heads=2, head_dim=8)
    three = drawn._replace(constants={**drawn.constants, "spread": jnp.ones(3)})
    for params in (three, Performer(features=24).init(jax.random.key(0), num_heads=2, head_dim=8)):
        with pytest.raises(ValueError, match=r"params: spread has shape .*: expected \(1,\) or \(2,\)"):
            dot_product_attention(query, query, query, method=method, params=params)


def test_redrawing_follows_the_step_and_the_key_alone():
    """Another W every 3 steps, the same from whatever params, in one program; what was fitted stays."""
    method, rng = Performer(kind="optimal", features=24), jax.random.key(4)
    params = method.init(jax.random.key(5), num_heads=2, head_dim=8)
    redraw = jax.jit(lambda params, rng, step: method.redrawn(params, rng, step=step, every=3))
    found = []
    for step in range(7):
        with counted_compilations() as count:
            params = redraw(params, rng, jnp.asarray(step))
        assert step == 0 or not count
        found.append(np.asarray(params.constants["projection"]))
    for step, projection in enumerate(found):
        np.testing.assert_array_equal(projection, found[step // 3 * 3])
    assert not np.array_equal(found[0], found[3])
    assert not np.array_equal(found[3], found[6])
    other = method.init(jax.random.key(6), num_heads=2, head_dim=8)
    np.testing.assert_array_equal(redraw(other, rng, jnp.asarray(3)).constants["projection"], found[3])
    np.testing.assert_array_equal(params.constants["spread"], other.constants["spread"])
    with pytest.raises(ValueError, match="every is 0"):
        method.redrawn(params, rng, step=0, every=0)


BAD = [{"features": 0}, {"confidence": 1.0}, {"chunk": -1}, {"chunk": True}, {"features": 7, "kind": "hyperbolic"}]


@pytest.mark.parametrize("fields", BAD)
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=f"Performer.{next(iter(fields))} is"):
        Performer(**fields)


@pytest.mark.parametrize("field", ["kind", "coupling"])
def test_bad_choices_are_named(field):
    """By the check of types, which comes first where the tests switch it on, or else by the class."""
    with pytest.raises((TypeError, ValueError), match=rf"(?s){field}.*cubic"):
        Performer(**{field: "cubic"})


def test_bad_constants_are_named():
    query, method = jnp.ones((1, 4, 2, 8)), Performer(features=24)
    with pytest.raises(ValueError, match="draws constants"):
        dot_product_attention(query, query, query, method=method)
    with pytest.raises(ValueError, match="rng is None"):
        method.init(None, num_heads=2, head_dim=8)
    wrong = Performer(features=8).init(jax.random.key(0), num_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=r"shape \(8, 8\): expected \(24, 8\)"):
        dot_product_attention(query, query, query, method=method, params=wrong)
