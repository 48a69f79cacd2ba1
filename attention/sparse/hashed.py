"""Softmax attention over the keys that a random hash puts into the query's buckets."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attention.cache import mask_of_tokens
from attention.exact import Exact
from attention.inputs import Inputs, emptied, prepare_tokens, ungrouped
from attention.method import Certificate, Cost, Method, Params, check_positive, compiled
from attention.rounding import norms
from attention.sparse.bounds import sparse_certificate
from attention.sparse.bucket_rows import Rule, attended, dropped
from attention.sparse.buckets import HashedCache, Table, existing_codes, query_codes, table
from attention.sparse.visible import mask_of_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hashed(Method):
    r"""Softmax over the keys that share a bucket with the query in any of R rounds, and over those beside it.

        o_i = sum_{j in A_i} e^{l_ij} v_j / sum_{j in A_i} e^{l_ij},
        A_i = {j visible : |i - j| < window, or some round has j among the nearest keys in i's bucket}

    A key counts once, however many rounds find it. The bucket of x is the signs of b random projections (SimHash):
    x = (q, 0) for queries and x = (k, sqrt(M^2 - |k|^2)) for keys, so that all keys within the radius M have the
    length M, the angle between query and key falls as q.k grows, and P(same bucket) = (1 - angle / pi)^b orders keys by
    their logits. Keys beyond M are hashed by their direction. M is a constant of `params`, not the largest norm, which
    would let a later key change an earlier bucket. For the same reason a bucket is read outwards from the query's own
    position, its last `bucket` keys, and as many behind it where attention is not causal. Queries and keys need not be
    equal. Gradients flow through what is read; the hash has none.

    Attributes:
        rounds: R, hashes of b bits each.
        bits: b; 0 puts all keys into one bucket.
        bucket: keys read of a bucket, and as many again behind the query where attention is not causal.
        window: keys beside the query that it always reads, its own among them.
        query_chunk: rows worked on at once.

    Cost: with n = window + R bucket keys a row (twice that where not causal), 2 R b (H + 1) operations a token, R sorts
    of S numbers a query head, and 2 n (H + E) a row, whose keys are gathered by itself: linear in T. Memory
    O((T + S) (H + E + R) + query_chunk n (H + E)). A step of decoding compares R buckets with those of all keys and
    reads n of these. A certificate computes all logits: 2 T S (H + R) operations.
    Error bound: tau diam(V) with the dropped mass tau computed exactly up to rounding
    (`attention.sparse.bounds.sparse_certificate`); infinite in a row that reads nothing of what it sees, whose output
    is 0. No bound is known before attention is computed: a key of large logit may be missed in all rounds.

    Raises:
        ValueError: a number is out of range, or `params` are not those of this configuration.

    References:
        Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002, section 3 (SimHash).
        Neyshabur and Srebro, "On symmetric and asymmetric LSHs for inner product search", arXiv 1410.5518, section 4.
        Kitaev et al., "Reformer", arXiv 2001.04451, section 3 (attention by buckets, rounds).
    """

    rounds: int = 4
    bits: int = 6
    bucket: int = 32
    window: int = 16
    query_chunk: int = 64

    capabilities = dataclasses.replace(
        Exact.capabilities, exact=False, residual=False, sees_all=False, bias=False, random=True
    )

    def __post_init__(self) -> None:
        check_positive(self, "rounds", "bucket", "window", "query_chunk")
        if self.bits != 0:
            check_positive(self, "bits")
        if self.bits > 30:
            raise ValueError(f"Hashed.bits is {self.bits}: expected at most 30, which fill a 32-bit number")

    @classmethod
    def examples(cls) -> "tuple[Hashed, ...]":
        return (cls(rounds=2, bits=1, bucket=2, window=2, query_chunk=7),)

    def ladder(self, length: int) -> "tuple[Hashed, ...]":
        wide = dataclasses.replace(self, bits=3, bucket=length)
        return tuple(dataclasses.replace(wide, rounds=rounds) for rounds in (1, 4, 16))

    def exact_limit(self, length: int) -> "Hashed":
        return dataclasses.replace(self, rounds=1, bits=0, bucket=length)

    def init(self, rng: Array | None, *, num_heads: int, head_dim: int) -> Params:
        """Draws the projections, in float32; M fits most standard normal keys."""
        del num_heads
        if rng is None:
            raise ValueError("Hashed.init: rng is None: expected a key, since the projections are drawn from it")
        directions = jax.random.normal(rng, (self.rounds, self.bits, head_dim + 1), jnp.float32)
        return Params(constants={"directions": directions, "radius": jnp.asarray(1.25 * head_dim**0.5, jnp.float32)})

    def fitted(self, params: Params, key: Float[Array, "B S K H"]) -> Params:
        """The params with the largest norm of sample keys as the radius M."""
        radius = norms(key.astype(jnp.float32)).max()
        return params._replace(constants={**params.constants, "radius": jnp.where(radius > 0, radius, 1)})

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        queries, keys = self._codes(inputs)
        return self._by_rows(inputs, queries, keys, functools.partial(attended, self._rule()))

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        queries, keys = self._codes(inputs)
        output = self._by_rows(inputs, queries, keys, functools.partial(attended, self._rule()))
        tail, some = self._by_rows(inputs, queries, keys, functools.partial(dropped, self._rule()))
        certificate = sparse_certificate(inputs, tail, work=1.0)
        bound = jnp.where(some | (certificate.error_bound == 0), certificate.error_bound, jnp.inf)
        return output, dataclasses.replace(certificate, error_bound=bound)

    def init_state(self, batch, num_kv_heads, head_dim, max_length, dtype, *, num_heads=None) -> HashedCache:
        del num_heads
        return HashedCache.empty(batch, num_kv_heads, head_dim, max_length, self.rounds, dtype)

    def extend(self, state: HashedCache, query, key, value, **options: Any) -> tuple[HashedCache, Array]:
        """As `Method.extend`. `params` and `rng` must be those of the earlier calls: the state holds buckets."""
        new = prepare_tokens(self, query, key, value, **options)
        queries, keys = self._codes(new)
        start = state.cache.length
        longer = state.cache.append(*(jnp.swapaxes(x, 1, 2) for x in (new.key, new.value)))
        code = lax.dynamic_update_slice_in_dim(state.code, jnp.swapaxes(keys, 1, 2), start, axis=1)
        mask = mask_of_tokens(new.mask, start, longer.length, longer.max_length)
        key, value = (jnp.swapaxes(x, 1, 2) for x in (longer.key, longer.value))
        whole = dataclasses.replace(new, key=key, value=value, mask=mask)
        output = compiled((whole, queries, jnp.swapaxes(code, 1, 2)), method=self, hook="attend_coded")
        return HashedCache(cache=longer, code=code), ungrouped(output, query).astype(query.dtype)

    def attend_coded(self, operands: tuple[Inputs, Array, Array]) -> Float[Array, "B K G T E"]:
        """The output over a cache whose buckets are known; a single row needs no table."""
        inputs, queries, keys = operands
        if inputs.mask.num_queries > 1:
            return self._by_rows(emptied(inputs), queries, keys, functools.partial(attended, self._rule()))
        return self._by_rows(inputs, queries, keys, functools.partial(attended, self._rule()), sort=False)

    def _codes(self, inputs: Inputs) -> tuple[Int[Array, "B K G T R"], Int[Array, "B K S R"]]:
        """The buckets of queries and keys, by the projections of `params`."""
        H, params = inputs.query.shape[-1], inputs.params
        if params is None:
            params = self.init(inputs.rng, num_heads=1, head_dim=H)
        directions, radius = (jnp.asarray(params.constants[name]) for name in ("directions", "radius"))
        expected = (self.rounds, self.bits, H + 1)
        if directions.shape != expected:
            raise ValueError(
                f"params: directions have shape {directions.shape}: expected {expected}; "
                f"pass what this method's init(rng, num_heads=, head_dim={H}) returns"
            )
        return query_codes(inputs.query, directions), existing_codes(inputs, directions, radius)

    def _by_rows(self, inputs: Inputs, queries, keys, result, *, sort: bool = True) -> Any:
        """`result(head, rows, codes, table)` for one query head and chunk of rows after another, as `B K G T ...`."""
        (B, K, G), T = inputs.query.shape[:3], inputs.mask.num_queries
        C = min(self.query_chunk, T)
        rows = jnp.arange(-(-T // C) * C).clip(max=T - 1).reshape(-1, C)
        segments, tables = inputs.mask.key_segments, None
        if sort:
            tables = jax.vmap(jax.vmap(table, (0, None)), (0, None if segments is None else 0))(keys, segments)

        def head(n):
            b, k, g = n // (K * G), n // G % K, n % G
            part = inputs.part(b, 1, k, 1)
            query = lax.dynamic_slice_in_dim(part.query, g, 1, axis=2)
            beta = lax.dynamic_slice_in_dim(part.beta, g, 1, axis=1) if part.beta.ndim else part.beta
            part = dataclasses.replace(part, query=query, beta=beta, mask=mask_of_heads(inputs.mask, b, k, g, 1))
            own = Table((), keys[b, k], keys[b, k]) if tables is None else jax.tree.map(lambda x: x[b, k], tables)
            each = jax.checkpoint(lambda at: result(part, at, queries[b, k, g][at], own))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], lax.map(each, rows))

        found = lax.map(head, jnp.arange(B * K * G))
        return jax.tree.map(lambda x: x.reshape(B, K, G, *x.shape[1:]), found)

    def _rule(self) -> Rule:
        return Rule(self.rounds, self.bucket, self.window)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """Each comparison of a sort is counted as one operation."""
        read = min(S, (self.window + self.rounds * self.bucket) * (1 if is_causal else 2))
        hashes = 2.0 * (T + S) * self.rounds * self.bits * (head_dim + 1)
        sorts = 2.0 * self.rounds * (S + T) * max(1, S.bit_length())
        numbers = 2.0 * T * head_dim + 2.0 * S * head_dim + 2.0 * T * read * head_dim + 4.0 * self.rounds * (T + S)
        return Cost(num_heads * (hashes + sorts + 4.0 * T * read * head_dim), 4.0 * num_heads * numbers)
