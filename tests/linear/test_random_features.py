"""Kernel estimates of every kind and coupling against their closed forms (`attention.linear.theory`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Params, Performer
from attention.inputs import prepare
from attention.linear import features_needed
from attention.linear.couplings import gaussian_rows
from attention.linear.performer import PAIRED
from attention.linear.random_features import best_ratio
from attention.linear.theory import expected_kernel, mean_over_pairs, relative_variance

H = M = 16  # as many rows as dimensions: one block, for which theorem 2 of the Performer paper speaks
KINDS = ("positive", "trigonometric", "hyperbolic", "relu", "optimal")
COUPLINGS = ("iid", "orthogonal", "simplex")
DRAWS = 20_000


def tokens(squared_sum: float) -> np.ndarray:
    """Two tokens with |x + y|^2 = squared_sum, where the estimate can be tested: at most ln M."""
    assert squared_sum <= np.log(M)
    x, y = np.random.default_rng(0).standard_normal((2, H)) * [[1.0], [0.5]]
    return np.stack([x, y]) * np.sqrt(squared_sum) / np.linalg.norm(x + y)


@functools.cache
def projections(coupling: str) -> jax.Array:
    """`draws M H`."""
    keys = jax.random.split(jax.random.key(1), DRAWS)
    return jax.jit(jax.vmap(lambda key: gaussian_rows(coupling, key, (M, H))))(keys)


def performer(kind: str) -> Performer:
    return Performer(kind=kind, features=2 * M if kind in PAIRED else M)


@functools.partial(jax.jit, static_argnames="method")
def logarithms(method: Performer, query, key, projections, moments):
    """phi(q).phi(k) e^{-scales} and scales over the projections, for one query and one key with beta = 1."""

    def one(projection):
        params = Params(constants={"projection": projection, **moments})
        inputs = prepare(method, *(z[None, None, None] for z in (query, key, key)), params=params, scale=1.0)
        maps, place = method.feature_map(inputs), jnp.zeros((1, 1), jnp.int32)
        of_query, of_key = maps.query(inputs.query, place), maps.key(inputs.key, place)
        return (of_query.features * of_key.features).sum(), (of_query.log_scale + of_key.log_scale).sum()

    return jax.vmap(one)(projections)


def estimates(method: Performer, x, y, coupling: str, moments=None) -> np.ndarray:
    """phi(x).phi(y) for every projection."""
    standard = method.init(jax.random.key(0), num_heads=1, head_dim=H).constants if moments is None else moments
    moments = {name: value for name, value in standard.items() if name != "projection"}
    x, y = (jnp.asarray(z, jnp.float32) for z in (x, y))
    found, scales = logarithms(method, x, y, projections(coupling), moments)
    return np.asarray(found, np.float64) * np.exp(np.asarray(scales, np.float64))


def expect_mean(sample: np.ndarray, truth) -> None:
    assert abs(sample.mean() - truth) <= 4 * sample.std(ddof=1) / np.sqrt(sample.size)


def expect_variance(sample: np.ndarray, truth) -> None:
    """Within 20%, which must be 4 standard errors of a variance: sqrt of (fourth moment - variance^2) / draws."""
    squares = (sample - sample.mean()) ** 2
    assert 4 * squares.std() / np.sqrt(sample.size) <= 0.2 * squares.mean()
    assert abs(squares.mean() / truth - 1) <= 0.2


def spread_of(kind: str, squared_sum: float) -> tuple[dict | None, np.ndarray | float]:
    """The constants of `optimal` that are right for tokens with this |x + y|^2 at beta = 1, and their ratio."""
    spread = np.array([squared_sum / H])
    return ({"spread": jnp.asarray(spread, jnp.float32)}, best_ratio(spread)) if kind == "optimal" else (None, 1.0)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_estimates_have_their_mean(kind, coupling):
    for squared_sum in (0.5, 2.5):
        x, y = tokens(squared_sum)
        moments, _ = spread_of(kind, squared_sum)
        sample, truth = estimates(performer(kind), x, y, coupling, moments)[:200], expected_kernel(kind, x, y)
        if kind != "relu":
            np.testing.assert_allclose(truth, np.exp(x @ y))
        expect_mean(sample, truth)
        with pytest.raises(AssertionError):  # a missing factor 2: e^{|x|^2} for e^{|x|^2 / 2}
            expect_mean(sample * np.exp((x @ x + y @ y) / 2), truth)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_estimates_have_their_variance(kind, coupling):
    x, y = tokens(1.0)
    if kind == "relu" and coupling != "iid":
        with pytest.raises(ValueError, match="expected 'iid', the only one with a closed form"):
            relative_variance(kind, x, y, features=M, coupling=coupling)
        return
    features = performer(kind).features
    moments, ratio = spread_of(kind, 1.0)
    relative = relative_variance(kind, x, y, features=features, coupling=coupling, ratio=ratio)
    sample, truth = estimates(performer(kind), x, y, coupling, moments), relative * expected_kernel(kind, x, y) ** 2
    expect_variance(sample, truth)
    with pytest.raises(AssertionError):  # a missing factor 2
        expect_variance(sample, truth / 2)


def test_orthogonal_features_vary_less_than_their_theorem_allows():
    """Theorem 2 of arXiv 2009.14794, in the measurement and in the closed form; simplex ones vary less still."""
    x, y = tokens(1.0)
    kernel = np.exp(x @ y)
    gain = 2 * (M - 1) / (M * (H + 2)) * (kernel - np.exp(-(x @ x + y @ y) / 2)) ** 2
    independent, orthogonal, simplex = (
        relative_variance("positive", x, y, features=M, coupling=coupling) * kernel**2 for coupling in COUPLINGS
    )
    measured = [estimates(performer("positive"), x, y, coupling).var(ddof=1) for coupling in COUPLINGS]
    assert orthogonal <= independent - gain
    assert measured[1] <= independent - gain
    assert simplex < orthogonal
    assert measured[2] < measured[1] < measured[0]


def test_closed_forms_of_couplings_continue_each_other():
    """Rows beyond a block are independent of it: two blocks have half the variance of one, and one row has none's."""
    x, y = tokens(1.0)
    for kind, unit in (("positive", 1), ("trigonometric", 2)):
        for coupling in ("orthogonal", "simplex"):
            one, two = (relative_variance(kind, x, y, features=n * unit * H, coupling=coupling) for n in (1, 2))
            np.testing.assert_allclose(two, one / 2)
            alone = (relative_variance(kind, x, y, features=unit, coupling=c) for c in (coupling, "iid"))
            np.testing.assert_allclose(*alone)
    # The average over all angles is that of independent rows: C = 0, with the density of the angle in H dimensions.
    cosines, weights = np.polynomial.legendre.leggauss(40)
    density = weights * (1 - cosines**2) ** ((H - 3) / 2)
    mean = sum(d * mean_over_pairs(np.float64(2.0), c, H) for c, d in zip(cosines, density, strict=True))
    np.testing.assert_allclose(mean / density.sum(), 1, rtol=1e-9)


def anisotropic(seed: int, n: int) -> np.ndarray:
    """Queries and keys, `n H` each, with means and with covariances that share no axis."""
    rng = np.random.default_rng(seed)
    falling = np.arange(1, H + 1) ** -0.7
    turned = np.linalg.qr(rng.standard_normal((2, H, H)))[0]
    shift = 0.3 * rng.standard_normal((2, 1, H))
    return 0.6 * (np.random.default_rng(seed + 1).standard_normal((2, n, H)) * falling) @ turned + shift


@functools.cache
def fitted(kind: str) -> dict:
    query, key = (jnp.asarray(z[None, :, None], jnp.float32) for z in anisotropic(2, 512))
    method = performer(kind)
    return method.fitted(method.init(jax.random.key(0), num_heads=1, head_dim=H), query, key).constants


def in_own_coordinates(constants: dict, query, key):
    """x, y and the ratios of `data_dependent` at beta = 1."""
    c = {name: np.asarray(x[0], np.float64) for name, x in constants.items() if name != "projection"}
    x, y = (query - c["query_mean"]) @ c["query_map"].T, (key - c["key_mean"]) @ c["key_map"].T
    return x, y, best_ratio(c["spread"])


def test_fitted_features_are_unbiased_and_have_their_variance():
    """Means, maps and ratios cancel in the mean; the variance is that of the tokens in their own coordinates."""
    constants, method = fitted("data_dependent"), performer("data_dependent")
    query, key = anisotropic(2, 512)[:, 5]
    sample = estimates(method, query, key, "iid", constants)
    # float32 exponents of order 10 leave a relative error far below a standard error of 1%.
    expect_mean(sample, np.exp(query @ key))
    x, y, ratio = in_own_coordinates(constants, query, key)
    truth = relative_variance("data_dependent", x, y, features=M, ratio=ratio) * np.exp(2 * query @ key)
    expect_variance(sample, truth)
    with pytest.raises(AssertionError):
        expect_variance(sample, truth / 2)


def test_fitting_does_what_it_says():
    """Equal diagonal covariances, no logit changed, and a smaller mean log second moment at each step of generality."""
    query, key = anisotropic(2, 512)
    constants = fitted("data_dependent")
    x, y, ratio = in_own_coordinates(constants, query, key)
    for z in (x, y):  # within the ridge, 2^-10 of the mean variance, and float32
        np.testing.assert_allclose(
            z.T @ z / len(z), np.diag(np.asarray(constants["spread"][0], np.float64) / 2), atol=2e-2 * np.cov(z.T).max()
        )
    maps = (np.asarray(constants[name][0], np.float64) for name in ("query_map", "key_map"))
    np.testing.assert_allclose(next(maps).T @ next(maps), np.eye(H), atol=1e-4)

    def objective(x, y, ratio):
        return np.log1p(relative_variance("data_dependent", x, y[::-1], features=1, ratio=ratio)).mean()

    isotropic = best_ratio(np.asarray(fitted("optimal")["spread"], np.float64))
    found = [objective(x, y, ratio), objective(query, key, isotropic), objective(query, key, 1.0)]
    assert found[0] < found[1] < found[2]
    for factor in (0.9, 1.1):
        assert objective(x, y, np.minimum(factor * ratio, 1)) > found[0]
        assert objective(query, key, factor * isotropic) > found[1]


@pytest.mark.parametrize("kind", ["positive", "optimal", "trigonometric"])
def test_features_needed_are_needed(kind):
    """The answer meets the target and one row fewer does not; and measured tokens of these norms agree."""
    error, norms, temperature, unit = 0.5, (3.0, 2.0), 1.5, 2 if kind in PAIRED else 1
    needed = {c: features_needed(error, norms, temperature, head_dim=H, kind=kind, coupling=c) for c in COUPLINGS}
    assert needed["orthogonal"] <= needed["iid"]
    beta = 0.25 / temperature
    x, y = np.zeros((2, H))
    x[0], y[1] = np.sqrt(beta) * np.array(norms)
    ratio = best_ratio(np.array([beta * 13 / H])) if kind == "optimal" else 1.0
    for coupling, M in needed.items():
        at, below = (
            relative_variance(kind, x, y, features=n, coupling=coupling, ratio=ratio) for n in (M, max(M - unit, unit))
        )
        assert at <= error**2
        assert below > error**2 or unit == M
    # The same target from measurement: the variance of 16 rows, times 16 / rows, since both are independent.
    moments = {"spread": jnp.full((1,), 13 * beta / H)} if kind == "optimal" else None
    measured = estimates(performer(kind), x, y, "iid", moments).var() * performer(kind).features / needed["iid"]
    assert measured <= 1.2 * error**2
    assert measured * needed["iid"] / (needed["iid"] - unit) > error**2 / 1.2


def test_features_needed_refuses_what_it_cannot_answer():
    for bad, words in (
        ({"kind": "relu"}, "kind is 'relu'"),
        ({"kind": "data_dependent"}, "expected positive"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"cosine": 2.0}, "cosine 2"),
        ({"temperature": 1e-3}, "more than 2\\^62 features"),
    ):
        options = {"temperature": 1.0, "head_dim": 16} | bad
        with pytest.raises(ValueError, match=words):
            features_needed(0.1, (4.0, 4.0), **options)
