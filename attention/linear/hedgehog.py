"""Linear attention by learned exponential features, and the loss that teaches them exact attention's weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.exact import softmax
from attention.inputs import Inputs, prepare
from attention.linear.base import Linear
from attention.linear.engine import FeatureMap
from attention.linear.state import HIGHEST, Features
from attention.linear.temperature import shared
from attention.method import Capabilities, Cost, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hedgehog(Linear):
    r"""Linear attention with exponentials of a learned linear map of each head, and of its negative.

        o_i = sum_j phi(x_i).psi(y_j) v_j / sum_j phi(x_i).psi(y_j),    phi(x) = [e^{W x + b}, e^{-W x - b}],

    and psi the same with weights of its own, one pair of maps a query head, with x = beta q / sqrt|beta| and
    y = k sqrt|beta|. W starts as the identity and b at 0, where a weight is 2 sum_h cosh(x_h + y_h). Exponentials make
    the kernel spiky and, where W q and W k align, monotone in q.k, which `distillation_loss` trains.

    This is another kernel, and no estimate of e^{q.k}: what is learned at one temperature is for that one. Another
    temperature scales x and y as it would the operands of softmax: at high temperature all keys weigh the same, as in
    softmax; at low temperature the largest coordinate of W x + W y decides, and not the largest logit.

    Shapes: queries `B T N H`, keys `B S K H`, values `B S K E`; sums in float32, float64 for float64 operands.
    Parameters: `query_map`, `key_map`, `N H H`, and `query_bias`, `key_bias`, `N H`, all trained.
    Cost: 2 H^2 + 4 H (E + 1) operations a query and a key, and where causal 2 C (2 H + E) more; a state of
    2 H (E + 1) numbers a query head.
    Error bound: no bound known; it depends on what was learned.
    Where every product of features in a row underflows the row is 0, and `jax.experimental.checkify` reports it.

    Attributes:
        chunk: C.

    Raises:
        ValueError: `chunk` is no positive integer, or the parameters have the shapes of other heads.

    References:
        Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        arXiv 2402.04347, section 4.
    """

    capabilities = Capabilities(causal=True, lengths=True, cross=True, decoding=True, rounding=4.0)

    @classmethod
    def examples(cls) -> "tuple[Hedgehog, ...]":
        return (cls(chunk=5),)

    def num_features(self, head_dim: int) -> int:
        return 2 * head_dim

    def init(self, rng: Array | None, *, num_heads: int, head_dim: int) -> Params:
        """The identity for every head; nothing is drawn."""
        del rng
        same = jnp.broadcast_to(jnp.eye(head_dim), (num_heads, head_dim, head_dim))
        none = jnp.zeros((num_heads, head_dim))
        return Params(trained={"query_map": same, "query_bias": none, "key_map": same, "key_bias": none})

    def feature_map(self, inputs: Inputs) -> FeatureMap:
        _, K, G, _, H = inputs.query.shape
        params = inputs.params
        if params is None:
            params = self.init(None, num_heads=K * G, head_dim=H)
        trained = params.trained
        if trained["query_map"].shape != (K * G, H, H):
            raise ValueError(
                f"params: query_map has shape {trained['query_map'].shape}: expected {(K * G, H, H)}; "
                f"pass what this method's init(rng, num_heads={K * G}, head_dim={H}) returns"
            )

        def mapped(side: str):
            dtype = inputs.query.dtype
            weight = trained[f"{side}_map"].astype(dtype).reshape(K, G, H, H)
            bias = trained[f"{side}_bias"].astype(dtype).reshape(1, K, G, 1, H)

            def features(x: Float[Array, "B K g C H"], position: Array) -> Features:
                del position
                return both_signs(jnp.einsum("BKgCH,KgMH->BKgCM", x, weight, precision=HIGHEST) + bias)

            return features

        return shared(inputs, mapped("query"), mapped("key"), 2 * H, own_keys=True)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """The engine's, and the map of every query and key."""
        engine = super().cost(T, S, num_heads=num_heads, head_dim=head_dim, is_causal=is_causal)
        return engine._replace(flops=engine.flops + 2.0 * num_heads * (T + S) * head_dim**2)


def both_signs(z: Float[Array, "*N H"]) -> Features:
    """[e^z, e^-z]; the largest feature of a token is 1, the rest is in its log_scale."""
    exponents = jnp.concatenate([z, -z], axis=-1)
    top = lax.stop_gradient(exponents.max(-1))  # it cancels in the features
    return Features(jnp.exp(exponents - top[..., None]), top)


def distillation_loss(query, key, *, method: Linear, params: Params | None = None, **options: Any) -> Float[Array, ""]:
    r"""Cross-entropy of the weights of a linear method against those of softmax attention, averaged over rows.

        -1/rows sum_ij P_ij log P^_ij,    P = softmax(q.k),    P^_ij = phi_i.phi_j / sum_j phi_i.phi_j

    It is at least the mean entropy of P, and equal to it where the weights are equal. P has no gradient.

    Args:
        query: `B T N H`.
        key: `B S K H`.
        method: a linear method whose products of features are positive.
        params: what is trained, as `method.init` returns it.
        options: of `attention.dot_product_attention`, as far as `method` takes them.

    Returns:
        A scalar in float32 (float64 for float64 operands).

    Cost: 2 T S (H + M) operations and O(T S) memory a head.

    Raises:
        As `attention.dot_product_attention`.

    Example:
        >>> import jax, attention
        >>> from attention.linear import distillation_loss
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 16, 2, 8))
        >>> method = attention.Hedgehog()
        >>> params = method.init(None, num_heads=2, head_dim=8)
        >>> bool(distillation_loss(q, k, method=method, params=params, is_causal=True) > 0)
        True

    References:
        Zhang et al., arXiv 2402.04347, section 4.2.
    """
    inputs = prepare(method, query, key, key, params=params, **options)
    T, S, dtype = inputs.mask.num_queries, inputs.mask.num_keys, inputs.query.dtype
    exact = lax.stop_gradient(softmax(inputs.masked_scores(0, T, 0, S)))
    feature_map = method.feature_map(inputs)
    mine = feature_map.query(inputs.query, jnp.arange(T)[None])
    theirs = feature_map.key(inputs.key.astype(dtype), jnp.arange(S)[None])
    products = jnp.einsum("BKGTM,BKgSM->BKGTS", mine.features, theirs.features, precision=HIGHEST)
    seen = inputs.mask.whole()
    # A weight that underflows costs as much as the smallest number.
    logits = jnp.log(jnp.maximum(products, jnp.finfo(dtype).tiny)) + theirs.log_scale[..., None, :]
    logits = jnp.where(seen, logits, -jnp.inf)
    rows = jnp.broadcast_to(seen.any(-1), logits.shape[:-1])
    total = jax.nn.logsumexp(jnp.where(rows[..., None], logits, 0), axis=-1, keepdims=True)
    loss = -(exact * jnp.where(seen, logits - total, 0)).sum(-1)
    return jnp.where(rows, loss, 0).sum() / jnp.maximum(rows.sum(), 1)
