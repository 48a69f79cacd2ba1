"""How large tiles are, where the caller does not say."""

from typing import Any, NamedTuple

from jax import lax
from jaxtyping import Array, Float

from attention.tiles import Tiles, divisor

# Measured by `python -m experiments.benchmark tiles`, and for several heads a tile by hand, on a CPU of 2 cores. A
# matrix product of no more than 2**22 multiplications runs on one thread, and a tile passes through the caches that
# threads share. A band leaves out fewer tiles the longer they are. Not measured on accelerators.
COLUMNS = 512  # keys of a tile
ROWS, AREA = 1024, 2**19  # rows of a key head in a tile, and logits of a tile: 2 MiB in float32
BANDED_ROWS, BANDED_AREA = 256, 2**20  # the same where the mask may leave tiles out: fewer rows of more heads
ALIGNMENT = 16  # the longest vector unit in float32


class Tiling(NamedTuple):
    """How each axis of the problem is cut. A tile holds a group of heads, and the loops over groups are outermost."""

    batch: Tiles
    heads: Tiles
    queries: Tiles
    keys: Tiles

    @property
    def groups(self) -> int:
        return self.batch.count * self.heads.count

    def corner(self, n) -> tuple[Any, Any]:
        """The first batch element and the first key head of group n."""
        return self.batch.start(n // self.heads.count), self.heads.start(n % self.heads.count)

    def heads_of(self, x: Float[Array, "B K *N"], corner: tuple[Any, Any]) -> Float[Array, "b k *N"]:
        """What belongs to the group at a corner."""
        sizes = (self.batch.size, self.heads.size, *x.shape[2:])
        return lax.dynamic_slice(x, (*corner, *(0,) * (x.ndim - 2)), sizes)


def chosen(
    B: int, K: int, G: int, T: int, S: int, *, skips: bool, query_chunk: int | None = None, key_chunk: int | None = None
) -> Tiling:
    """The tiles that were asked for, or by default even ones of about AREA logits.

    ROWS rows by COLUMNS keys, of as many key heads and then batch elements as divide their axes. What is left of AREA
    goes to the keys, or to the rows where the mask may leave tiles out (`skips`, with BANDED_ROWS and BANDED_AREA).
    """
    most, area = (BANDED_ROWS, BANDED_AREA) if skips else (ROWS, AREA)
    rows = min(T, query_chunk) if query_chunk else even(T, max(1, most // G))
    cols = min(S, key_chunk) if key_chunk else even(S, COLUMNS)
    heads = divisor(K, area // (G * rows * cols))
    batch = divisor(B, area // (G * rows * cols * heads)) if heads == K else 1
    spare = max(1, area // (G * rows * cols * heads * batch))
    if skips and not query_chunk:
        rows = even(T, max(rows, min(spare * rows, ROWS // G)))
    elif not skips and not key_chunk:
        cols = even(S, spare * cols)
    return Tiling(Tiles(B, batch), Tiles(K, heads), Tiles(T, rows), Tiles(S, cols))


def even(length: int, size: int) -> int:
    """The size of as many tiles as `size` needs, which overlap by less than ALIGNMENT each."""
    count = -(-length // size)
    even_size = -(-length // count)
    return min(length, -(-even_size // ALIGNMENT) * ALIGNMENT) if count > 1 else length
