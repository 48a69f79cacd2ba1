"""Attention within a tolerance: keys are read, in as many bits as it takes, or replaced by their means."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.cache import mask_of_tokens
from attention.exact import Exact
from attention.inputs import Inputs, emptied, prepare_tokens, ungrouped
from attention.method import Certificate, Cost, Method, check_positive, compiled
from attention.rounding import sees_any
from attention.sparse.bounds import REACH
from attention.sparse.by_pages import Options
from attention.sparse.certified_step import step
from attention.sparse.heads import attended
from attention.sparse.moments import Moments
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

    Where attention is causal, a tile reads the keys around its diagonal first, and its plan knows what they add up to.

    Where all queries of a head see the same keys, the head decides for all its rows, before it makes a moment. If there
    are many keys and the logits are small, it takes them all at once: polynomials of degree 1 or 2 for e^{q.k}, whose
    sums over the keys are moments, and every key for the rows whose bound is above the tolerance; which degree, if any,
    is decided by what each would take (`attention.sparse.far`). If there are at least 2,048 queries and keys, in
    clusters and in no order, they are sorted into coherent tiles and pages (`attention.sparse.order`). If a look at
    some rows finds nothing to leave out, every key is read (`attention.sparse.outlook`). Elsewhere each row decides by
    what it sees.

    What is read on a CPU is read by the kernel in C (`attention.sparse.kernel`), for operands of at most 32 bits
    without a bias, pages of a multiple of 8 keys and more than 8 queries; and by those rows in 16 bits for which that
    is provably enough, where the processor has products of 16-bit numbers (AVX-512 VNNI and BF16).

    Gradients flow through what is read and through the means and moments; which these are is piecewise constant.

    In decoding, the state keeps the moments of whole pages, made as a page fills, and the largest norms. A step of one
    token plans from these and reads the pages that it asks for, and no others.
    Several tokens take the moments that are kept and pass over all keys once for the largest norms.

    Attributes:
        tolerance: of the error, in units of the distance of the two values farthest apart; 0 reads everything.
        page: keys of a page, n.
        query_chunk: rows of a tile, over all heads that share their keys. Without the kernel a tile reads what any of
            its rows wants, but for a few rows that want much, which are read apart; with it 32 rows do.
        bound: of a page's logits: `ball`, `box` or `sketch` (`attention.sparse.bounds`).

    Cost: with P = S / page, 2 T P H operations and about 40 T P more for the plan, 2 S H (H + E) for the moments, and
    2 (H + E) for each query and key of the blocks of at least 256 keys that a tile reads, at most all of them. Memory
    O((T + S) (H + E) + query_chunk S / page) forward. By moments of all keys, 2 H (6 H + E) operations for each query
    and key, and H (H + 1) E more by polynomials of degree 2. Derivatives cost those of softmax over all keys,
    query_chunk S numbers at once. A step of decoding: 2 P H operations and about 40 P a head, what it reads, and
    2 page H (H + E) where it fills a page.
    Error bound: that of `attention.sparse.plan`, or of `attention.sparse.far`, with that of `attention.sparse.kernel`
    for rows in 16 bits: at most tolerance * diam(V) where rounding in float32 leaves room for it, and that rounding.
    The certificate has what was reached.

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

    capabilities = dataclasses.replace(Exact.capabilities, exact=False, residual=False, coarse=True)

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

    @property
    def options(self) -> Options:
        """How a key head is attended to."""
        return Options(self.page, self.query_chunk, float(self.tolerance), self.bound)

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self._found(inputs)[0]

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        output, bound, mass, work = self._found(inputs)
        seen = jnp.broadcast_to(sees_any(inputs.mask), bound.shape)
        bound, mass = (jnp.where(seen, x, 0) for x in (bound, mass))
        return output, Certificate(error_bound=bound, dropped_mass=mass, work=work, kind="deterministic")

    def init_state(self, batch, num_kv_heads, head_dim, max_length, dtype, *, num_heads=None) -> SummarisedCache:
        del num_heads
        return SummarisedCache.empty(batch, num_kv_heads, head_dim, max_length, self.page, self.bound, dtype)

    def extend(self, state: SummarisedCache, query, key, value, **options: Any) -> tuple[SummarisedCache, Array]:
        new = prepare_tokens(self, query, key, value, **options)
        longer = state.append(new.key, new.value, self.bound)
        mask = mask_of_tokens(new.mask, state.length, longer.length, longer.max_length)
        output = compiled((dataclasses.replace(new, mask=mask), longer), method=self, hook="attend_state")
        return longer, ungrouped(output, query).astype(query.dtype)

    def attend_state(self, operands: tuple[Inputs, SummarisedCache]) -> Float[Array, "B K G T E"]:
        """The output over a decoding state, from the moments that it keeps: of one query, or of several as tiles."""
        inputs, state = operands
        if inputs.mask.num_queries == 1:
            query, mask, cap = inputs.query[:, :, :, 0], inputs.mask, inputs.soft_cap
            return step(query, state, mask, cap, tolerance=self.tolerance, bound=self.bound)[:, :, :, None]
        key, value = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (state.key, state.value))
        return self._found(emptied(dataclasses.replace(inputs, key=key, value=value)), state.pages)[0]

    def _found(self, inputs: Inputs, pages: Moments | None = None):
        """Output, error bound, dropped mass and work, from the moments of the pages that rows see whole, or none."""
        operands = {name: getattr(inputs, name) for name in _OPERANDS if getattr(inputs, name) is not None}
        operands |= {} if pages is None else {"pages": pages}
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
    found = attended(_inputs(operands, arrays, form), method.options, operands.get("pages"), defined=False)
    return *found[:3], found.read / jnp.maximum(found.seen, 1)


@_attention.defjvp
def _attention_jvp(form, method: Certified, primals, tangents):
    operands, arrays = primals
    results = _attention(operands, arrays, form, method)

    def defined(operands):
        return attended(_inputs(operands, arrays, form), method.options, operands.get("pages"), defined=True).output

    _, tangent = jax.jvp(defined, (operands,), (tangents[0],))
    return results, (tangent, *(jnp.zeros_like(x) for x in results[1:]))


def _inputs(operands, arrays, form) -> Inputs:
    mask, beta = jax.tree.unflatten(form, arrays)
    return Inputs(mask=mask, beta=beta, **{name: x for name, x in operands.items() if name in _OPERANDS})
