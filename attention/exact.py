"""The exact baseline, with every intermediate visible and no tricks."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

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
    u_out = float(jnp.finfo(output_dtype or inputs.key.dtype).eps) / 2
    H, S = inputs.query.shape[-1], inputs.mask.num_keys
    shift = 2 * jnp.tanh(logit_rounding(inputs) / 2)
    relative = sum_rounding(inputs, rescalings=rescalings)
    sums = jnp.minimum(relative / (1 - jnp.minimum(relative, 0.5)), 1)  # two means never differ by more than 2 C
    largest = max_over_visible(inputs.mask, norms(inputs.value.astype(dtype)))
    tiny = S * float(jnp.finfo(dtype).tiny) + float(jnp.finfo(output_dtype or inputs.key.dtype).smallest_subnormal) * H
    # One part in a thousand covers the rounding of this expression itself.
    bound = 1.001 * largest * (shift + 2 * sums + 2 * u_out) + tiny
    return jnp.where(sees_any(inputs.mask), bound, 0)


def logit_rounding(inputs: Inputs) -> Float[Array, "B K G T"]:
    """D = gamma_{H+5} |q| max|k| + 12 u L, a bound on the rounding error of every logit that a query sees."""
    u, H = _roundoff(inputs), inputs.query.shape[-1]
    return _gamma(H + 5, u) * _score_bound(inputs) + 12 * u * _logit_bound(inputs)


def sum_rounding(inputs: Inputs, *, rescalings: int) -> Float[Array, "B K G T"]:
    """A bound on the relative error of a sum of e^(logit - max), given the logits; see `rounding_bound`."""
    u = _roundoff(inputs)
    first, last = inputs.mask.key_range()
    seen = (last - first + 1).clip(0).astype(inputs.query.dtype)[:, None, None, :]
    return _gamma(seen, u) + (2 * jnp.minimum(2 * _logit_bound(inputs), 104) + 6 * (rescalings + 2)) * u


def sees_any(mask: Mask) -> Bool[Array, "b 1 1 T"]:
    """Whether the band and the lengths leave a query any key."""
    first, last = mask.key_range()
    return (first <= last)[:, None, None, :]


def norms(x: Float[Array, "*N H"]) -> Float[Array, "*N"]:
    """Euclidean norms over the last axis, whose squares can neither overflow nor vanish."""
    largest = jnp.abs(x).max(-1, keepdims=True)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit[..., 0] * jnp.linalg.norm(x / unit, axis=-1)


def _score_bound(inputs: Inputs) -> Float[Array, "B K G T"]:
    return norms(inputs.query) * max_over_visible(inputs.mask, norms(inputs.key.astype(inputs.query.dtype)))


def _logit_bound(inputs: Inputs) -> Float[Array, "B K G T"]:
    """L, with the soft cap and the bias."""
    score = _score_bound(inputs)
    size = score if inputs.soft_cap is None else jnp.minimum(score, inputs.soft_cap)
    if inputs.bias is None:
        return size
    return size + jnp.where(jnp.isfinite(inputs.bias), jnp.abs(inputs.bias).astype(size.dtype), 0).max(-1)


def exact_certificate(inputs: Inputs, *, rescalings: int) -> Certificate:
    """The certificate of a method that reads everything: rounding is its only error."""
    bound = rounding_bound(inputs, rescalings=rescalings)
    return Certificate(
        error_bound=bound, dropped_mass=jnp.zeros_like(bound), work=jnp.ones((), bound.dtype), kind="deterministic"
    )


def _roundoff(inputs: Inputs) -> float:
    return float(jnp.finfo(inputs.query.dtype).eps) / 2


def _gamma(n, u: float):
    return n * u / (1 - n * u)
