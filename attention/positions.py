"""How a token knows where it is: rotary and sinusoidal positions, computed for any position on the fly."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BASE = 10_000.0


def frequencies(size: int, base: float = BASE, dtype=jnp.float32) -> Float[Array, " F"]:
    """Size / 2 angular frequencies, from 1 down towards 1 / base by equal ratios."""
    return base ** (-jnp.arange(0, size, 2, dtype=dtype) / size)


def rotated(x: Float[Array, "B T N H"], positions: Int[Array, " T"], base: float = BASE) -> Float[Array, "B T N H"]:
    """Rotates the pair (x_i, x_{i + H/2}) by position times frequency, so that q.k depends on distance alone.

    In float32 (float64 for float64 operands), returned in the dtype of `x`; H must be even.

    References:
        Su et al., "RoFormer", arXiv 2104.09864, section 3.2.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angles = positions[:, None].astype(dtype) * frequencies(x.shape[-1], base, dtype)[None, :]
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def sinusoids(positions: Int[Array, " T"], width: int) -> Float[Array, "T D"]:
    """Sin and cos of position times frequency, half the width each; the width must be even.

    References:
        Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.5.
    """
    angles = positions[:, None].astype(jnp.float32) * frequencies(width)[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
