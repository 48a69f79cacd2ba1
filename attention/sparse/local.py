"""Softmax attention within blocks of the sequence, and to the blocks before."""

import dataclasses

from attention.masks import Mask
from attention.method import check_positive
from attention.sparse.band import UNBOUNDED, Banded, Reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalChunked(Banded):
    r"""Softmax over the keys of the query's own block of `chunk` positions, and of the `previous` blocks before it.

        o_i = sum_{j in A_i} e^{l_ij} v_j / sum_{j in A_i} e^{l_ij},
        A_i = {j visible : i // C - previous <= j // C <= i // C}

    With segments, blocks are counted from where the run of equal ids that holds the query's position begins. A query
    whose blocks hold no visible key has output 0.

    Attributes:
        chunk: positions in a block, C.
        previous: blocks before its own that a query reads too.

    Cost: 2 T (previous + 1) C (H + E) operations a head, twice the reading where segments or an offset move blocks
    against tiles; O((T + S) (H + E) + G (previous + 1) C^2) memory.
    Error bound: as `SlidingWindow`.

    Raises:
        ValueError: the chunk is no integer of at least 1, or previous below 0.

    References:
        Child et al., "Generating long sequences with sparse transformers", arXiv 1904.10509, section 4 (blocks).
        Qiu et al., "Blockwise self-attention for long document understanding", arXiv 1911.02972, section 3.
    """

    chunk: int = 256
    previous: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "chunk")
        if self.previous != 0:
            check_positive(self, "previous")

    @classmethod
    def examples(cls) -> "tuple[LocalChunked, ...]":
        return (cls(chunk=4),)

    def ladder(self, length: int) -> "tuple[LocalChunked, ...]":
        return tuple(dataclasses.replace(self, chunk=max(1, length // share)) for share in (16, 4, 2, 1))

    def exact_limit(self, length: int) -> "LocalChunked":
        del length  # of the keys; a query may stand further from them
        return dataclasses.replace(self, chunk=UNBOUNDED, previous=0)

    def tile_size(self) -> int:
        return self.chunk

    def reach(self, mask: Mask) -> Reach:
        before, after = self.previous * self.chunk, 0
        if mask.offset is not None or mask.key_segments is not None or mask.num_queries % self.chunk:
            before, after = before + self.chunk - 1, 0 if mask.causal else self.chunk - 1
        return Reach(before, after)

    def ranges(self, position, start):
        own = start + (position - start) // self.chunk * self.chunk
        return own - self.previous * self.chunk, own + self.chunk - 1
