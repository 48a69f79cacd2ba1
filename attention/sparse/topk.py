"""Softmax attention over the keys with the largest logits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.cache import Cached
from attention.exact import Exact, softmax, weighted_values
from attention.inputs import Inputs
from attention.method import Certificate, Cost, check_positive
from attention.sparse.bounds import sparse_certificate, tail_share
from attention.sparse.threshold import kth_largest
from attention.tiles import Tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Cached):
    r"""Softmax over the k visible keys with the largest logits in each row; all that tie with the k-th are kept.

        o_i = sum_{j in A_i} e^{l_ij} v_j / sum_{j in A_i} e^{l_ij},    A_i = {j visible : l_ij >= k-th largest}

    Since ties are kept, the order of the keys does not matter, and equal logits give the mean over all visible
    keys. Gradients flow through the kept entries; which are kept is piecewise constant.

    Cost: 2 T S H operations for the scores, about 2 T S for each of up to 33 passes of the selection (65 in
    float64), and 2 T S E for the weighted values a head: the time is quadratic. One head and one chunk of
    queries is worked on at a time, so the memory is O((T + S) (H + E) + query_chunk G S), backward too.
    Error bound: tau diam(V) with the dropped mass tau computed exactly up to rounding, and rounding itself
    (`attention.sparse.bounds.sparse_certificate`).

    Attributes:
        k: keys kept in a row.
        query_chunk: queries worked on at once.

    References:
        Gupta et al., "Memory-efficient Transformers via Top-k Attention", arXiv 2106.06899, section 2.
    """

    k: int = 64
    query_chunk: int = 128

    capabilities = dataclasses.replace(Exact.capabilities, exact=False, residual=False, sees_all=False)

    def __post_init__(self) -> None:
        check_positive(self, "k", "query_chunk")

    @classmethod
    def examples(cls) -> "tuple[TopK, ...]":
        return (cls(k=4, query_chunk=5),)

    def ladder(self, length: int) -> "tuple[TopK, ...]":
        return tuple(dataclasses.replace(self, k=max(1, length // share)) for share in (16, 4, 2, 1))

    def exact_limit(self, length: int) -> "TopK":
        return dataclasses.replace(self, k=length)

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self._by_rows(inputs, lambda logits, threshold, value: weighted_values(_kept(logits, threshold), value))

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        def rows(logits, threshold, value):
            return weighted_values(_kept(logits, threshold), value), tail_share(logits, logits < threshold)

        output, tail = self._by_rows(inputs, rows)
        return output, sparse_certificate(inputs, tail, work=1.0)

    def _by_rows(self, inputs: Inputs, rows: Callable[[Array, Array, Array], Any]) -> Any:
        """`rows(logits, threshold, value)` for one head and one chunk of queries after another, as `B K G T ...`.

        The backward pass computes logits and thresholds anew: a policy that keeps the thresholds makes `jax.checkpoint`
        keep a causal mask of T S entries as well.
        """
        (B, K), T, S = inputs.query.shape[:2], inputs.mask.num_queries, inputs.mask.num_keys
        C = min(self.query_chunk, T)

        def head(index):
            own = inputs.part(index // K, 1, index % K, 1)

            def chunk(row):
                logits = own.masked_scores(row, C, 0, S)
                return rows(logits, kth_largest(logits, self.k), own.value)

            chunks = lax.map(jax.checkpoint(chunk), Tiles(T, C).starts)
            return jax.tree.map(lambda x: Tiles(T, C).join(x[:, 0, 0], 1), chunks)

        return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), lax.map(head, jnp.arange(B * K)))

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """The selection is counted at all its passes in float32; a tile of logits passes through memory in each."""
        del is_causal  # the masked half is computed too
        passes = 33
        flops = num_heads * T * S * (4.0 * head_dim + 2.0 * passes)
        chunks = -(-T // min(self.query_chunk, T))
        operands = num_heads * head_dim * (2.0 * T + 2.0 * S * chunks)
        return Cost(flops, 4.0 * (operands + num_heads * T * S * (passes + 4.0)))


def _kept(logits: Float[Array, "*N S"], threshold: Float[Array, "*N 1"]) -> Float[Array, "*N S"]:
    """Softmax over the entries not below the threshold; NaN is kept, so that it cannot go unnoticed."""
    return softmax(jnp.where(logits < threshold, -jnp.inf, logits))
