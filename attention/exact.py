"""The exact baseline, with every intermediate visible and no tricks."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.cache import Cached
from attention.inputs import Inputs
from attention.masks import Mask
from attention.method import Capabilities, Certificate, Cost


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
    Error bound: `rounding_bound`.

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


def max_over_visible(mask: Mask, numbers: Float[Array, "B K S"]) -> Float[Array, "B K 1 T"]:
    """An upper bound on the maximum of non-negative numbers over the keys that each query sees.

    Over the prefix that the band and the lengths leave, in O(S); segments and dense masks are ignored.
    """
    _, last = mask.key_range()
    running = lax.cummax(numbers, axis=2)
    B = numbers.shape[0]
    last = jnp.broadcast_to(last, (B, mask.num_queries))[:, None, :]
    return jnp.take_along_axis(running, last.clip(0, mask.num_keys - 1), axis=2)[:, :, None, :]


def rounding_bound(inputs: Inputs, *, rescalings: int, output_dtype=None) -> Float[Array, "B K G T"]:
    r"""A bound on the Euclidean error of softmax attention in floating point, for any order of summation.

    With u the unit roundoff of the computation, gamma_n = n u / (1 - n u), n visible keys, C the largest
    norm among their values, L a bound on the size of the logits, and D = gamma_{H+5} |q| max|k| +
    12 u L a bound on the error of a logit:

        |error| <= C [2 tanh(D / 2) + 2 e / (1 - e) + 2 u_out] + n tiny
        e = gamma_n + (2 min(2 L, 104) + 6 (rescalings + 2)) u

    The first term is the distance that logits moved by D can move a distribution. The second is the
    relative error of exponentials and sums, in numerator and denominator: subtracting the maximum costs
    |l - max| u in the exponent, at most 104 u before the weight itself underflows, and rescaling by
    running maxima costs as much again in all, plus one exponential each time. `docs/bounds.md` derives it.

    Args:
        inputs: the operands.
        rescalings: how often a partial sum is rescaled by a new maximum.
        output_dtype: the dtype to which the output is rounded; that of `inputs.key` unless given.
    """
    dtype = inputs.query.dtype
    u = float(jnp.finfo(dtype).eps) / 2
    u_out = float(jnp.finfo(output_dtype or inputs.key.dtype).eps) / 2
    H, S = inputs.query.shape[-1], inputs.mask.num_keys
    key_norm, value_norm = (jnp.linalg.norm(x.astype(dtype), axis=-1) for x in (inputs.key, inputs.value))
    score = jnp.linalg.norm(inputs.query, axis=-1) * max_over_visible(inputs.mask, key_norm)
    size = score if inputs.soft_cap is None else jnp.minimum(score, inputs.soft_cap)
    if inputs.bias is not None:
        finite = jnp.where(jnp.isfinite(inputs.bias), jnp.abs(inputs.bias).astype(dtype), 0)
        size = size + finite.max(-1)
    first, last = inputs.mask.key_range()
    seen = (last - first + 1).clip(0).astype(dtype)[:, None, None, :]
    shift = 2 * jnp.tanh((_gamma(H + 5, u) * score + 12 * u * size) / 2)
    relative = _gamma(seen, u) + (2 * jnp.minimum(2 * size, 104) + 6 * (rescalings + 2)) * u
    sums = jnp.minimum(relative / (1 - jnp.minimum(relative, 0.5)), 1)  # two means never differ by more than 2 C
    largest = max_over_visible(inputs.mask, value_norm)
    tiny = S * float(jnp.finfo(dtype).tiny) + float(jnp.finfo(output_dtype or inputs.key.dtype).smallest_subnormal) * H
    # One part in a thousand covers the rounding of this expression itself.
    bound = 1.001 * largest * (shift + 2 * sums + 2 * u_out) + tiny
    return jnp.where(seen > 0, bound, 0)


def exact_certificate(inputs: Inputs, *, rescalings: int) -> Certificate:
    """The certificate of a method that reads everything: rounding is its only error."""
    bound = rounding_bound(inputs, rescalings=rescalings)
    return Certificate(
        error_bound=bound, dropped_mass=jnp.zeros_like(bound), work=jnp.ones((), bound.dtype), kind="deterministic"
    )


def _gamma(n, u: float):
    return n * u / (1 - n * u)
