"""What other methods would do in a model's own place: their errors on its queries, keys and values."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import attention
from attention.method import Certificate
from attention.rounding import norms
from experiments.metrics import looked_at


def attention_errors(
    layers: Sequence[tuple[Any, Any]], methods: Sequence[attention.Method], *, scale, **numbers: Any
) -> dict[str, Array]:
    """The error of each method against exact attention in causal layers as they attend, on an eighth of the batch.

        error = rms ||o - o_exact|| / rms ||o_exact||,    bound = rms min(b, b_hull) / rms ||o_exact||

    over the rows of a head, with b the certificate's bound and b_hull = ||o|| + max ||v||, which holds for anything.

    Args:
        layers: of each what its attention takes, query `B T N H`, key and value `B T K H`, and its attention.
        methods: whose errors; what they draw is drawn from one fixed key, what they train is as it starts.
        scale: as in `attention.dot_product_attention`; None for each layer's own.
        numbers: `temperature` and `logits_soft_cap`, as there.

    Returns:
        `error of <method>`, and `bound of <method>` where it has a certificate, layers x heads.
    """
    operands = jax.tree.map(lambda *x: jnp.stack(x), *(looked_at(layer, scale) for layer in layers))
    found: dict[str, Array] = {}
    for method in methods:
        look = jax.vmap(functools.partial(_errors, method, **numbers))
        error, bound = look(*operands)
        found[f"error of {method!r}"] = error
        if method.capabilities.certificate != "none":
            found[f"bound of {method!r}"] = bound
    return found


def _errors(method: attention.Method, query, key, value, scale, **numbers: Any) -> tuple[Array, Array]:
    """Error and bound of one layer, a number a head; lengths in float32."""
    numbers |= {"scale": scale, "is_causal": True}
    params = method.init(jax.random.key(0), num_heads=query.shape[2], head_dim=query.shape[3])
    exact = attention.dot_product_attention(query, key, value, method=attention.Chunked(), **numbers)
    output, certificate = attention.certified_attention(query, key, value, method=method, params=params, **numbers)
    exact, output, value = (x.astype(jnp.float32) for x in (exact, output, value))
    size = _rms(norms(exact))
    return _rms(norms(output - exact)) / size, _rms(_known(certificate, output, value)) / size


def _known(certificate: Certificate, output, value) -> Float[Array, "B T N"]:
    farthest = norms(value).max(1, keepdims=True)  # in the caller's units, over all keys: more than a row sees
    repeated = jnp.repeat(farthest, output.shape[2] // farthest.shape[2], axis=2)
    return jnp.minimum(certificate.error_bound, norms(output) + repeated)


def _rms(x: Float[Array, "B T N"]) -> Float[Array, " N"]:
    return jnp.sqrt(jnp.square(x).mean((0, 1)))
