"""Attention within a tolerance: pages of keys are read, or replaced by their means where that is provably enough."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.cache import mask_of_tokens
from attention.exact import Exact
from attention.inputs import Inputs, emptied, prepare_tokens, ungrouped
from attention.method import Certificate, Cost, Method, check_positive, compiled
from attention.rounding import CALM, sees_any
from attention.sparse import far, order
from attention.sparse.bounds import REACH
from attention.sparse.certified_step import step
from attention.sparse.moments import moments
from attention.sparse.plan import Limits, growing_means, limits, plan, visible_pages
from attention.sparse.reading import Head, block, definition, online, padded
from attention.sparse.summaries import SummarisedCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certified(Method):
    r"""Softmax attention with an error of at most tolerance * diam(V), and no more reading than a bound asks for.

    Keys lie in pages of n. Each row replaces the pages A, of those that it sees whole, by their mean keys and values

        o = N / Z,    N = sum_{p in A} n e^{q.c_p} m_p + sum_{j read} e^{q.k_j} v_j,
                      Z = sum_{p in A} n e^{q.c_p}     + sum_{j read} e^{q.k_j},

    and A is chosen before a key is read, from moments of the pages: the largest set, by falling thresholds, whose
    certified error stays within the tolerance. A page far below the others is thereby dropped: its mean weighs
    nothing. Pages that are seen in part, and all pages under a bias, a soft cap or a dense mask, are read. A row's
    pages depend on what it sees alone.

    Where all queries of a head see the same keys, more than about twice (H + 2 choose 2) of them, and the logits are
    small, the head takes them all at once: their moments up to the second for e^{q.k}, and every key for the few rows
    whose bound is above the tolerance (`attention.sparse.far`). The rows of a head decide on that together. Where there
    are at least 2,048 of each, in clusters and in no order, queries and keys are sorted into coherent tiles and pages
    (`attention.sparse.order`).

    Gradients flow through what is read and through the means and moments; which these are is piecewise constant.

    In decoding, the state keeps the moments of whole pages, made as a page fills, and the largest norms. A step of one
    token plans from these and copies the pages that it reads, and no others; it has derivatives in forward mode alone.

    Attributes:
        tolerance: of the error, in units of the distance of the two values farthest apart; 0 reads everything.
        page: keys of a page, n.
        query_chunk: rows of a tile, over all heads that share their keys. A tile reads what any of its rows wants.
        bound: of a page's logits: `ball`, `box` or `sketch` (`attention.sparse.bounds`).

    Cost: with P = S / page, 2 T P H operations and about 40 T P more for the plan, 2 S H (H + E) for the moments, and
    2 (H + E) for each query and key of the blocks of at least 512 keys that a tile reads, at most all of them. Memory
    O((T + S) (H + E) + query_chunk S / page) forward. By moments of all keys, (H + 1) (H + 2) (E + 1) operations for
    each query and key. Derivatives cost those of softmax over all keys, query_chunk S numbers at once. A step of
    decoding: 2 P H operations and about 40 P a head, what it reads, and 2 page H (H + E) where it fills a page.
    Error bound: that of `attention.sparse.plan`, or of `attention.sparse.far`, at most tolerance * diam(V) where
    rounding leaves room for it, and rounding. The certificate has what was reached.

    Raises:
        ValueError: the tolerance is negative or not finite, a size is no integer of at least 1, or the bound unknown.

    References:
        Barnes and Hut, "A hierarchical O(N log N) force-calculation algorithm", Nature 324 (1986).
        Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774, 3.2.
    """

    tolerance: float = 0.01
    page: int = 128
    query_chunk: int = 512
    bound: str = "ball"

    capabilities = dataclasses.replace(Exact.capabilities, exact=False, residual=False)

    def __post_init__(self) -> None:
        check_positive(self, "page", "query_chunk")
        if not (isinstance(self.tolerance, float | int) and 0 <= self.tolerance < math.inf):
            raise ValueError(f"Certified.tolerance is {self.tolerance!r}: expected a finite number of at least 0")
        if self.bound not in REACH:
            raise ValueError(f"Certified.bound is {self.bound!r}: expected one of {', '.join(REACH)}")

    @classmethod
    def examples(cls) -> "tuple[Certified, ...]":
        # Pages of 8: of 13 keys one is seen whole, and of the 7 of a packed segment none.
        return (cls(tolerance=0.3, page=8, query_chunk=10),)

    def ladder(self, length: int) -> "tuple[Certified, ...]":
        return tuple(dataclasses.replace(self, tolerance=tolerance) for tolerance in (1.0, 0.3, 0.0))

    def exact_limit(self, length: int) -> "Certified":
        return dataclasses.replace(self, tolerance=0.0)

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self._found(inputs)[0]

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        output, bound, mass, work = self._found(inputs)
        seen = jnp.broadcast_to(sees_any(inputs.mask), bound.shape)
        bound, mass = (jnp.where(seen, x, 0) for x in (bound, mass))
        return output, Certificate(error_bound=bound, dropped_mass=mass, work=work, kind="deterministic")

    def init_state(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: Any,
        *,
        num_heads: int | None = None,
    ) -> SummarisedCache:
        del num_heads
        return SummarisedCache.empty(batch, num_kv_heads, head_dim, max_length, self.page, self.bound, dtype)

    def extend(self, state: SummarisedCache, query, key, value, **options: Any) -> tuple[SummarisedCache, Array]:
        new = prepare_tokens(self, query, key, value, **options)
        longer = state.append(new.key, new.value, self.bound)
        mask = mask_of_tokens(new.mask, state.length, longer.length, longer.max_length)
        output = compiled((dataclasses.replace(new, mask=mask), longer), method=self, hook="attend_state")
        return longer, ungrouped(output, query).astype(query.dtype)

    def attend_state(self, operands: tuple[Inputs, SummarisedCache]) -> Float[Array, "B K G T E"]:
        """The output over a decoding state: of one query from the moments that it keeps, of more from its keys."""
        inputs, state = operands
        if inputs.mask.num_queries == 1:
            query, mask, cap = inputs.query[:, :, :, 0], inputs.mask, inputs.soft_cap
            return step(query, state, mask, cap, tolerance=self.tolerance, bound=self.bound)[:, :, :, None]
        key, value = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (state.key, state.value))
        return self.attend(emptied(dataclasses.replace(inputs, key=key, value=value)))

    def _found(self, inputs: Inputs):
        """Output, error bound, dropped mass and work."""
        operands = {name: getattr(inputs, name) for name in _OPERANDS if getattr(inputs, name) is not None}
        arrays, form = jax.tree.flatten((inputs.mask, inputs.beta))
        return _attention(operands, arrays, form, self)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """As if everything were read: what is depends on the operands."""
        pages, share = -(-S // self.page), 0.5 if is_causal else 1.0
        read = 4.0 * share * T * S * head_dim
        planned = T * pages * (2.0 * head_dim + 40.0) + 4.0 * S * head_dim**2
        tiles = -(-T // self.query_chunk)
        numbers = 2.0 * T * head_dim + 2.0 * S * head_dim * (1 + share * tiles) + 2.0 * T * pages
        return Cost(num_heads * (read + planned), 4.0 * num_heads * numbers)


_OPERANDS = ("query", "key", "value", "bias", "soft_cap")


# The mask travels as bare arrays, because its tangents are no mask; and beta, which the query carries, moves nothing.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _attention(operands, arrays, form, method: Certified):
    """The online form, which loops as long as there is something to read, and so has no derivative of its own."""
    inputs = _inputs(operands, arrays, form)
    return _by_tiles(inputs, method, _tile_online)


@_attention.defjvp
def _attention_jvp(form, method: Certified, primals, tangents):
    operands, arrays = primals
    results = _attention(operands, arrays, form, method)

    def defined(operands):
        return _by_tiles(_inputs(operands, arrays, form), method, _tile_by_definition)[0]

    _, tangent = jax.jvp(defined, (operands,), (tangents[0],))
    return results, (tangent, *(jnp.zeros_like(x) for x in results[1:]))


def _inputs(operands, arrays, form) -> Inputs:
    mask, beta = jax.tree.unflatten(form, arrays)
    return Inputs(mask=mask, beta=beta, **operands)


def _by_tiles(inputs: Inputs, method: Certified, tile):
    """`tile` over the tiles of each key head: output, error bound, dropped mass and the share of blocks read."""
    (B, K, G, T, _), dtype = inputs.query.shape, inputs.query.dtype
    rows = min(T, max(1, method.query_chunk // G))
    cols = block(inputs.mask.num_keys, method.page)
    inputs = padded(inputs, rows, cols)
    tiles, blocks = inputs.mask.num_queries // rows, inputs.mask.num_keys // cols
    bounds = lax.stop_gradient(limits(inputs, method.page, rescalings=blocks + 1, fixed_shift=CALM))

    def head(n):
        b, k = n // K, n % K
        part, own = inputs.part(b, 1, k, 1), Limits(*(x[b, k] for x in bounds))
        back = _same
        if method.tolerance and order.pays(inputs, method.page):
            part, own, back = order.ordered(part, own, method.page)
        key, value = (x[0, 0].astype(dtype) for x in (part.key, part.value))
        pages = moments(key, value, method.page, bound=method.bound)
        across = jnp.concatenate([value.T, jnp.ones((1, value.shape[0]), dtype)])
        one = Head(part, pages, growing_means(key, method.page), across)

        def by_pages():
            found = lax.map(jax.checkpoint(lambda i: tile(one, own, method, i * rows, rows)), jnp.arange(tiles))
            return jax.tree.map(_joined, found)

        if method.tolerance and far.pays(inputs):
            found = far.attended(one, own, by_pages, tolerance=method.tolerance, defined=tile is _tile_by_definition)
        else:
            found = by_pages()
        return *(back(x) for x in found[:3]), *found[3:]

    output, error, mass, read, seen = lax.map(head, jnp.arange(B * K))
    output, error, mass = (x.reshape(B, K, G, -1, *x.shape[3:])[:, :, :, :T] for x in (output, error, mass))
    return output, error, mass, read.sum() / jnp.maximum(seen.sum(), 1)


def _same(x):
    return x


def _joined(x):
    """The rows of all tiles after one another: `G T ...` from `count G rows ...`; numbers of a tile stay."""
    return x if x.ndim < 3 else jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _planned(head: Head, own: Limits, method: Certified, row, rows: int):
    """What the queries of a tile see, their limits and their plan, none of which has a derivative."""
    part, pages, growing = lax.stop_gradient((head.part, head.pages, head.growing))
    own = Limits(*(lax.dynamic_slice_in_dim(x, row, rows, axis=1) for x in own))
    regular = part.mask.dense is None and part.bias is None and part.soft_cap is None
    visible = visible_pages(part.mask, growing, row, rows, method.page, regular=regular)
    query = lax.dynamic_slice_in_dim(part.query, row, rows, axis=3)[0, 0]
    options = {"size": method.page, "tolerance": method.tolerance, "reach": REACH[method.bound]}
    return visible, own, plan(query, pages, visible, own, **options)


def _tile_online(head: Head, own: Limits, method: Certified, row, rows: int):
    visible, own, chosen = _planned(head, own, method, row, rows)
    found = online(head, chosen, visible, own, row, rows)
    # The true sum of exponentials is no less than the sum found, but for rounding: a mean's part is a lower bound.
    relative = own.odds * jnp.exp(-found.residual)
    tail, mass = (jnp.where(x > 0, x * relative, 0) for x in (chosen.error, chosen.mass))
    bound = 1.001 * tail + own.rounding
    bound = jnp.where(jnp.isnan(bound), jnp.inf, bound)
    return found.output, bound, jnp.fmin(mass, 1), found.read, found.seen


def _tile_by_definition(head: Head, own: Limits, method: Certified, row, rows: int):
    _, own, chosen = _planned(head, own, method, row, rows)
    nothing = jnp.zeros_like(own.rounding)
    return definition(head, chosen, row, rows), nothing, nothing, jnp.zeros(()), jnp.zeros(())
