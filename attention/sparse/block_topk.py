"""Softmax attention over the pages of keys whose bounds are the largest, with a window and sinks beside them."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.exact import Exact
from attention.inputs import Inputs
from attention.method import Certificate, Cost, check_positive
from attention.rounding import calm_limit
from attention.sparse import kernel
from attention.sparse.chosen import chosen_tiles
from attention.sparse.odds import odds_certificate
from attention.sparse.packed import packed_tiles
from attention.sparse.paged_method import Paged
from attention.sparse.pages import PagedCache, Pages, paged
from attention.sparse.selection import Selection
from attention.sparse.step import step
from attention.sparse.visible import mask_of_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTopK(Paged):
    r"""Softmax over `blocks` pages of keys that a tile of queries chooses, and over those of a window and of sinks.

        o_i = sum_{j in A_i} e^{l_ij} v_j / sum_{j in A_i} e^{l_ij},    A_i = visible keys of the pages of i's tile

    A page is `block_size` keys. Its bound on the logits of a query is that of the box around them. Where attention is
    causal, the first query of a tile chooses the pages with the largest bounds, among those that lie before it; the
    pages from there to the end of the tile, and those of `window` keys before it, are always read. Otherwise all
    queries of the tile choose together: with p_ip the softmax of the bounds over the pages, the pages with the largest
    sum_i p_ip. An output then depends on the queries that share its tile. Tiles count from position 0. Each query head
    has its own choice, or the query heads of a key head choose together, by the same sum over all their queries that
    choose. Only the pages that were chosen are read. Gradients flow through their entries; which
    they are is piecewise constant.

    Where sequences are packed, tiles and pages count from the first token of each segment, whose output is what it is
    alone; tokens of one id may lie in several runs (`attention.sparse.packed`).

    On a CPU the kernel in C reads the pages (`attention.sparse.kernel`), for operands of at most 32 bits, pages of a
    multiple of 8 keys, unpacked sequences and more than 8 queries; derivatives are those of tiles in JAX.

    In decoding, boxes are kept up to date in the state, and so is the choice of the tile at hand.

    Attributes:
        blocks: pages that a tile chooses.
        block_size: keys of a page, C.
        query_block: queries of a tile; 1 lets every query choose for itself, which costs most.
        window: keys before the first query of a tile (and, where not causal, after its last) whose pages are read;
            0 without causality for none.
        sinks: keys at the beginning whose pages are read.
        shared: whether the query heads that share a key head read the same pages.

    Cost: 2 T n C (H + E) operations a head with n pages a tile, 4 S / C H for each query that chooses;
    O((T + S) (H + E) + query_block n C) memory. With segments a tile more for each, and a sort; under vmap every query
    counts as a tile.
    Error bound: tau diam(V), tau <= U / (Z + U) with Z the kept sum and U = sum C e^{bound} over the pages that were
    not read (`attention.sparse.odds.odds_certificate`): often vacuous, since a box is loose.

    Raises:
        ValueError: a number of blocks or a size is no integer of at least 1, a window or sinks below 0, or `shared` no
            bool.

    References:
        Tang et al., "Quest", arXiv 2406.10774, section 3.2; Yuan et al., "Native sparse attention", arXiv 2502.11089,
        section 3.3; Zaheer et al., "Big Bird", arXiv 2007.14062, section 2 (window, sinks and chosen blocks).
    """

    blocks: int = 16
    block_size: int = 64
    query_block: int = 128
    window: int = 0
    sinks: int = 0
    shared: bool = False

    capabilities = dataclasses.replace(Exact.capabilities, exact=False, residual=False, sees_all=False, bias=False)

    def __post_init__(self) -> None:
        check_positive(self, "blocks", "block_size", "query_block")
        for name in ("window", "sinks"):
            if getattr(self, name) != 0:
                check_positive(self, name)
        if not isinstance(self.shared, bool):
            raise ValueError(f"BlockTopK.shared is {self.shared!r}: expected True or False")
        if self.shared:
            own = dataclasses.replace(type(self).capabilities, group_independent=False)
            object.__setattr__(self, "capabilities", own)

    @classmethod
    def examples(cls) -> "tuple[BlockTopK, ...]":
        # Pages that one kernel takes, and pages that none does.
        return (
            cls(blocks=1, block_size=3, query_block=7, window=2, sinks=1),
            cls(blocks=1, block_size=8, query_block=7, sinks=1, shared=True),
        )

    def ladder(self, length: int) -> "tuple[BlockTopK, ...]":
        pages = -(-length // self.block_size)
        return tuple(dataclasses.replace(self, blocks=max(1, pages // share)) for share in (8, 4, 2, 1))

    def exact_limit(self, length: int) -> "BlockTopK":
        return dataclasses.replace(self, blocks=-(-length // self.block_size))

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self._over_heads(inputs, self._pages(inputs), certified=False)[0]

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        output, odds, read, _ = self._over_heads(inputs, self._pages(inputs), certified=True)
        rescalings = (
            kernel.rescalings(inputs.mask.num_keys, self.block_size) if kernel.able(inputs, self.block_size) else 0
        )
        return output, odds_certificate(inputs, odds, read.mean(), rescalings=rescalings)

    def init_state(self, batch, num_kv_heads, head_dim, max_length, dtype, *, num_heads=None) -> PagedCache:
        groups = (num_heads or num_kv_heads) // num_kv_heads
        sizes = batch, num_kv_heads, groups, head_dim, max_length, self.block_size, self.blocks
        return PagedCache.empty(*sizes, dtype)

    def attend_pages(self, operands: tuple[Inputs, PagedCache]) -> tuple[Array, Array]:
        """The output over the pages of a decoding state, and the choice of the tile at hand."""
        inputs, state = operands
        begun = jnp.broadcast_to(state.chosen, (*inputs.query.shape[:3], state.chosen.shape[3]))
        if inputs.mask.num_queries == 1:
            query = inputs.query[:, :, :, 0]
            output, chosen = step(self._rule(), query, state, inputs.mask, begun, inputs.soft_cap)
            return output[:, :, :, None], chosen
        output, _, _, chosen = self._over_heads(inputs, state.pages, certified=False, begun=begun)
        return output, chosen

    def _pages(self, inputs: Inputs) -> Pages:
        return paged(inputs.key, inputs.value, self.block_size, inputs.mask.key_lengths)

    def _over_heads(self, inputs: Inputs, pages: Pages, *, certified: bool, begun=None):
        """Output, odds of what was not read, share of pages read and last choice, of those who choose after another."""
        (B, K, G), cap = inputs.query.shape[:3], inputs.soft_cap
        limit = calm_limit(inputs) if begun is None else None  # of a cache it would read every key
        each = G if self.shared else 1

        def heads(n):
            b, k, g = n // (K * G // each), n // (G // each) % K, n % (G // each) * each
            mask = mask_of_heads(inputs.mask, b, k, g, each)
            query, bound = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x[b, k], g, each), (inputs.query, limit))
            if mask.query_segments is not None:
                operands = query, inputs.key[b, k], inputs.value[b, k]
                return *packed_tiles(self._rule(), *operands, mask, bound, cap, certified=certified), None
            own = Pages(*(lax.dynamic_index_in_dim(_row(x, b), k, keepdims=False) for x in pages))
            key, value = (x.reshape(1, 1, -1, x.shape[-1])[:, :, : mask.num_keys] for x in own[:2])
            one = jnp.ones((), query.dtype)  # beta, which the query has
            part = Inputs(query=query[None, None], key=key, value=value, mask=mask, beta=one, soft_cap=cap)
            chosen = None if begun is None else begun[b, k, g]
            return chosen_tiles(self._rule(), part, own, chosen, bound, certified=certified)

        output, odds, share, chosen = lax.map(heads, jnp.arange(B * K * G // each))
        output, odds = jax.tree.map(lambda x: x.reshape(B, K, G, *x.shape[2:]), (output, odds))
        if chosen is not None:
            chosen = jnp.repeat(chosen.reshape(B, K, G // each, -1), each, axis=2)
        return output, odds, share, chosen

    def _rule(self) -> Selection:
        return Selection(self.blocks, self.block_size, self.query_block, self.window, self.sinks, self.shared)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """Every tile is counted with as many pages as it can read."""
        C, R = self.block_size, min(self.query_block, T)
        pages = -(-S // C)
        read, tiles = min(pages, self._rule().slots(pages, causal=is_causal)), -(-T // R)
        choosers = tiles if is_causal else T
        flops = 4.0 * num_heads * head_dim * (T * read * C + choosers * pages)
        return Cost(flops, 4.0 * num_heads * head_dim * (2 * T + 4 * S + 2 * tiles * read * C))


def _row(x: Array, b) -> Array:
    return lax.dynamic_index_in_dim(x, b, keepdims=False)
