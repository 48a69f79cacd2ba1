"""Softmax attention over a sliding window and the sink tokens before it."""

import dataclasses

from attention.masks import Mask
from attention.method import check_positive
from attention.sparse.band import UNBOUNDED, Banded, Reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindow(Banded):
    r"""Softmax over the keys less than `window` positions away, and over the first `sinks` keys of the segment.

        o_i = sum_{j in A_i} e^{l_ij} v_j / sum_{j in A_i} e^{l_ij},
        A_i = {j visible : |i - j| < window or j < sinks}

    Where attention is causal, the window is the last `window` keys, the query's own among them. A tile of queries
    reads one slice of keys, and the sinks. With segments, sinks are counted from where the run of equal ids that
    holds the query's position begins. A query for which neither holds a visible key has output 0.

    Attributes:
        window: how far a query reads.
        sinks: keys at the beginning that every query reads.
        query_chunk: queries worked on at once.

    Cost: 2 T (query_chunk + window + sinks) (H + E) operations a head (2 window where not causal);
    O((T + S) (H + E) + query_chunk G (query_chunk + window)) memory. A step of decoding reads window + sinks keys.
    Error bound: tau diam(V), with tau bounded by the boxes around the pages of keys that are not read
    (`attention.sparse.odds.odds_certificate`): vacuous where keys vary as much as they do in themselves.

    Raises:
        ValueError: the window or the chunk is no integer of at least 1, or sinks below 0.

    References:
        Beltagy et al., "Longformer", arXiv 2004.05150, section 3.1.
        Xiao et al., "Efficient streaming language models with attention sinks", arXiv 2309.17453, section 3.2.
    """

    window: int = 256
    sinks: int = 4
    query_chunk: int = 256

    def __post_init__(self) -> None:
        check_positive(self, "window", "query_chunk")
        if self.sinks != 0:
            check_positive(self, "sinks")

    @classmethod
    def examples(cls) -> "tuple[SlidingWindow, ...]":
        return (cls(window=3, sinks=2, query_chunk=5),)

    def ladder(self, length: int) -> "tuple[SlidingWindow, ...]":
        return tuple(dataclasses.replace(self, window=max(1, length // share)) for share in (16, 4, 2, 1))

    def exact_limit(self, length: int) -> "SlidingWindow":
        del length  # of the keys; a query may stand further from them
        return dataclasses.replace(self, window=UNBOUNDED)

    def tile_size(self) -> int:
        return self.query_chunk

    def reach(self, mask: Mask) -> Reach:
        return Reach(self.window - 1, 0 if mask.causal else self.window - 1)

    def ranges(self, position, start):
        del start
        return position - (self.window - 1), position + (self.window - 1)

    def num_sinks(self) -> int:
        return self.sinks
