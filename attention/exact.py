"""The exact baseline, with every intermediate visible and no tricks."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.cache import Cached
from attention.inputs import Inputs
from attention.method import Capabilities, Certificate, Cost
from attention.rounding import rounding_bound


class AttentionSteps(NamedTuple):
    """The named stages of scaled dot-product attention (Vaswani et al., arXiv 1706.03762, section 3.2.1).

    Attributes:
        scores: `B N T S`, Q K^T.
        scaled_scores: `B N T S`, after scale, temperature, soft cap and bias.
        masked_scores: `B N T S`, -inf where the key is not visible.
        weights: `B N T S`, rows that sum to one; rows that see no key are zero.
        output: `B T N E`, the weighted values.
    """

    scores: Float[Array, "..."]
    scaled_scores: Float[Array, "..."]
    masked_scores: Float[Array, "..."]
    weights: Float[Array, "..."]
    output: Float[Array, "..."]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Cached):
    """softmax(beta Q K^T + bias) V with the whole matrix of weights in memory.

    Cost: 2 T S (H + E) operations and 4 T S bytes a head, in float32 (float64 for float64 inputs).
    Error bound: `attention.rounding.rounding_bound`.

    References:
        Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.2.1.
    """

    capabilities = Capabilities(
        causal=True,
        window=True,
        lengths=True,
        segments=True,
        dense_mask=True,
        bias=True,
        soft_cap=True,
        cross=True,
        decoding=True,
        residual=True,
        certificate="deterministic",
        exact=True,
    )

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return weighted_values(softmax(self._logits(inputs)), inputs.value)

    def attend_with_residual(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
        logits = self._logits(inputs)
        top = _row_maximum(logits)
        residual = jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]
        return weighted_values(softmax(logits), inputs.value), residual

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        return self.attend(inputs), exact_certificate(inputs, rescalings=0)

    def _logits(self, inputs: Inputs) -> Float[Array, "B K G T S"]:
        return inputs.masked_scores(0, inputs.mask.num_queries, 0, inputs.mask.num_keys)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        del is_causal  # the masked half is computed too
        operands = 4 * num_heads * (2 * T + 2 * S) * head_dim
        return Cost(4.0 * num_heads * T * S * head_dim, operands + 4.0 * 4 * num_heads * T * S)


def softmax(logits: Float[Array, "*N S"]) -> Float[Array, "*N S"]:
    """Softmax over the last axis; a row of -inf gives zeros, with zero gradient."""
    weights = jnp.exp(logits - _row_maximum(logits))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def weighted_values(weights: Float[Array, "B K G T S"], value: Float[Array, "B K S E"]) -> Float[Array, "B K G T E"]:
    """The sum of the values by weight, in the dtype of the weights."""
    return jnp.einsum("BKGTS,BKSE->BKGTE", weights, value.astype(weights.dtype), precision=lax.Precision.HIGHEST)


def _row_maximum(logits: Float[Array, "*N S"]) -> Float[Array, "*N 1"]:
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    return jnp.where(jnp.isneginf(top), 0, top)


def exact_certificate(
    inputs: Inputs, *, rescalings: int, depth: int | None = None, fixed_shift: float = 0.0
) -> Certificate:
    """The certificate of a method that reads everything: rounding is its only error; see `rounding_bound`."""
    bound = rounding_bound(inputs, rescalings=rescalings, depth=depth, fixed_shift=fixed_shift)
    return Certificate(
        error_bound=bound, dropped_mass=jnp.zeros_like(bound), work=jnp.ones((), bound.dtype), kind="deterministic"
    )
