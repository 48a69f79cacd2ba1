"""The kernel estimate against its closed forms (Choromanski et al., arXiv 2009.14794, Lemma 2 and Theorem 2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Performer, dot_product_attention
from attention.linear.performer import orthogonal_gaussian, positive_features

H = M = 16  # as many features as dimensions: one orthogonal block, for which the theorem speaks


def tokens(squared_sum: float) -> tuple[np.ndarray, np.ndarray]:
    """Two tokens with |x + y|^2 = squared_sum, where the estimate can be tested: at most ln M."""
    assert squared_sum <= np.log(M)
    x, y = np.random.default_rng(0).standard_normal((2, H)) * [[1.0], [0.5]]
    return tuple(z * np.sqrt(squared_sum) / np.linalg.norm(x + y) for z in (x, y))


def projections(method: Performer, draws: int, seed: int = 1) -> jax.Array:
    def draw(key):
        return method.init(key, num_heads=1, head_dim=H).constants["projection"]

    return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(seed), draws))


def phi(x, projection) -> np.ndarray:
    mapped = positive_features(jnp.asarray(x, jnp.float32)[None], projection)
    return np.exp(np.asarray(mapped.log_scale, np.float64))[..., None] * np.asarray(mapped.features, np.float64)


def estimates(method: Performer, x, y, draws: int, distort=1.0) -> np.ndarray:
    """phi(x).phi(y) for `draws` projections; `distort` multiplies |x|^2 / 2, 1 where the method is right."""
    wrong = np.exp((1 - distort) * (x @ x + y @ y) / 2)
    kernel = jax.vmap(lambda w: jnp.stack([jnp.exp(f.log_scale)[..., None] * f.features for f in both(x, y, w)]))
    features = np.asarray(jax.jit(kernel)(projections(method, draws)), np.float64)
    return (features[:, 0, 0] * features[:, 1, 0]).sum(-1) * wrong


def both(x, y, projection):
    return (positive_features(jnp.asarray(z, jnp.float32)[None], projection) for z in (x, y))


def expect_unbiased(sample: np.ndarray, truth: float) -> None:
    standard_error = sample.std(ddof=1) / np.sqrt(sample.size)
    assert abs(sample.mean() - truth) <= 4 * standard_error


def test_features_are_the_formula():
    """W x has H products of size |w||x|: off by (H + 2) u |w||x| in the exponent, and e^a by 2 u more."""
    x, y = (10 * z for z in tokens(2.0))
    w = projections(Performer(features=M), 1)[0]
    for z in (x, y):
        w64, z32 = np.asarray(w, np.float64), np.asarray(z, np.float32).astype(np.float64)
        naive = np.exp(w64 @ z32 - z32 @ z32 / 2) / np.sqrt(M)
        size = np.linalg.norm(w64, axis=1).max() * np.linalg.norm(z32) + z32 @ z32
        np.testing.assert_allclose(phi(z, w)[0], naive, rtol=2 * (H + 4) * 2.0**-24 * size)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("squared_sum", [0.5, 2.5])
def test_kernel_estimate_is_unbiased(orthogonal, squared_sum):
    x, y = tokens(squared_sum)
    method = Performer(features=M, orthogonal=orthogonal)
    expect_unbiased(estimates(method, x, y, 200), np.exp(x @ y))
    with pytest.raises(AssertionError):  # a missing factor 2
        expect_unbiased(estimates(method, x, y, 200, distort=2.0), np.exp(x @ y))


def closed_form(x, y) -> float:
    """MSE of independent positive features."""
    s = (x + y) @ (x + y)
    return np.exp(s) * np.exp(2 * x @ y) * -np.expm1(-s) / M


def test_independent_features_have_the_variance_of_the_closed_form():
    """20% is 4 standard errors: at |x + y|^2 = 1 a term's excess kurtosis is 111, that of the mean of M 111 / M."""
    x, y = tokens(1.0)
    draws = 4000
    assert 4 * np.sqrt((2 + 111 / M) / draws) <= 0.2
    variance = estimates(Performer(features=M, orthogonal=False), x, y, draws).var(ddof=1)
    assert abs(variance / closed_form(x, y) - 1) <= 0.2


def test_orthogonal_features_vary_less_than_their_theorem_allows():
    x, y = tokens(1.0)
    kernel = np.exp(x @ y)
    gain = 2 * (M - 1) / (M * (H + 2)) * (kernel - np.exp(-(x @ x + y @ y) / 2)) ** 2
    assert estimates(Performer(features=M), x, y, 4000).var(ddof=1) <= closed_form(x, y) - gain


def test_projection_is_orthogonal_in_blocks_with_chi_norms():
    rows = np.asarray(orthogonal_gaussian(jax.random.key(3), (200 * H + 5, H)), np.float64)
    assert rows.shape == (200 * H + 5, H)
    for block in (rows[:H], rows[H : 2 * H], rows[-5:]):
        unit = block / np.linalg.norm(block, axis=1, keepdims=True)
        # Householder QR is orthogonal to about H^1.5 u.
        np.testing.assert_allclose(unit @ unit.T, np.eye(len(block)), atol=4 * H**1.5 * 2.0**-24)
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


@pytest.mark.parametrize("fields", [{"features": 0}, {"chunk": -1}, {"chunk": True}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=f"Performer.{next(iter(fields))} is"):
        Performer(**fields)


def test_bad_constants_are_named():
    query, method = jnp.ones((1, 4, 2, 8)), Performer(features=24)
    with pytest.raises(ValueError, match="draws constants"):
        dot_product_attention(query, query, query, method=method)
    with pytest.raises(ValueError, match="rng is None"):
        method.init(None, num_heads=2, head_dim=8)
    wrong = Performer(features=8).init(jax.random.key(0), num_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=r"shape \(8, 8\): expected \(24, 8\)"):
        dot_product_attention(query, query, query, method=method, params=wrong)
