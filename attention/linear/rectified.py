"""Closed forms of rectified random features, in NumPy float64: means over w of products of max(w.x, 0) + e."""

import math

import numpy as np
from jaxtyping import Float

from attention.linear.random_features import RELU_FLOOR

Tokens = Float[np.ndarray, "... H"]
Numbers = Float[np.ndarray, "..."] | float


def polar(x: Tokens, y: Tokens) -> tuple[Numbers, Numbers, Numbers]:
    """|x|, |y| and the cosine of their angle."""
    X, Y = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    product = np.where(X * Y > 0, X * Y, 1)
    return X, Y, np.clip((x * y).sum(-1) / product, -1, 1)


def moments(c: Numbers) -> dict[tuple[int, int], Numbers]:
    """E[max(a, 0)^i max(b, 0)^j] of standard normal a and b with correlation c (Cho and Saul 2009, section 2)."""
    angle, sine, one = np.arccos(c), np.sqrt(1 - c * c), np.ones_like(c)
    mixed = (1 + c) ** 2 / (2 * math.sqrt(2 * math.pi))
    return {
        (1, 0): one / math.sqrt(2 * math.pi),
        (2, 0): one / 2,
        (1, 1): (sine + (math.pi - angle) * c) / (2 * math.pi),
        (2, 1): mixed,
        (2, 2): (3 * sine * c + (math.pi - angle) * (1 + 2 * c * c)) / (2 * math.pi),
    }


def second_moment(x: Tokens, y: Tokens) -> Numbers:
    """E[(max(w.x, 0) + e)^2 (max(w.y, 0) + e)^2], e the floor."""
    (X, Y, c), e = polar(x, y), RELU_FLOOR
    r = moments(c)
    squares = X**2 * Y**2 * r[2, 2] + e**2 * (X**2 + Y**2) * r[2, 0] + 4 * e**2 * X * Y * r[1, 1] + e**4
    return squares + 2 * e * X * Y * (X + Y) * r[2, 1] + 2 * e**3 * (X + Y) * r[1, 0]
