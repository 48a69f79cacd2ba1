"""Softmax attention over sinks, a window, heavy pages, and a sample of the rest, with a bound that holds by chance."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.exact import Exact
from attention.inputs import Inputs
from attention.method import Certificate, Cost, Params, check_positive
from attention.rounding import rounding_bound, sees_any
from attention.sparse.bounds import odds_rounding
from attention.sparse.paged_method import Paged
from attention.sparse.pages import PagedCache
from attention.sparse.sampled_bounds import limits_of, row_bounds
from attention.sparse.sampled_tiles import Known, chosen_by_row, known, over_tiles
from attention.sparse.segments import Sorted, sort
from attention.sparse.tail import Rule, Tile, weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Paged):
    r"""Softmax over sinks, a window and heavy pages of keys, and over m of the n others, drawn with replacement.

        o = N / Z,    N = sum_{j kept} e^{l_j} v_j + (n / m) sum_{s <= m} e^{l_{j_s}} v_{j_s},
                      Z = sum_{j kept} e^{l_j}     + (n / m) sum_{s <= m} e^{l_{j_s}}.

    A tile of queries, counted from position 0, keeps the first `sinks` keys and those from `window` before the tile
    to its end (`window` after it where not causal), and of the pages between them the `heavy` ones of the largest
    bounds, chosen as `BlockTopK` does by the queries that share a key head. Its rows and all heads share one sample of
    the rest, as ranks among the keys that each has left. Where these are no more than m, all are read. What is drawn
    depends on `params`, on the number of the tile and on how many keys are left, so that no later token changes it and
    decoding draws as the whole does. Gradients flow through what was read, by its weight.

    Where sequences are packed, all of this counts from the first token of each segment, whose output is what it is
    alone.

    Attributes:
        samples: m.
        window: keys before a tile that it keeps.
        sinks: keys at the beginning that every tile keeps.
        query_block: queries of a tile.
        heavy: pages that a tile keeps for their bounds.
        page: keys of such a page.
        delta: the probability with which a row's certificate may fail.

    Cost: with n = sinks + query_block + window (twice that where not causal) + heavy page + samples keys a tile, 2 T n
    (H + E) operations a head: linear in T, and 4 S / page H for each query that chooses heavy pages. Memory
    O((T + S) (H + E) + G query_block n). With segments a tile more for each, and a sort.
    Error bound: probabilistic, at each row with probability 1 - delta over the draw of `params`: numerator and
    denominator by Bernstein bounds for samples of any size (`attention.sparse.deviations`), given a sound range of
    e^l among the keys left, from norms and from the boxes of their pages; never more than the distance of two values.
    Rows of a tile share their luck.

    Raises:
        ValueError: a size is out of range, delta is not between 0 and 1, or `params` are not those of a `Sampled`.

    References:
        Desai et al., "vAttention: verified sparse attention", arXiv 2510.05688, section 4 (kept keys and a sampled
        tail, with a guarantee by the central limit theorem).
    """

    samples: int = 256
    window: int = 128
    sinks: int = 4
    query_block: int = 128
    heavy: int = 0
    page: int = 64
    delta: float = 0.05

    capabilities = dataclasses.replace(
        Exact.capabilities,
        exact=False,
        residual=False,
        sees_all=False,
        bias=False,
        random=True,
        certificate="probabilistic",
        rounding=2.0,
    )

    def __post_init__(self) -> None:
        check_positive(self, "window", "query_block", "samples", "page")
        for name in ("sinks", "heavy"):
            if getattr(self, name) != 0:
                check_positive(self, name)
        if self.samples < 2:
            raise ValueError(f"Sampled.samples is {self.samples}: expected at least 2, which have a variance")
        if not (isinstance(self.delta, float) and 0 < self.delta < 1):
            raise ValueError(f"Sampled.delta is {self.delta!r}: expected a number between 0 and 1")
        if self.heavy:  # which the query heads of a key head choose together
            own = dataclasses.replace(type(self).capabilities, group_independent=False)
            object.__setattr__(self, "capabilities", own)

    @classmethod
    def examples(cls) -> "tuple[Sampled, ...]":
        return (cls(samples=4, window=2, sinks=1, query_block=3, heavy=1, page=2),)

    def ladder(self, length: int) -> "tuple[Sampled, ...]":
        return tuple(dataclasses.replace(self, samples=max(2, length // share)) for share in (16, 4, 1))

    def exact_limit(self, length: int) -> "Sampled":
        return dataclasses.replace(self, samples=max(2, length))

    def init(self, rng: Array | None, *, num_heads: int, head_dim: int) -> Params:
        """Draws the seed of all samples."""
        del num_heads, head_dim
        if rng is None:
            raise ValueError("Sampled.init: rng is None: expected a key, since the samples are drawn from it")
        return Params(constants={"seed": jax.random.bits(rng, (2,), jnp.uint32)})

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self._over_tiles(inputs, self._order(inputs), lambda part, n, tile, box: weighted(part, tile).output)

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        order = self._order(inputs)
        limits = lax.stop_gradient(limits_of(inputs, order))
        numbers = (2 * rounding_bound(inputs, rescalings=1), odds_rounding(inputs, rescalings=0))
        shape = (-1, *inputs.query.shape[2:4])
        numbers = tuple(jnp.broadcast_to(x, inputs.query.shape[:-1]).reshape(shape) for x in numbers)

        def result(part: Inputs, n: Array, tile: Tile, box: Array | None):
            found = weighted(part, tile)
            own, (rounding, odds) = jax.tree.map(lambda x: x[n], (limits, numbers))
            more = rounding[:, tile.at], odds[:, tile.at], self.delta
            return found.output, *row_bounds(part, tile, found, own, box, *more)

        output, bound, mass = self._over_tiles(inputs, order, result)
        seen, S = sees_any(inputs.mask), inputs.mask.num_keys
        kept = self._rule().width(inputs.mask) + min(self.sinks, S) + self.heavy * self.page
        read = min(1.0, (kept + min(self.samples, S)) / S)
        return output, Certificate(
            error_bound=jnp.where(seen, bound, 0),
            dropped_mass=jnp.where(seen, mass, 0),
            work=jnp.full((), read, bound.dtype),
            kind="probabilistic",
            confidence=1 - self.delta,
        )

    def init_state(self, batch, num_kv_heads, head_dim, max_length, dtype, *, num_heads=None) -> PagedCache:
        del num_heads
        return PagedCache.empty(batch, num_kv_heads, 1, head_dim, max_length, self.page, self.heavy, dtype)

    def attend_pages(self, operands: tuple[Inputs, PagedCache]) -> tuple[Array, Array]:
        """The output over the pages of a decoding state, and what the last tile has chosen."""
        inputs, state = operands
        key, value = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (state.key, state.value))
        pages = Known(state.box, state.chosen[:, :, 0]) if self.heavy else None
        whole = dataclasses.replace(inputs, key=key, value=value)

        def result(part: Inputs, n: Array, tile: Tile, box: Array | None):
            return weighted(part, tile).output, chosen_by_row(tile)

        output, chosen = over_tiles(self._rule(), whole, None, self._seed(whole), pages, result)
        return output, chosen[:, :, :1, -1]

    def _over_tiles(self, inputs: Inputs, order: Sorted | None, result) -> Any:
        """`result(part, n, tile, box)` for one key head n and tile after another, `B K G T ...`."""
        pages = known(inputs, order, self.page) if self.heavy else None
        return over_tiles(self._rule(), inputs, order, self._seed(inputs), pages, result)

    def _order(self, inputs: Inputs) -> Sorted | None:
        """The order of the tokens of each sequence, where there are segments."""
        if inputs.mask.query_segments is None:
            return None
        batch = jnp.arange(inputs.query.shape[0])
        return lax.map(lambda b: sort(inputs.part(b, 1, 0, 1).mask, self.query_block), batch)

    def _rule(self) -> Rule:
        return Rule(self.samples, self.window, self.sinks, self.query_block, self.heavy, self.page)

    def _seed(self, inputs: Inputs) -> Array:
        params = inputs.params
        if params is None:
            params = self.init(inputs.rng, num_heads=1, head_dim=1)
        seed = jnp.asarray(params.constants["seed"]) if "seed" in params.constants else jnp.zeros(())
        if seed.shape != (2,) or seed.dtype != jnp.uint32:
            raise ValueError(
                f"params: the seed has shape {seed.shape} and dtype {seed.dtype}: expected two of uint32; "
                "pass what this method's init(rng, num_heads=, head_dim=) returns"
            )
        return seed

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        around = self.query_block + self.window * (1 if is_causal else 2)
        read = min(S, min(S, around) + self.sinks + self.heavy * self.page + min(self.samples, S))
        tiles = -(-T // min(self.query_block, T))
        return Cost(4.0 * num_heads * head_dim * T * read, 4.0 * num_heads * head_dim * 2 * (T + tiles * read))
