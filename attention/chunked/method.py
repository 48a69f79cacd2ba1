"""Exact attention in memory linear in the length."""

import dataclasses

from jaxtyping import Array, Float

from attention.cache import Cached
from attention.chunked.decode import is_few
from attention.chunked.derivative import attention
from attention.chunked.sizes import Tiling, chosen
from attention.chunked.spans import banded, irregular
from attention.exact import Exact, exact_certificate
from attention.inputs import Inputs, emptied
from attention.method import Certificate, Cost, check_positive
from attention.rounding import CALM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunked(Cached):
    """softmax(beta Q K^T + bias) V by online softmax over tiles, which no one ever sees all at once.

    For each tile of queries, tiles of keys are read in turn; with l the logits of a tile, (m, z, a) becomes

        m' = max(m, rowmax l),  z' = e^(m - m') z + rowsum e^(l - m'),  a' = e^(m - m') a + e^(l - m') V

    and the output is a / z. Where the logits of a row are known to be small, by the norms of its query and of the keys
    that it sees, m is that bound from the start, which saves the maximum. Tiles that causality, the window, lengths or
    packed segments rule out are not read, and only those on the edge of a band are masked. The G query heads of a key
    head share each tile of keys and values. A few queries over many keys, as in a decoding step, take one pass over
    the keys as they lie in memory.

    Attributes:
        query_chunk: queries in a tile; None for the rule of `attention.chunked.sizes`, made of measurements.
        key_chunk: keys in a tile; None for the same rule.

    Cost: 2 T S (H + E) operations a head forward, 5 T S (H + E) backward, those of tiles that nothing sees left
    out; O((T + S) (H + E)) memory, forward and backward, for derivatives of first order in either mode.
    Derivatives of second order keep O(T / query_chunk) copies of the keys.
    Error bound: `attention.rounding.rounding_bound` with one rescaling a key tile, or a fixed shift.

    Raises:
        ValueError: a chunk is not an integer of at least 1.

    References:
        Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867, section 3.
        Rabe and Staats, "Self-attention does not need O(n^2) memory", arXiv 2112.05682, section 2.
        Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1.
    """

    query_chunk: int | None = None
    key_chunk: int | None = None

    capabilities = Exact.capabilities

    def __post_init__(self) -> None:
        check_positive(self, "query_chunk", "key_chunk")

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self.attend_with_residual(inputs)[0]

    def attend_with_residual(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
        return attention(inputs, self._tiling(inputs))

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        # The exponents of the rescalings telescope: maxima only grow, so that |l - m_1| + |m_1 - m_2| + ... is
        # |l - max|, as without tiles. What is left is one exponential and one product a tile. A tile's sum and the
        # running sum together are one order of summation of the visible keys; masked ones add exact zeros.
        keys = self._tiling(inputs).keys
        depth = None if is_few(inputs) else keys.size + keys.count
        bound = exact_certificate(inputs, rescalings=keys.count, depth=depth, fixed_shift=CALM)
        return self.attend(inputs), bound

    def attend_cached(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self.attend(inputs if is_few(inputs) else emptied(inputs))

    def _tiling(self, inputs: Inputs) -> Tiling:
        B, K, G, T, _ = inputs.query.shape
        skips = banded(inputs.mask) or irregular(inputs.mask)
        return self._chosen(B, K, G, T, inputs.mask.num_keys, skips=skips)

    def _chosen(self, *sizes: int, skips: bool) -> Tiling:
        return chosen(*sizes, skips=skips, query_chunk=self.query_chunk, key_chunk=self.key_chunk)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        _, _, queries, keys = self._chosen(1, num_heads, 1, T, S, skips=is_causal)
        ends = [min((i + 1) * queries.size, S) if is_causal else S for i in range(queries.count)]
        read = sum(-(-end // keys.size) * keys.size for end in ends)  # keys, once for each tile of queries
        return Cost(4.0 * num_heads * queries.size * read * head_dim, 4.0 * num_heads * (2 * T + 2 * read) * head_dim)
