"""What attention does in each head: how sharp it is, where it looks, and whether a method keeps its order."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.checks import checked_window
from attention.exact import Exact
from attention.inputs import Inputs, prepare
from attention.masks import Mask
from attention.method import Method
from attention.ranking import largest_sum, ordered_pairs

AREA = 2**18  # logits in a tile, of all heads together: 1 MiB in float32
ROWS = 16  # rows of a tile at least, so that a key is read from memory for more than one product


class Diagnostics(NamedTuple):
    """One number a query head for each of the columns of a monitor; `diagnostics` defines them."""

    entropy: Float[Array, " N"]
    largest_logit: Float[Array, " N"]
    effective_keys: Float[Array, " N"]
    sink_mass: Float[Array, " N"]
    window_mass: Float[Array, " N"]
    top_mass: Float[Array, " N"]
    monotonicity: Float[Array, " N"]


def diagnostics(
    query,
    key,
    bias=None,
    mask=None,
    *,
    method: Method = Exact(),
    window: int | tuple[int, int] = 16,
    k: int = 16,
    sampled_keys: int = 32,
    **options: Any,
) -> Diagnostics:
    r"""What softmax attention does in each head on these queries and keys, whatever method stands in for it.

    With the logits l_ij of query i (scale, temperature, cap, bias and mask in them) and p_i = softmax(l_i), averaged
    over all queries of the batch that see a key:

        entropy         -sum_j p_ij log p_ij, in nats: 0 to the log of the number of visible keys
        effective_keys  1 / sum_j p_ij^2: 1 to the number of visible keys, and at most e^entropy of the same row
        sink_mass       the weight of the first token of the sequence, or of the query's own segment
        window_mass     sum of p_ij over keys j that lie at most `window` from i's position
        top_mass        sum of the k largest p_ij; what `TopK` of the same k keeps, if nothing ties

    and over all queries and keys together:

        largest_logit   max l_ij over visible j; -inf in a head that sees nothing
        monotonicity    1 - 2 reversed / (kept + reversed), over the pairs of keys that one query sees, with different
                        logits and different weights under `method`: whether the larger logit has the larger weight

    The last is Goodman and Kruskal's gamma. It is 1 for a method that equals softmax attention, 0 for weights in random
    order, and 1 where no pair is told apart. The weights of a method are its outputs for values that are one at one
    key and zero elsewhere; all pairs among `sampled_keys` evenly spaced keys are counted.

    Args:
        query: `B T N H` or `T N H`, float16, bfloat16, float32 or float64.
        key: `B S K H`.
        bias, mask, options: as in `attention.dot_product_attention`: the arguments of scale, temperature, soft cap,
            masking and parameters. The same numbers give the same beta here as there.
        method: whose monotonicity is measured; the other numbers do not depend on it.
        window: (left, right), in the positions that `local_window_size` counts; one number for both.
        k: how many of the largest weights `top_mass` adds up.
        sampled_keys: keys among which `monotonicity` compares.

    Returns:
        `Diagnostics`, arrays of shape `(N,)` in float32 (float64 for float64 operands). Means are NaN in a head in
        which no query sees a key.

    Cost: 2 T S H operations for the logits, about 2 T S for each of 16 passes over them, and sampled_keys^2 T for the
    pairs, a head, causal or not. Where `method` is not exact, one pass of it over values of size `sampled_keys` more.
    Memory O((T + S) (H + sampled_keys)) a head: rows are read in tiles of 2^18 logits, or of 16 rows where these are
    more. No gradient.

    Error: that of the weights, and 2 S eps in a sum over S keys, with eps that of the computation.

    Raises:
        As `attention.dot_product_attention`; ValueError where `window`, `k` or `sampled_keys` is out of range.

    Example:
        >>> import jax, attention
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 128, 8, 64))
        >>> attention.diagnostics(q, k, temperature=float("inf")).effective_keys.round(1).tolist()[0]
        128.0

    References:
        Hill, "Diversity and evenness", Ecology 54 (1973): e^entropy and 1 / sum p^2 as effective numbers, of order
        1 and 2.
        Zhai et al., "Stabilizing Transformer training by preventing attention entropy collapse", arXiv 2303.06296,
        section 3.
        Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", arXiv 2309.14322,
        section 3.1: the largest logit.
        Xiao et al., "Efficient streaming language models with attention sinks", arXiv 2309.17453, section 3.1.
        Zhang et al., "The Hedgehog & the Porcupine", arXiv 2402.04347, section 3: spikiness and monotonicity.
        Goodman and Kruskal, "Measures of association for cross classifications", JASA 49 (1954), section 6.
    """
    for name, count in (("k", k), ("sampled_keys", sampled_keys)):
        if isinstance(count, bool) or not isinstance(count, int) or count <= 0:
            raise ValueError(f"{name} is {count!r}: expected an integer of at least 1")
    around = checked_window(window, "window")
    inputs = prepare(method, query, key, key, bias, mask, **options)
    # The positions of queries do not depend on masks, but a mask that needs none does not have them.
    places = {name: options[name] for name in _PLACES if name in options}
    nearby = prepare(Exact(), query, key, key, local_window_size=around, **places).mask
    nearby = dataclasses.replace(nearby, query_lengths=None, key_lengths=None)
    return _measured(inputs, nearby, method=method, k=k, sampled_keys=sampled_keys)


_PLACES = ("causal_alignment", "query_seq_lengths", "key_value_seq_lengths")


class _Sums(NamedTuple):
    """What a tile of rows adds up for each head, `K G`."""

    rows: Array
    means: dict[str, Array]
    largest_logit: Array
    told_apart: Array
    kept: Array


@partial(jax.jit, static_argnames=("method", "k", "sampled_keys"))
def _measured(inputs: Inputs, nearby: Mask, *, method: Method, k: int, sampled_keys: int) -> Diagnostics:
    inputs = lax.stop_gradient(inputs)
    (B, K, G, T, _), S = inputs.query.shape, inputs.mask.num_keys
    columns = np.arange(min(sampled_keys, S)) * S // min(sampled_keys, S)
    weights = None if method.capabilities.exact else _weights_of(method, inputs, columns)
    rows = min(T, max(ROWS, AREA // (B * K * G * S)))
    first = _first_tokens(inputs.mask)

    def tile(i):
        row = jnp.minimum(i * rows, T - rows)  # the last tile is moved back, and counts the rows that are its own
        logits = inputs.masked_scores(row, rows, 0, S)
        own = (row + jnp.arange(rows) >= i * rows).reshape(1, 1, 1, rows)
        near = nearby.tile(row, rows, 0, S)
        compared = None
        if weights is not None:
            compared = logits[..., columns], lax.dynamic_slice_in_dim(weights, row, rows, axis=3)
        return _summed(logits, own, first, near, k, compared)

    parts = lax.map(tile, jnp.arange(-(-T // rows)))
    sums = jax.tree.map(lambda x: x.sum(0), parts)
    pairs = jnp.maximum(sums.told_apart, 1)
    return Diagnostics(
        largest_logit=parts.largest_logit.max(0).reshape(-1),
        monotonicity=(1 - 2 * (sums.told_apart - sums.kept) / pairs).reshape(-1),
        **{name: (x / sums.rows).reshape(-1) for name, x in sums.means.items()},
    )


def _summed(logits: Array, own: Bool[Array, "1 1 1 R"], first: Array, near: Array, k: int, compared) -> _Sums:
    """The sums over the batch and the rows that are `own` and see a key, of one tile of logits, `B K G R S`."""
    top = logits.max(-1)
    seeing = ~jnp.isneginf(top)  # NaN counts, so that it cannot go unnoticed
    gaps = logits - jnp.where(seeing, top, 0)[..., None]
    weights = jnp.exp(gaps)
    total = jnp.where(seeing, weights.sum(-1), 1)
    numbers = {
        # Both terms are at least 0, so that the entropy is.
        "entropy": jnp.log(total) - jnp.where(weights > 0, weights * gaps, 0).sum(-1) / total,
        "effective_keys": total * (total / (weights * weights).sum(-1)),
        "sink_mass": jnp.where(first, weights, 0).sum(-1) / total,
        "window_mass": jnp.where(near, weights, 0).sum(-1) / total,
        "top_mass": largest_sum(weights, k) / total,
    }
    counted = seeing & own
    told_apart = kept = jnp.zeros_like(top, jnp.int32)
    if compared is not None:
        told_apart, kept = ordered_pairs(*compared)
    return _Sums(
        rows=counted.sum((0, 3), dtype=logits.dtype),
        means={name: jnp.where(counted, x, 0).sum((0, 3)) for name, x in numbers.items()},
        largest_logit=top.max((0, 3)),
        told_apart=jnp.where(own, told_apart, 0).sum((0, 3), dtype=logits.dtype),
        kept=jnp.where(own, kept, 0).sum((0, 3), dtype=logits.dtype),
    )


def _weights_of(method: Method, inputs: Inputs, columns: np.ndarray) -> Float[Array, "B K G T C"]:
    """The weights that a method gives to some keys: its outputs for values that are one there and zero elsewhere."""
    one_hot = jnp.arange(inputs.mask.num_keys)[:, None] == jnp.asarray(columns)[None, :]
    value = jnp.broadcast_to(one_hot.astype(inputs.key.dtype), (*inputs.key.shape[:3], columns.size))
    return method.attend(dataclasses.replace(inputs, value=value))


def _first_tokens(mask: Mask) -> Bool[Array, "b 1 1 1 S"]:
    """Which keys are the first of their sequence, or of their segment."""
    if mask.key_segments is None:
        first = (jnp.arange(mask.num_keys) == 0)[None]
    else:
        order = jnp.argsort(mask.key_segments, axis=1, stable=True)
        by_segment = jnp.take_along_axis(mask.key_segments, order, axis=1)
        opens = jnp.concatenate([jnp.ones_like(order[:, :1], bool), by_segment[:, 1:] != by_segment[:, :-1]], axis=1)
        first = jnp.put_along_axis(opens, order, opens, axis=1, inplace=False)
    return first[:, None, None, None, :]
