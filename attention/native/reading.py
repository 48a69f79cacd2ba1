"""Attention to some pages of keys in C: in float32, and in 16 bits. No derivative: what calls it has one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.masks import Mask
from attention.native.build import PARTS
from attention.native.calls import caps_of, like, sight_of, tiles_like

UNIT = 8  # keys, of which a page is a multiple
WHOLE = 32700.0  # how long the integers of a query or a key are: no sum of products leaves 32 bits

Read = tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]


class HalfKeys(NamedTuple):
    """Keys and values in 16 bits: integers times a scale, and bfloat16.

    Attributes:
        key, value: `B S K H` and `B S K E`.
        scale: of the keys, `B S K`.
    """

    key: Int[Array, "B S K H"]
    value: Float[Array, "B S K E"]
    scale: Float[Array, "B S K"]


def read(inputs: Inputs, pages: Bool[Array, "B K G P T"], page: int) -> Read:
    """Output and log of the sum of exponentials over the keys that a row sees in the pages that it reads.

    Args:
        inputs: the operands; a bias is not looked at.
        pages: whether a row reads the keys from `page` i on; none beyond the last one.
        page: how many keys a page has, a multiple of `UNIT`.
    """
    query, key, value = _across(inputs)
    operands = query, key, value, caps_of(inputs.soft_cap, query)
    return _called("attention_lab_read", operands, inputs, pages, (), page, tiles_like(query, key, value))


def read_halved(inputs: Inputs, keys: HalfKeys, pages: Bool[Array, "B K G P T"], page: int) -> Read:
    """The same in 16 bits, where `build.has_halves()`: over `keys`, those of the inputs, with weights in bfloat16.

    A cap is not looked at.
    """
    query, scale = integers(_across(inputs)[0])
    operands = query, keys.key, keys.value, caps_of(None, scale[..., None])
    return _called("attention_lab_halved", operands, inputs, pages, (scale, keys.scale), page)


def read_pages(
    query: Float[Array, "B K G H"],
    key: Float[Array, "B K P C H"],
    value: Float[Array, "B K P C E"],
    slots: Int[Array, "B K G m"],
    mask: Mask,
    soft_cap: Float[Array, ""] | None,
) -> tuple[Float[Array, "B K G E"], Float[Array, "B K G"]]:
    """The same of one query a head over a list of pages, -1 for none; the mask has neither segments nor a table."""
    (B, K, G, _), E = query.shape, value.shape[-1]
    first, last = (jnp.broadcast_to(x, (B, 1)).astype(jnp.int32) for x in mask.key_range())
    shapes = [like(query, B, K, G, E), like(query, B, K, G), like(query, B, K, G, PARTS, E + 2)]
    call = jax.ffi.ffi_call("attention_lab_paged", shapes, vmap_method="broadcast_all")
    output, residual, _ = call(query, key, value, caps_of(soft_cap, query), first, last, slots.astype(jnp.int32))
    return output, residual


def half_keys(inputs: Inputs) -> HalfKeys:
    """The keys and values rounded to 16 bits."""
    query, key, value = _across(inputs)
    key, scale = integers(key.astype(query.dtype))
    return HalfKeys(key, value.astype(jnp.bfloat16), scale)


def integers(x: Float[Array, "*B H"]) -> tuple[Int[Array, "*B H"], Float[Array, "*B"]]:
    """Integers of 16 bits, and what they are to be multiplied by: 0 for a vector whose size vanishes."""
    largest = jnp.abs(x).max(-1)
    unit = jnp.where(largest > 0, largest, 1)
    scale = unit * jnp.linalg.norm(x / unit[..., None], axis=-1) / WHOLE
    scale = jnp.where(scale >= jnp.finfo(x.dtype).tiny, scale, 0)
    return jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int16), scale


def _across(inputs: Inputs):
    """Query, key and value as the caller of attention lays them out."""
    B, K, G, T, H = inputs.query.shape
    query = jnp.moveaxis(inputs.query, 3, 1).reshape(B, T, K * G, H)
    return query, *(jnp.swapaxes(x, 1, 2) for x in (inputs.key, inputs.value))


def _called(name: str, operands, inputs: Inputs, pages, scales, page: int, *room) -> Read:
    B, K, G, T, _ = inputs.query.shape
    assert page % UNIT == 0, f"pages of {page} keys are no multiple of {UNIT}"
    sight = sight_of(inputs.mask, B)
    shapes = [like(inputs.query, B, T, K * G, inputs.value.shape[-1]), like(inputs.query, B, K * G, T), *room]
    call = jax.ffi.ffi_call(name, shapes, vmap_method="broadcast_all")
    output, residual, *_ = call(*operands, *sight, pages, *scales, page=np.int64(page))
    return jnp.moveaxis(output.reshape(B, T, K, G, -1), 1, 3), residual.reshape(B, K, G, T)
