"""Gaussian projections whose rows are independent of each other, or repel each other.

Every row by itself is N(0, I), so that a kernel estimate is unbiased under each of them; how two rows depend on each
other changes its variance alone.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Coupling = Literal["iid", "orthogonal", "simplex"]


def gaussian_rows(coupling: Coupling, rng: Array, shape: tuple[int, int]) -> Float[Array, "M H"]:
    """W, rows N(0, I) in float32, with the dependence that `coupling` names.

    Args:
        coupling: "iid"; "orthogonal" (Yu et al., arXiv 1610.09072, section 3; Choromanski et al., arXiv 2009.14794,
            section 2.4) or "simplex" (Reid et al., arXiv 2301.13856, section 3): the directions of H rows at a time
            are an orthonormal basis, or the corners of a regular simplex, turned at random; their lengths are
            independent and chi-distributed. Rows beyond the last full block are the first of another one.
        rng: a key.
        shape: M and H.

    Time O(M H^2), memory O(M H); iid O(M H).
    """
    if coupling == "iid":
        return jax.random.normal(rng, shape, jnp.float32)
    return _turned(rng, shape, BLOCKS[coupling](shape[1]))


def _simplex(H: int) -> Float[Array, "H H"]:
    """H unit vectors, every two at the cosine -1 / (H - 1): the unit vectors less their mean."""
    return (_identity(H) - 1 / H) * (H / (H - 1)) ** 0.5 if H > 1 else _identity(1)


def _identity(H: int) -> Float[Array, "H H"]:
    return jnp.eye(H, dtype=jnp.float32)  # in float32 under any setting, so that a key means the same rows everywhere


BLOCKS: dict[str, Callable[[int], Float[Array, "H H"]]] = {"orthogonal": _identity, "simplex": _simplex}


def _turned(rng: Array, shape: tuple[int, int], block: Float[Array, "H H"]) -> Float[Array, "M H"]:
    """Rows of `block`, turned by a rotation of each block's own, with chi-distributed lengths."""
    M, H = shape
    directions, lengths = jax.random.split(rng)
    square, triangle = jnp.linalg.qr(jax.random.normal(directions, (-(-M // H), H, H), jnp.float32))
    # Times the signs of the triangle's diagonal, the factor is uniform over rotations (Mezzadri, math-ph/0609050).
    signs = jnp.where(jnp.diagonal(triangle, axis1=-2, axis2=-1) < 0, -1, 1).astype(jnp.float32)
    rotation = square * signs[:, None, :]
    rows = jnp.einsum("ij,njh->nih", block, rotation, precision="highest")
    norms = jnp.linalg.norm(jax.random.normal(lengths, (M, H), jnp.float32), axis=-1, keepdims=True)
    return rows.reshape(-1, H)[:M] * norms
