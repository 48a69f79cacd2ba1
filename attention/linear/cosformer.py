"""Linear attention by positive parts, reweighted by the cosine of the distance."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from attention.checks import traced_check
from attention.inputs import Inputs
from attention.linear.base import Linear
from attention.linear.engine import FeatureMap
from attention.linear.state import Features, LinearState
from attention.linear.temperature import shared
from attention.method import Capabilities, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosFormer(Linear):
    r"""Linear attention with rectified features, and weights that fall with the distance as a quarter of a cosine.

        w_ij = (c + relu(x_i).relu(y_j)) cos(pi/2 (i - j) / L),    o_i = sum_j w_ij v_j / sum_j w_ij,

    with x = beta q / sqrt|beta|, y = k sqrt|beta| and L = `max_length`. The cosine of a difference is a sum of two
    products, so w_ij = phi_i.phi_j with M = 2 (H + 1) features. Since L is fixed, a token weighs the same whatever
    follows it. This is another kernel, and no estimate of e^{q.k}.

    In the paper c = 0. Then relu(x).relu(y) is proportional to beta, which cancels: temperature has no effect, and a
    row without a common positive part has no weights (it is 0, and `jax.experimental.checkify` reports it). With
    c > 0 every weight is positive, the paper's form is the limit of low temperature, and the cosine alone is left
    at high temperature: not the mean over the visible keys, unless L is large against the distances.

    Shapes: queries `B T N H`, keys `B S K H`, values `B S K E`; sums in float32, float64 for float64 operands.
    Cost: 4 (H + 1) (E + 1) operations a query and a key, and where causal 2 C (2 H + E) more; a state of
    2 (H + 1) (E + 1) numbers.
    Error bound: no bound known; the error against softmax does not vanish with any budget.

    Attributes:
        max_length: L, which no sequence may exceed.
        constant: c, at least 0.
        chunk: C.

    Raises:
        ValueError: a field is out of range, or a sequence is longer than `max_length`; in decoding with a traced
            length `jax.experimental.checkify` reports it, and without it the output is NaN.

    References:
        Qin et al., "cosFormer: Rethinking Softmax in Attention", arXiv 2202.08791, sections 3.1 and 3.2.
    """

    max_length: int = 4096
    constant: float = 1.0

    capabilities = Capabilities(causal=True, lengths=True, cross=True, decoding=True, sees_all=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "max_length")
        if not 0 <= self.constant < math.inf:
            raise ValueError(f"CosFormer.constant is {self.constant!r}: expected a finite number of at least 0")

    @classmethod
    def examples(cls) -> "tuple[CosFormer, ...]":
        return (cls(max_length=24, chunk=5),)

    def num_features(self, head_dim: int) -> int:
        return 2 * (head_dim + (self.constant > 0))

    def feature_map(self, inputs: Inputs) -> FeatureMap:
        mask, H = inputs.mask, inputs.query.shape[-1]
        if max(mask.num_queries, mask.num_keys) > self.max_length:
            self._refuse(max(mask.num_queries, mask.num_keys))
        return shared(inputs, self._features, self._features, self.num_features(H))

    def extend(self, state: LinearState, query: Array, key: Array, value: Array, **options: Any):
        length = state.length + key.shape[-3]
        fits = length <= self.max_length
        if not isinstance(fits, Tracer) and not fits:
            self._refuse(int(length))
        traced_check(fits, "the sequence is longer than CosFormer.max_length: {n} tokens", n=length)
        state, output = super().extend(state, query, key, value, **options)
        return state, jnp.where(fits, output, jnp.nan)

    def _refuse(self, length: int) -> None:
        raise ValueError(
            f"CosFormer.max_length is {self.max_length}: expected at least the length of the sequence, {length}; "
            f"weights of tokens further apart would be negative"
        )

    def _features(self, x: Float[Array, "B K g C H"], position: Int[Array, "b C"]) -> Features:
        parts = jax.nn.relu(x)
        if self.constant > 0:
            root = jnp.full((*x.shape[:-1], 1), math.sqrt(self.constant), x.dtype)
            parts = jnp.concatenate([root, parts], axis=-1)
        angle = (position.astype(x.dtype) * (math.pi / 2 / self.max_length))[:, None, None, :, None]
        features = jnp.concatenate([jnp.cos(angle) * parts, jnp.sin(angle) * parts], axis=-1)
        return Features(features, jnp.zeros(x.shape[:-1], x.dtype))
