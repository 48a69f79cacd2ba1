"""Cutting an axis into tiles of one size."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """An axis of `length` cut into tiles of `size`; where the last would stand over, it is moved back.

    Tile i owns the indices [i * size, min((i + 1) * size, length)). The last one reads up to size - 1 more, which
    the tile before it owns. Nothing is padded, and all tiles have one shape.
    """

    length: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    @property
    def overlap(self) -> int:
        """How many indices the last tile shares with the one before."""
        return self.count * self.size - self.length

    def start(self, i) -> Int[Array, ""] | int:
        """The first index that tile i reads."""
        if isinstance(i, int):
            return min(i * self.size, self.length - self.size)
        return jnp.minimum(i * self.size, self.length - self.size)

    @property
    def starts(self) -> Int[Array, " count"]:
        """The first index that each tile reads."""
        return jnp.minimum(jnp.arange(0, self.length, self.size), self.length - self.size)

    def owned(self, i) -> Bool[Array, " size"]:
        """Which of the indices that tile i reads are its own."""
        return self.start(i) + jnp.arange(self.size) >= i * self.size

    def split(self, x: Array, axis: int) -> Array:
        """The tiles of an array, stacked in front; it is copied only if there is an overlap."""
        whole = self.length // self.size
        shape = (*x.shape[:axis], whole, self.size, *x.shape[axis + 1 :])
        tiles = jnp.moveaxis(lax.slice_in_dim(x, 0, whole * self.size, axis=axis).reshape(shape), axis, 0)
        if not self.overlap:
            return tiles
        last = lax.slice_in_dim(x, self.length - self.size, self.length, axis=axis)
        return jnp.concatenate([tiles, last[None]])

    def join(self, tiles: Array, axis: int) -> Array:
        """The array whose tiles are stacked in front, each contributing what it owns."""
        whole = self.length // self.size
        joined = jnp.moveaxis(tiles[:whole], 0, axis)
        joined = joined.reshape(*joined.shape[:axis], whole * self.size, *joined.shape[axis + 2 :])
        if not self.overlap:
            return joined
        return jnp.concatenate([joined, lax.slice_in_dim(tiles[-1], self.overlap, self.size, axis=axis)], axis=axis)


def divisor(length: int, most: int) -> int:
    """The largest divisor of a length that is no more than another number, and at least 1."""
    return max(size for size in range(1, length + 1) if length % size == 0 and size <= max(1, most))
