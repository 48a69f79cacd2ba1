"""Linear attention by the features elu(x) + 1."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.inputs import Inputs
from attention.linear.base import Linear
from attention.linear.engine import FeatureMap
from attention.linear.state import Features
from attention.linear.temperature import shared
from attention.method import Capabilities


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearElu(Linear):
    r"""Linear attention with positive features of the same size as a head, and nothing drawn or learned.

        o_i = sum_j phi(x_i).phi(y_j) v_j / sum_j phi(x_i).phi(y_j),    phi(x) = 1 + x where x > 0, else e^x,

    with x = beta q / sqrt|beta| and y = k sqrt|beta|, so that queries and keys carry half of the temperature each.
    This is another kernel, and no estimate of e^{q.k}: to first order in small x and y its logit is
    (sum_h y_h + x.y) / H up to what depends on the query alone, so a logit acts with 1 / H of its weight beside a
    preference for keys with large sums. Both vanish at high temperature, where the output is the mean, as softmax's
    is. At low temperature softmax tends to its largest logit and this kernel to the ratio of sums of products of
    positive parts, which no longer depends on the temperature.

    Shapes: queries `B T N H`, keys `B S K H`, values `B S K E`; sums in float32, float64 for float64 operands.
    Cost: 2 H (E + 1) operations a query and a key, and where causal 2 C (H + E) more; a state of H (E + 1) numbers.
    Error bound: no bound known; the error against softmax does not vanish with any budget.
    Where every product of features in a row underflows the row is 0, and `jax.experimental.checkify` reports it.

    Attributes:
        chunk: C.

    Raises:
        ValueError: `chunk` is no positive integer.

    References:
        Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236, section 3.2.
    """

    capabilities = Capabilities(causal=True, lengths=True, cross=True, decoding=True)

    @classmethod
    def examples(cls) -> "tuple[LinearElu, ...]":
        return (cls(chunk=5),)

    def num_features(self, head_dim: int) -> int:
        return head_dim

    def feature_map(self, inputs: Inputs) -> FeatureMap:
        return shared(inputs, _features, _features, inputs.query.shape[-1])


def _features(x: Float[Array, "B K g C H"], position: Array) -> Features:
    del position
    # An exponential of its own, since elu(x) + 1 would cancel: e^-20 would be off by 30 units of roundoff in 1.
    features = jnp.where(x > 0, 1 + x, jnp.exp(jnp.minimum(x, 0)))
    return Features(features, jnp.zeros(x.shape[:-1], x.dtype))
