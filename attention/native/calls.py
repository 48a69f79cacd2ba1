"""The kernel in C as a function of jax arrays, with its derivative in reverse mode."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.masks import Mask
from attention.method import UnsupportedError
from attention.native.build import ITEMS, KEYS
from attention.native.reverse import reverse_only

WIDTH = 32  # numbers, to a multiple of which rows are filled up at most
PARTS = 8  # the most partial sums that a head has
FEW = 8  # queries, up to which their arithmetic one by one takes less time than that of a panel
PART = 1024  # keys of an item, where queries are few


class Sight(NamedTuple):
    """What each query sees: the keys from first to last, of these those of its segment, and of these those shown to it.

    Attributes:
        first, last: `B T`.
        queries, keys: `B T` and `B S`, or `B 0` where there are no segments.
        shown: `b k g t s`, each axis whole or of size 1; or `1 1 1 1 0`.
    """

    first: Int[Array, "*B T"]
    last: Int[Array, "*B T"]
    queries: Int[Array, "*B t"]
    keys: Int[Array, "*B s"]
    shown: Bool[Array, "*b k g t s"]


def attend(inputs: Inputs, *, tabled: bool = False) -> Float[Array, "B K G T E"]:
    """The output, as a kernel of `attention.fused.kernels` gives it: keys and values may have 16 bits."""
    del tabled  # it takes no table
    return attend_with_residual(inputs)[0]


def attend_with_residual(inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
    """The output and the log of the sum of exponentials of each row, -inf where it sees no key."""
    B, K, G, T, H = inputs.query.shape
    query = jnp.moveaxis(inputs.query, 3, 1).reshape(B, T, K * G, H)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (inputs.key, inputs.value))
    operands = map(reverse_only, (query, key, value, caps_of(inputs.soft_cap, query)))
    output, residual = _attention(*operands, sight_of(inputs.mask, B))
    return jnp.moveaxis(output.reshape(B, T, K, G, -1), 1, 3), residual.reshape(B, K, G, T)


def caps_of(soft_cap: Float[Array, ""] | None, query: Float[Array, "B T N H"]) -> Float[Array, "B c"]:
    """The cap of each batch element, or `B 0` where there is none."""
    B = query.shape[0]
    none = query[:, :1, :1, :0].reshape(B, 0)  # of the query, so that it varies over the axes of a mesh as that does
    return none if soft_cap is None else jnp.concatenate([none, jnp.full((B, 1), soft_cap)], axis=1)


def sight_of(mask: Mask, B: int) -> Sight:
    first, last = (jnp.broadcast_to(x, (B, mask.num_queries)).astype(jnp.int32) for x in mask.key_range())
    queries = keys = jnp.zeros((B, 0), jnp.int32)
    if mask.query_segments is not None and mask.key_segments is not None:
        queries, keys = _numbered(mask.query_segments, mask.key_segments)
    shown = jnp.zeros((1, 1, 1, 1, 0), bool) if mask.dense is None else mask.dense
    return Sight(first, last, queries, keys, shown)


def _numbered(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """Segment ids in 32 bits, equal where they were: by their ranks where they had more."""
    if max(queries.dtype.itemsize, keys.dtype.itemsize) > 4:
        known = jnp.sort(jnp.concatenate([queries, keys], axis=1))
        queries, keys = (jax.vmap(jnp.searchsorted)(known, ids) for ids in (queries, keys))
    return queries.astype(jnp.int32), keys.astype(jnp.int32)


@jax.custom_vjp
def _attention(query, key, value, caps, sight: Sight) -> tuple[Float[Array, "B T N E"], Float[Array, "B N T"]]:
    *batch, T, N, _ = query.shape
    S, E = key.shape[-3], value.shape[-1]
    shapes = [like(query, *batch, T, N, E), like(query, *batch, N, T)]
    shapes.append(like(query, *batch, N * T * (E + 2), -(-S // PART)) if T <= FEW else tiles_like(query, key, value))
    name = "attention_lab_decode" if T <= FEW else "attention_lab_forward"
    call = jax.ffi.ffi_call(name, shapes, vmap_method="broadcast_all")
    output, residual, *_ = call(query, key, value, caps, *sight)
    return output, residual


def like(x: Float[Array, "..."], *shape: int) -> Any:
    """The type of a result of another shape, which varies over the axes of a mesh that `x` varies over."""
    kind = jax.typeof(x)
    mesh = kind.sharding.mesh
    where = None if mesh.empty else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where, manual_axis_type=kind.manual_axis_type)


def tiles_like(query, key, value) -> Any:
    """Room for whole tiles of keys and values, float32 and side by side, which all blocks of queries read."""
    *batch, S, K, H = key.shape
    return like(query, *batch, K, S // KEYS, KEYS, wide(H, value.shape[-1]))


def wide(*sizes: int) -> int:
    """Room for rows of these sizes, filled up to whole vectors of a block."""
    return sum(-(-size // WIDTH) * WIDTH for size in sizes)


def _forward(query, key, value, caps, sight: Sight):
    results = _attention(query, key, value, caps, sight)
    return results, (query, key, value, caps, sight, *results)


def _backward(kept, cotangents):
    return *_gradients(*kept, *cotangents), None


@jax.custom_jvp
def _gradients(query, key, value, caps, sight: Sight, output, residual, d_output, d_residual):
    """The cotangents of query, key, value and caps."""
    *batch, T, N, H = query.shape
    S, K, E = key.shape[-3], key.shape[-2], value.shape[-1]
    heads = query.size // (T * N * H) * K
    parts = min(PARTS, -(-ITEMS // heads), -(-T // WIDTH))
    shapes = [like(x, *x.shape) for x in (query, key, value)]
    shapes.append(like(query, *batch, N, T * caps.shape[-1]))
    shapes += [tiles_like(query, key, value), like(query, *batch, K, S, wide(H, E), parts)]
    call = jax.ffi.ffi_call("attention_lab_backward", shapes, vmap_method="broadcast_all")
    *gradients, ratios, _, _ = call(query, key, value, caps, *sight, output, residual, d_output, d_residual)
    # c tanh(l / c) has the derivative r - (1 - r^2) l / c by c, and the sum of dS (1 - r^2) l over the keys is dQ . Q.
    by_cap = ratios.sum((-2, -1))[..., None] - (gradients[0] * query).sum((-3, -2, -1))[..., None] / caps
    return *(d.astype(x.dtype) for d, x in zip(gradients, (query, key, value), strict=True)), by_cap


@_gradients.defjvp
def _refused(primals, tangents):
    raise UnsupportedError("Fused(implementation='native') has no derivatives of second order: Chunked() has them")


_attention.defvjp(_forward, _backward)
