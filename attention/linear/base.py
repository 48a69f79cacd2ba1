"""What every linear method shares: attention and decoding through the engine, given its feature map."""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.inputs import Inputs, prepare_tokens, ungrouped
from attention.linear import engine
from attention.linear.state import LinearState
from attention.linear.tokens import aligned, all_keys
from attention.method import Cost, Method, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Method, register=False):
    """A method that replaces e^{q.k} by phi(q).phi(k); a subclass writes `feature_map` and `num_features`.

    Attributes:
        chunk: tokens that are worked on at once, C. It changes time and memory, and the output by rounding only.
    """

    chunk: int = 128

    def __post_init__(self) -> None:
        check_positive(self, "chunk")

    @abc.abstractmethod
    def feature_map(self, inputs: Inputs) -> engine.FeatureMap:
        """The feature map for these operands. It may read their shapes, `beta`, `params` and `rng`."""

    @abc.abstractmethod
    def num_features(self, head_dim: int) -> int:
        """M."""

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return engine.attend(inputs, self.feature_map(inputs), self.chunk)

    def init_state(self, batch, num_kv_heads, head_dim, max_length, dtype, *, num_heads=None) -> LinearState:
        """The state before the first token, M (head_dim + 1) numbers a key head whatever `max_length` is.

        Where query heads of a group have temperatures of their own, the first `extend` gives each its own sums.
        """
        del max_length, num_heads
        dtype = jnp.promote_types(dtype, jnp.float32)
        return LinearState.empty(batch, num_kv_heads, 1, self.num_features(head_dim), head_dim, dtype)

    def extend(self, state: LinearState, query, key, value, **options: Any) -> tuple[LinearState, Array]:
        """As `Method.extend`. `scale`, `temperature`, `params` and `rng` must be those of the earlier calls.

        The state holds features, not keys, so what made the features cannot change on the way.
        """
        inputs = prepare_tokens(self, query, key, value, **options)
        longer, output = _extended(state, inputs, method=self)
        return longer, ungrouped(output, query).astype(query.dtype)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """Products with the sums: 2 M (H + 1) operations a query and a key; causal tiles: 2 C (M + H) a query.

        Bytes: the operands once, the features written and read, and where causal the tiles and the states,
        which pass through memory once a chunk.
        """
        M, C = self.num_features(head_dim), min(self.chunk, T)
        state = M * (head_dim + 1)
        flops = 2.0 * (T + S) * state + (2.0 * T * C * (M + head_dim) if is_causal else 0.0)
        numbers = 2.0 * (T + S) * (head_dim + M)
        if is_causal:
            numbers += 2.0 * T * C + 2.0 * -(-T // C) * state
        return Cost(num_heads * flops, 4.0 * num_heads * numbers)


@functools.partial(jax.jit, static_argnames=("method",))
def _extended(state: LinearState, inputs: Inputs, *, method: Linear) -> tuple[LinearState, Array]:
    """Compiled, so that a loop over tokens outside any jit compiles once."""
    feature_map = method.feature_map(inputs)
    tokens = aligned(inputs, all_keys(inputs, state.length))
    state, output = engine.scan_causally(state.with_groups(feature_map.groups), tokens, feature_map, method.chunk)
    return dataclasses.replace(state, length=state.length + inputs.mask.num_keys), output
