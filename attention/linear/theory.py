r"""Closed forms of random features: mean and variance of every kernel estimate, and how many features a target needs.

In NumPy float64, for tokens x and y that carry half of beta each, so that the kernel is e^{x.y}. With s = |x + y|^2,
t = |x - y|^2 and m rows of W, the variance relative to the squared kernel is

    V / m + (pairs / m^2) C,

V the variance of one row's estimate, C the covariance of two rows of one block, `pairs` the number of ordered pairs
that share a block. `docs/bounds.md` derives them.
"""

import math
from typing import get_args

import numpy as np
from jaxtyping import Float

from attention.linear import rectified
from attention.linear.couplings import Coupling
from attention.linear.kernel_maps import Kind
from attention.linear.performer import PAIRED
from attention.linear.random_features import RELU_FLOOR, best_ratio

Tokens = Float[np.ndarray, "... H"]
Numbers = Float[np.ndarray, "..."] | float


def expected_kernel(kind: Kind, x: Tokens, y: Tokens) -> Numbers:
    """The mean of phi(x).phi(y): e^{x.y}, or the kernel of `relu`; the same under every coupling."""
    if kind == "relu":
        X, Y, c = rectified.polar(x, y)
        moments = rectified.moments(c)
        return X * Y * moments[1, 1] + RELU_FLOOR * (X + Y) * moments[1, 0] + RELU_FLOOR**2
    return np.exp((x * y).sum(-1))


def relative_variance(
    kind: Kind, x: Tokens, y: Tokens, *, features: int, coupling: Coupling = "iid", ratio: Numbers = 1.0
) -> Numbers:
    """The variance of phi(x).phi(y) over the draws of W, divided by the square of its mean.

    Args:
        kind: of features; for "data_dependent", x and y in its own coordinates.
        x, y: tokens `... H`.
        features: M.
        coupling: of the rows of W.
        ratio: for "optimal" and "data_dependent", as `random_features.dense_exponential_features` takes it.

    Raises:
        ValueError: no closed form is known: for couplings of "relu", and of ratios that differ by coordinate.
    """
    rows = features // 2 if kind in PAIRED else features
    alone = _row_variance(kind, x, y, np.asarray(ratio)) / rows
    if coupling == "iid":
        return alone
    if kind == "relu" or (np.ndim(ratio) and np.shape(ratio)[-1] > 1):
        raise ValueError(f"coupling is {coupling!r}: expected 'iid', the only one with a closed form for this {kind!r}")
    return alone + _pairs(rows, x.shape[-1]) / rows**2 * _pair_covariance(kind, coupling, x, y)


def features_needed(
    error: float,
    norms: tuple[float | int, float | int],
    temperature: float | int = 1.0,
    *,
    head_dim: int,
    scale: float | int | None = None,
    cosine: float | int = 0.0,
    kind: Kind = "positive",
    coupling: Coupling = "orthogonal",
) -> int:
    """The least M with which the estimate of a kernel e^{beta q.k} has a relative standard error of at most `error`.

    Args:
        error: standard deviation over the draws of W, divided by the kernel.
        norms: |q| and |k|.
        temperature: as in `attention.dot_product_attention`; beta = scale / temperature.
        head_dim: H.
        scale: 1 / sqrt(H) if None.
        cosine: of the angle between q and k: 0 is what random directions have, 1 the worst of all for positive
            features, -1 for trigonometric ones.
        kind, coupling: of `Performer`, with an unbiased kind. "optimal" is fitted to tokens of these norms without a
            common mean; "data_dependent" needs no fewer, and has no one answer for given norms.

    Raises:
        ValueError: a number is out of range, or the kind has no closed form.

    Example:
        >>> from attention.linear import features_needed
        >>> [features_needed(0.5, (8.0, 8.0), temperature, head_dim=64) for temperature in (2, 4, 8)]
        [11838, 189, 24]
    """
    if kind in ("relu", "data_dependent") or kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}: expected positive, trigonometric, hyperbolic or optimal")
    if not (error > 0 and temperature > 0 and min(norms) >= 0 and abs(cosine) <= 1 and head_dim > 1):
        raise ValueError(
            f"error is {error}, norms {norms}, temperature {temperature}, cosine {cosine}, head_dim {head_dim}: "
            "expected positive numbers, a cosine from -1 to 1 and at least 2 dimensions"
        )
    beta = (1 / math.sqrt(head_dim) if scale is None else scale) / temperature
    x, y = np.zeros((2, head_dim))
    x[0], y[:2] = norms[0], (norms[1] * cosine, norms[1] * math.sqrt(1 - cosine**2))
    x, y = x * beta / math.sqrt(abs(beta) or 1), y * math.sqrt(abs(beta))
    spread = abs(beta) * (norms[0] ** 2 + norms[1] ** 2) / head_dim
    ratio = float(best_ratio(np.array([spread]))[0]) if kind == "optimal" else 1.0
    unit = 2 if kind in PAIRED else 1

    def enough(rows: int) -> bool:
        found = relative_variance(kind, x, y, features=unit * rows, coupling=coupling, ratio=ratio)
        return bool(found <= error**2)

    few, many = 0, 1
    while not enough(many):
        few, many = many, 2 * many
        if many > 2**62:
            raise ValueError(f"error is {error}: more than 2^62 features; raise the error or the temperature")
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return unit * many


def _row_variance(kind: Kind, x: Tokens, y: Tokens, ratio: Numbers) -> Numbers:
    """V: of the estimate from one row, relative to the squared mean."""
    s, t = (((x + sign * y) ** 2).sum(-1) for sign in (1, -1))
    with np.errstate(over="ignore"):
        if kind == "positive":
            return np.expm1(s)
        if kind in PAIRED:
            z = s if kind == "hyperbolic" else t
            return -np.expm1(z) * np.expm1(-z) / 2
        if kind == "relu":
            return rectified.second_moment(x, y) / expected_kernel(kind, x, y) ** 2 - 1
        per_coordinate = np.log((ratio + 1) / (2 * np.sqrt(ratio))) + ratio * (x + y) ** 2
        return np.expm1(per_coordinate.sum(-1))


def _pairs(rows: int, H: int) -> int:
    """Ordered pairs of different rows that share a block of H."""
    blocks, rest = divmod(rows, H)
    return blocks * H * (H - 1) + rest * (rest - 1)


def _pair_covariance(kind: Kind, coupling: Coupling, x: Tokens, y: Tokens) -> Numbers:
    """C: of the estimates of two rows of a block, relative to the squared mean; no more than 0 for orthogonal ones.

    The ratio of "optimal" is not in it: widening both rows and weighting them for it cancels.
    """
    H = x.shape[-1]
    cosine = {"orthogonal": 0.0, "simplex": -1 / (H - 1)}[coupling]
    z = ((x - y if kind == "trigonometric" else x + y) ** 2).sum(-1)
    if kind == "trigonometric":
        return (mean_over_pairs(-z, cosine, H) + mean_over_pairs(-z, -cosine, H)) / 2 - 1
    if kind == "hyperbolic":
        return (mean_over_pairs(z, cosine, H) + mean_over_pairs(z, -cosine, H)) / 2 - 1
    return mean_over_pairs(z, cosine, H) - 1


def mean_over_pairs(z: Numbers, cosine: float, H: int) -> Numbers:
    """E[e^{(w + w').v}] e^{-|v|^2} with z = |v|^2, or with cosines of products for z = -|v|^2; w, w' at a fixed angle.

    The mean over f in (0, pi / 2), with density as (sin 2f)^{H - 1}, of 1F1(H; H / 2; z (1 + cosine sin 2f) / 2).
    """
    if cosine == 0:
        return _kummer(z, 1.0, H)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    angles = np.pi / 2 * (nodes + 1)  # 2 f
    weights = weights * np.sin(angles) ** (H - 1)
    return (_kummer(np.asarray(z)[..., None], 1 + cosine * np.sin(angles), H) * weights).sum(-1) / weights.sum()


def _kummer(z: Numbers, part: Numbers, H: int) -> Numbers:
    """1F1(H; H / 2; z part / 2) e^{-z}, by its power series, all of whose terms are positive.

    For negative z, e^{z part / 2} 1F1(-H / 2; H / 2; |z| part / 2) instead, whose terms fall in size.
    """
    u = np.asarray(np.abs(z) * part / 2)
    k = np.arange(int(8 * np.max(u, initial=1)) + 64 + H)
    top = H if np.all(z >= 0) else -H / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.log(np.abs(top + k)) - np.log(H / 2 + k) - np.log1p(k)
        logs = np.concatenate([[0.0], np.cumsum(steps)]) + np.arange(k.size + 1) * np.log(u)[..., None]
    signs = np.concatenate([[1.0], np.cumprod(np.sign(top + k))])
    logs = np.where(np.arange(k.size + 1) == 0, 0.0, logs)  # 0 log 0
    rest = np.asarray(np.where(z >= 0, -z, np.abs(z) - u))
    return (signs * np.exp(logs + rest[..., None])).sum(-1)
