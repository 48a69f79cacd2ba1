"""What is measured in training and evaluation, and where a number stopped being finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import entr
from jaxtyping import Array, Float, Int

import attention


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean loss in nats per byte."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets.astype(jnp.int32)).mean()


def bits_per_byte(nats: float) -> float:
    """A loss in nats per byte, in bits per byte."""
    return nats / float(np.log(2))


def attention_entropy(query, key, *, scale, temperature) -> Float[Array, " N"]:
    r"""Mean entropy of the causal softmax weights of each head, in nats.

    -sum_j p_ij log p_ij, averaged over the batch and the positions i. These are the weights of exact
    attention on the model's own queries and keys, at the run's scale and temperature, whatever the method.

    Args:
        query: `B T N H`.
        key: `B T K H`.
        scale, temperature: as in `attention.dot_product_attention`.

    Cost: 2 T^2 H operations and 4 T^2 bytes a head.
    """
    weights = attention.attention_steps(query, key, key, scale=scale, temperature=temperature, is_causal=True).weights
    return entr(weights).sum(-1).mean((0, 2))


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
