"""What is measured in training and evaluation, and where a number stopped being finite."""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

import attention


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], counts: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """Mean loss in nats per token, over all of them or those that count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets.astype(jnp.int32))
    return losses.mean() if counts is None else jnp.where(counts, losses, 0).sum() / counts.sum()


def accuracy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"], counts: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The share of the tokens that count whose logit is the largest."""
    return (counts & (logits.argmax(-1) == targets)).sum() / counts.sum()


def bits_per_byte(nats: float) -> float:
    """A loss in nats per byte, in bits per byte."""
    return nats / float(np.log(2))


SHARE = 8
"""One in so many sequences of a batch is looked at, so that looking costs some percent of an evaluation."""

SHOWN: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "entropy": ("entropy (nats)", statistics.fmean),
    "largest_logit": ("largest logit", max),
    "effective_keys": ("effective keys", statistics.fmean),
    "sink_mass": ("mass on the first token", statistics.fmean),
    "window_mass": ("mass within 16 tokens", statistics.fmean),
    "top_mass": ("mass of the 16 largest", statistics.fmean),
    "monotonicity": ("monotonicity", statistics.fmean),
}
"""The numbers of `attention.Diagnostics`: what each is called, and what stands for all heads together."""


def attention_diagnostics(layers: Sequence[tuple[Any, Any]], *, scale, **numbers: Any) -> dict[str, Array]:
    """`attention.diagnostics` of causal layers as they attend, on an eighth of the batch.

    Args:
        layers: of each what it attends with, query `B T N H`, key and value `B T K H`, and its attention.
        scale: as in `attention.dot_product_attention`; None for each layer's own.
        numbers: `temperature` and `logits_soft_cap`, as there.

    Returns:
        The numbers by name, layers x heads.
    """

    def look(method, query, key, scale, params):
        return attention.diagnostics(query, key, method=method, params=params, scale=scale, is_causal=True, **numbers)

    found: dict[int, attention.Diagnostics] = {}
    # Layers of one method are looked at together, so that the program does not grow with their number.
    for method in dict.fromkeys(layer.method for _, layer in layers):
        members = [i for i, (_, layer) in enumerate(layers) if layer.method == method]
        some = [(looked_at(layers[i], scale), layers[i][1].params()) for i in members]
        (query, key, _, own), params = jax.tree.map(lambda *x: jnp.stack(x), *some)
        together = jax.vmap(functools.partial(look, method))(query, key, own, params)
        found |= {i: jax.tree.map(lambda x, at=at: x[at], together) for at, i in enumerate(members)}
    return jax.tree.map(lambda *x: jnp.stack(x), *(found[i] for i in range(len(layers))))._asdict()


def looked_at(layer: tuple[Any, Any], scale) -> tuple[Array, Array, Array, Array]:
    """Query, key and value of an eighth of the batch, and the scale, or where it is None the layer's own."""
    attended, module = layer
    own = jnp.asarray(module.scale[...] if scale is None else scale)
    return *(x[: -(-len(x) // SHARE)] for x in attended), own


def evaluation_fields(loss: float, numbers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What an evaluation records beside its loss: layers x heads as lists, `accuracy`, or bits for the loss of text."""
    fields: dict[str, Any] = {} if "accuracy" in numbers else {"bits_per_byte": bits_per_byte(loss)}
    for name, x in numbers.items():
        fields[name] = [[compact(head) for head in layer] for layer in x.tolist()] if x.ndim else float(x)
    return fields


def compact(number: float) -> float | None:
    """A float32 number in as many digits as it has, for files; None where it is not finite, which JSON lacks."""
    return float(f"{number:.7g}") if math.isfinite(number) else None


def named_leaves(tree) -> dict[str, Array]:
    """The arrays of a tree by their path, such as `blocks/0/attention/query/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def suspects(loss, gradients, norm, parameters) -> dict[str, Array]:
    """What can stop being finite in a step, by name, in the order of computation."""
    return {
        "loss": loss,
        **{f"gradient of {name}": leaf for name, leaf in named_leaves(gradients).items()},
        "gradient norm": norm,
        **{f"parameter {name}": leaf for name, leaf in named_leaves(parameters).items()},
    }


def first_nonfinite(tensors: dict[str, Array]) -> Int[Array, ""]:
    """The index of the first tensor with a NaN or Inf, -1 if there is none."""
    bad = jnp.stack([~jnp.isfinite(x).all() for x in tensors.values()])
    return jnp.where(bad.any(), jnp.argmax(bad), -1)
