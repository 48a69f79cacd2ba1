"""How large tiles are, where the caller does not say."""

from attention.chunked.tiles import Tiles

# `python -m experiments.benchmark tiles --lengths 4096` on a CPU with 1 MiB of second-level cache a core: forward,
# 512 x 512 is within 15% of the fastest of the nine sizes from 256 to 1024; forward and backward with one size for
# both, 512 x 256 is the fastest or within 2% of it, and 512 x 512 up to 1.3 times slower. Not measured on accelerators.
ROWS = 512  # rows of a tile, of all query heads that share the key head
AREA = 512 * 512  # logits in a tile of the forward pass: 1 MiB in float32
DERIVATIVE_AREA = 512 * 256  # logits in a tile of the derivative, which holds twice as many arrays of that size
ALIGNMENT = 16  # the longest vector unit in float32


def chosen(
    T: int, S: int, G: int, query_chunk: int | None, key_chunk: int | None, area: int = AREA
) -> tuple[Tiles, Tiles]:
    """The tiles of queries and of keys: what was asked for, or ROWS rows and `area` logits in even tiles.

    Tiles of few queries are long in the keys: one query reads AREA keys at a time.
    """
    rows = min(T, query_chunk) if query_chunk else even(T, max(1, ROWS // G))
    cols = min(S, key_chunk) if key_chunk else even(S, area // min(ROWS, rows * G))
    return Tiles(T, rows), Tiles(S, cols)


def even(length: int, size: int) -> int:
    """The size of as many tiles as `size` needs, which overlap by less than ALIGNMENT each."""
    count = -(-length // size)
    even_size = -(-length // count)
    return min(length, -(-even_size // ALIGNMENT) * ALIGNMENT) if count > 1 else length
