"""Random features of single tokens: phi(x).phi(y) estimates e^{x.y} (of `relu`, another kernel).

Each function takes tokens `... H` and a projection W of rows N(0, I), and gives `Features`: phi(x) = e^{log_scale}
features. The exponential ones divide by their largest feature, which is then in log_scale, so that none overflows.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.linear.state import HIGHEST, Features

RELU_FLOOR = 1e-3
"""What `relu_features` add to each feature: that of the paper's own implementation of its ReLU kernel."""


def trigonometric_features(x: Float[Array, "*N H"], projection: Float[Array, "m H"]) -> Features:
    """e^{|x|^2 / 2} [cos W x, sin W x] / sqrt(m), M = 2 m features of either sign.

    References:
        Rahimi and Recht, "Random features for large-scale kernel machines" (2007); Choromanski et al., arXiv
        2009.14794, section 2.3.
    """
    angles = _projected(x, projection)
    log_scale = _half_square(x) - jnp.log(projection.shape[0]) / 2
    return Features(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1), log_scale.astype(x.dtype))


def positive_features(x: Float[Array, "*N H"], projection: Float[Array, "M H"]) -> Features:
    """e^{W x - |x|^2 / 2} / sqrt(M).

    References:
        Choromanski et al., "Rethinking attention with Performers", arXiv 2009.14794, Lemma 1.
    """
    return _exponential(_projected(x, projection), -_half_square(x))


def hyperbolic_features(x: Float[Array, "*N H"], projection: Float[Array, "m H"]) -> Features:
    """[e^{W x}, e^{-W x}] e^{-|x|^2 / 2} / sqrt(2 m), M = 2 m features.

    References:
        Choromanski et al., "Rethinking attention with Performers", arXiv 2009.14794, Lemma 1.
    """
    exponents = _projected(x, projection)
    return _exponential(jnp.concatenate([exponents, -exponents], -1), -_half_square(x))


def dense_exponential_features(
    x: Float[Array, "*N H"], projection: Float[Array, "M H"], ratio: Float[Array, "*r h"]
) -> Features:
    r"""The positive features of least variance for tokens of a known spread.

        phi_m(x) = prod_h (1 - 4 a_h)^{1/4} e^{a_h w_h^2 + sqrt(1 - 4 a_h) w_h x_h - x_h^2 / 2} / sqrt(M)

    with w the row m of W and a = (1 - 1 / ratio) / 8. One ratio for all coordinates is FAVOR++, one a coordinate
    FAVOR#; ratio = 1 gives `positive_features`. Unbiased for every ratio in (0, 1]; `best_ratio` has the best.

    References:
        Likhosherstov et al., "Chefs' random tables", arXiv 2205.15317, section 3; Likhosherstov et al., "FAVOR#",
        arXiv 2302.00787, section 3.
    """
    a = (1 - 1 / ratio) / 8
    widening = 1 - 4 * a
    quadratic = jnp.einsum("...h,mh->...m", jnp.broadcast_to(a, (*a.shape[:-1], x.shape[-1])), projection**2)
    per_token = jnp.broadcast_to(jnp.log(widening) / 4, (*a.shape[:-1], x.shape[-1])).sum(-1) - _half_square(x)
    return _exponential(_projected(x * jnp.sqrt(widening), projection) + quadratic, per_token)


def relu_features(x: Float[Array, "*N H"], projection: Float[Array, "M H"]) -> Features:
    """(max(W x, 0) + RELU_FLOOR) / sqrt(M): the arc-cosine kernel of order 1, no estimate of softmax.

    The temperature enters through the floor alone, since the kernel without it is homogeneous.

    References:
        Choromanski et al., "Rethinking attention with Performers", arXiv 2009.14794, sections 2.2 and 4.2; Cho and
        Saul, "Kernel methods for deep learning" (2009), section 2, for the kernel.
    """
    features = jnp.maximum(_projected(x, projection), 0) + RELU_FLOOR
    return Features(features / jnp.sqrt(projection.shape[0]).astype(x.dtype), jnp.zeros(x.shape[:-1], x.dtype))


def best_ratio(spread: Any) -> Any:
    """The ratio in (0, 1] that minimises the mean log second moment where the mean of (x_h + y_h)^2 is `spread`.

    2 spread r^2 + (1 + 2 spread) r - 1 = 0, written so that nothing cancels; 1 at a spread of 0. Arrays are of JAX or
    NumPy.
    """
    b = 1 + 2 * spread
    return 2 / (b + (b * b + 8 * spread) ** 0.5)


def _projected(x: Float[Array, "*N H"], projection: Float[Array, "M H"]) -> Float[Array, "*N M"]:
    return jnp.einsum("...H,MH->...M", x, projection, precision=HIGHEST)


def _half_square(x: Float[Array, "*N H"]) -> Float[Array, "*N"]:
    return (x * x).sum(-1) / 2


def _exponential(exponents: Float[Array, "*N M"], per_token: Float[Array, "*N"]) -> Features:
    """e^{exponents + per_token} / sqrt(M)."""
    top = lax.stop_gradient(exponents.max(-1))  # it cancels in phi
    log_scale = top + per_token - jnp.log(exponents.shape[-1]) / 2
    return Features(jnp.exp(exponents - top[..., None]), log_scale.astype(exponents.dtype))
