"""Tokens cut into the chunks that a loop goes over."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from attention.linear.tokens import Keys


class Chunk(NamedTuple):
    """C tokens of a scan.

    Attributes:
        key, value: `B C K H` and `B C K E`, as callers have them, flattened: XLA would copy an operand whose axes of
            size 1 it had moved.
        position, visible, segment: as in `Keys`, `b C`.
        last, last_segment: position and segment of the token before the chunk.
    """

    key: Array
    value: Array
    position: Int[Array, "b C"]
    visible: Bool[Array, "b C"]
    segment: Int[Array, "b C"] | None
    last: Int[Array, " b"]
    last_segment: Int[Array, " b"] | None


def chunks(keys: Keys, C: int) -> Chunk:
    """The keys cut into chunks, which come first."""
    position, segment = split(keys.position, C, "edge"), None
    # Before the first chunk there is no token. Its place is taken by one of the first token's segment, just before it.
    last, last_segment = jnp.concatenate([position[:1, :, 0] - 1, position[:-1, :, -1]]), None
    if keys.segment is not None:
        segment = split(keys.segment, C, "edge")
        last_segment = jnp.concatenate([segment[:1, :, 0], segment[:-1, :, -1]])
    key, value = (flat(jnp.swapaxes(x, 1, 2), C) for x in (keys.key, keys.value))
    return Chunk(key, value, position, split(keys.visible, C), segment, last, last_segment)


def split(x: Array, C: int, mode: str = "constant") -> Array:
    """Axis 1 padded to a multiple of C, with zeros unless `mode` says otherwise, and cut into chunks in front."""
    count = -(-x.shape[1] // C)
    x = jnp.pad(x, [(0, count * C - n if a == 1 else 0) for a, n in enumerate(x.shape)], mode=mode)
    return jnp.moveaxis(x.reshape(x.shape[0], count, C, *x.shape[2:]), 1, 0)


def flat(x: Array, C: int) -> Array:
    """`split` with each chunk flattened."""
    cut = split(x, C)
    return cut.reshape(cut.shape[0], -1)


def joined(cut: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `flat`."""
    x = jnp.moveaxis(cut.reshape(len(cut), shape[0], -1, *shape[2:]), 0, 1)
    return lax.slice_in_dim(x.reshape(shape[0], -1, *shape[2:]), 0, shape[1], axis=1)
