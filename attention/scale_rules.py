"""What multiplies q.k beside the temperature: rules in the head size, the length, and the entropy of a row."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from attention.exact import Exact
from attention.inputs import Inputs, prepare, ungrouped
from attention.masks import Mask
from attention.registry import unknown

AREA = 2**18  # logits in a tile of rows, of all heads together
ROWS = 16  # rows of a tile at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """How a layer scales the scores of its heads, before the temperature divides them.

    Attributes:
        initial: the scale, or where training starts with it, from the head size H and the training length T.
        learned: whether the scale is one trained number a head.
        unit_norm: whether queries and keys are divided by their norms.
        by_length: whether the scores of a row are multiplied by ln n, with n the keys that the row sees.
        needs_length: whether `initial` depends on T, which must then be at least 2.
    """

    initial: Callable[[int, int], float]
    learned: bool = False
    unit_norm: bool = False
    by_length: bool = False
    needs_length: bool = False


# 1 / sqrt(H) keeps the variance of q.k at one while queries and keys are independent (Vaswani et al., arXiv
# 1706.03762, section 3.2.1); 1 / H keeps its size once they have aligned (Yang et al., arXiv 2203.03466, section 4).
# QK-norm (Henry et al., arXiv 2010.04245, section 3) starts its learned temperature at log2(T^2 - T). SSMax (Nakanishi,
# arXiv 2501.19399, section 2) multiplies by s ln n; s starts where the mean of s ln n over rows of 1 to T keys is
# 1 / sqrt(H), and that mean of ln n is ln(T!) / T.
SCALE_RULES = {
    "1/sqrt(H)": ScaleRule(initial=lambda H, T: 1.0 / math.sqrt(H)),
    "1/H": ScaleRule(initial=lambda H, T: 1.0 / H),
    "learned": ScaleRule(initial=lambda H, T: 1.0 / math.sqrt(H), learned=True),
    "qk-norm": ScaleRule(initial=lambda H, T: math.log2(T * T - T), learned=True, unit_norm=True, needs_length=True),
    "ssmax": ScaleRule(
        initial=lambda H, T: T / math.lgamma(T + 1) / math.sqrt(H), learned=True, by_length=True, needs_length=True
    ),
}


def scale_rule(name: str) -> ScaleRule:
    """The rule of this name; ValueError, with the nearest name, if there is none."""
    if name not in SCALE_RULES:
        raise ValueError(unknown("scale", name, SCALE_RULES))
    return SCALE_RULES[name]


def initial_scale(name: str, head_dim: int, length: int | None = None) -> float:
    """The scale of a rule, or where training starts with it.

    Args:
        name: of the rule.
        head_dim: H.
        length: T, the tokens of a training sequence, for "qk-norm" and "ssmax".

    Raises:
        ValueError: there is no such rule, or it needs a `length` of at least 2.
    """
    rule = scale_rule(name)
    if rule.needs_length and (length is None or length < 2):
        raise ValueError(f"training_length is {length}: expected at least 2 tokens, since scale {name!r} starts by it")
    return rule.initial(head_dim, length or 0)


def yarn_factor(stretch: float | int) -> float:
    r"""By how much YaRN multiplies the scores of sequences `stretch` times as long as those of training.

        factor = 1 / t = (0.1 ln(stretch) + 1)^2

    Raises:
        ValueError: `stretch` is not finite, or below 1.

    References:
        Peng et al., "YaRN", arXiv 2309.00071, section 3.4: queries and keys are multiplied by sqrt(1 / t) each.
    """
    if not 1 <= stretch < math.inf:
        raise ValueError(f"stretch is {stretch}: expected a finite number of at least 1")
    return (0.1 * math.log(stretch) + 1) ** 2


_NO_MASK = ("scale", "temperature", "logits_soft_cap", "params", "rng")


def visible_keys(query, key, bias=None, mask=None, **options: Any) -> Float[Array, "..."]:
    """How many keys each query sees, `B T N`. The query times s ln n is the scalable softmax, SSMax.

    Args:
        query, key, bias, mask, options: as in `attention.dot_product_attention`. A bias hides no key here, even if it
            is -inf.

    Cost: O(T), or 2 T S operations in tiles of rows where segments or a dense mask must be counted.
    Error bound: exact below 2^24 keys.
    Raises: as `attention.dot_product_attention`.

    Example:
        >>> import jax, attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 1, 8))
        >>> n = attention.visible_keys(q, k, is_causal=True)
        >>> n[0, :, 0].tolist()
        [1.0, 2.0, 3.0, 4.0]
        >>> ssmax = attention.dot_product_attention(q * 0.4 * jax.numpy.log(n)[..., None], k, v, is_causal=True)

    References:
        Nakanishi, "Scalable-softmax is superior for attention", arXiv 2501.19399, section 2.
    """
    del bias
    masking = {name: option for name, option in options.items() if name not in _NO_MASK}
    inputs = prepare(Exact(), query, key, key, mask=mask, **masking)
    counts = _count(inputs.mask)
    return ungrouped(jnp.broadcast_to(counts, inputs.query.shape[:-1]).astype(inputs.query.dtype), query)


@jax.jit
def _count(mask: Mask) -> Array:
    if mask.query_segments is None and mask.dense is None:
        first, last = mask.key_range()
        return (last - first + 1).clip(0)[:, None, None, :]
    heads = 1 if mask.dense is None else math.prod(mask.dense.shape[:3])
    batch = 1 if mask.query_segments is None else mask.query_segments.shape[0]
    S = mask.num_keys
    return _by_rows(mask.num_queries, S * max(heads, batch), lambda row, rows: mask.tile(row, rows, 0, S).sum(-1))


# Highest degree first; figure 5 of the paper that `adaptive_factor` names.
_INVERSE_TEMPERATURE_OF_ENTROPY = (-0.037, 0.481, -2.3, 4.917, -1.791)
_LOW_ENTROPY = 0.5


def adaptive_factor(query, key, bias=None, mask=None, **options: Any) -> Float[Array, "..."]:
    """By how much adaptive temperature multiplies the scores q.k of each query, `B T N`, once training is over.

        factor = max(1, -0.037 h^4 + 0.481 h^3 - 2.3 h^2 + 4.917 h - 1.791) where h > 0.5, and 1 elsewhere,

    with h the entropy of the row's exact weights, in nats. It multiplies the query, so that it acts before a soft cap
    and a bias; without these it divides the temperature of the row, as in the paper.

    Args:
        query, key, bias, mask, options: as in `attention.dot_product_attention`.

    Cost: 2 T S H operations a head for the logits, and 5 passes over them in tiles of rows: memory O((T + S) H), and
    2^18 logits. No gradient.
    Error bound: no bound known.
    Raises: as `attention.dot_product_attention`.

    Example:
        >>> import jax, attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 8, 16))
        >>> sharper = q * attention.adaptive_factor(q, k, is_causal=True)[..., None]
        >>> attention.dot_product_attention(sharper, k, v, is_causal=True).shape
        (1, 64, 8, 16)

    References:
        Velickovic et al., "softmax is not enough (for sharp out-of-distribution)", arXiv 2410.01104, section 5.
    """
    inputs = prepare(Exact(), query, key, key, bias, mask, **options)
    return ungrouped(_adaptive(inputs), query)


@jax.jit
def _adaptive(inputs: Inputs) -> Float[Array, "B K G T"]:
    inputs = lax.stop_gradient(inputs)
    (B, K, G, T, _), S = inputs.query.shape, inputs.mask.num_keys
    entropy = _by_rows(T, B * K * G * S, lambda row, rows: row_entropy(inputs.masked_scores(row, rows, 0, S)))
    wanted = functools.reduce(lambda total, c: total * entropy + c, _INVERSE_TEMPERATURE_OF_ENTROPY)
    return jnp.where(entropy > _LOW_ENTROPY, jnp.maximum(wanted, 1), jnp.ones_like(entropy))


def row_entropy(logits: Float[Array, "*N S"]) -> Float[Array, "*N"]:
    """The entropy of softmax(logits) in nats, 0 in a row of -inf."""
    top = logits.max(-1, keepdims=True)
    gaps = logits - jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(gaps)
    total = weights.sum(-1)
    total = jnp.where(total > 0, total, 1)
    # Both terms are at least 0, so that the entropy is.
    return jnp.log(total) - jnp.where(weights > 0, weights * gaps, 0).sum(-1) / total


def _by_rows(T: int, width: int, f: Callable[[Array, int], Array]) -> Array:
    """f(row, rows), `... rows`, of consecutive tiles as `... T`; a row is `width` numbers, which sets the tiles."""
    rows = min(T, max(ROWS, AREA // width))
    starts = np.minimum(np.arange(-(-T // rows)) * rows, T - rows)  # the last tile is moved back
    tiles = jnp.moveaxis(lax.map(lambda row: f(row, rows), jnp.asarray(starts)), -1, 1)
    row = np.arange(T)
    return jnp.moveaxis(tiles[row // rows, row - starts[row // rows]], 0, -1)
