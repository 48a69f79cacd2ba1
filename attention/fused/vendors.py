"""How each vendor's kernel is called: operands in its layout, what is hidden in the form that it knows."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.masks import Mask


class Operands(NamedTuple):
    """Operands in the layout of `jax.nn`.

    Attributes:
        query: `B T N H`, times beta, rounded to the dtype of the keys.
        key, value: `B S K H`; the smaller of H and E is padded with zeros.
        causal: whether query i sees keys up to i alone.
        window: how many keys before its own a query sees, where `causal`; or None.
        lengths: `B`, how many keys there are, at least 1; or None.
        visible: `b n T S`, where the fields before cannot say what is hidden; or None.
        bias: as `visible`, and finite; or None.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    causal: bool
    window: int | None
    lengths: Int[Array, " B"] | None
    visible: Bool[Array, "b n T S"] | None
    bias: Float[Array, "b n T S"] | None


def jax_nn(inputs: Inputs, *, tabled: bool, implementation: Any) -> Float[Array, "B K G T E"]:
    """`jax.nn.dot_product_attention`, with float32 products where XLA makes them, on every backend."""
    if implementation == "xla":
        query, scale = as_given(inputs)
        inputs = dataclasses.replace(inputs, query=query.astype(inputs.query.dtype))
    else:
        scale = 1.0  # cuDNN compiles it in
    given, sees = _operands(inputs, tabled=tabled)
    bias = given.bias
    if implementation == "cudnn" and bias is not None:
        bias = bias.astype(given.query.dtype)
    with jax.default_matmul_precision("float32"):
        output = jax.nn.dot_product_attention(
            given.query,
            given.key,
            given.value,
            bias,
            given.visible,
            scale=scale,
            is_causal=given.causal,
            key_value_seq_lengths=given.lengths,
            local_window_size=None if given.window is None else (given.window, 0),
            implementation=implementation,
        )
    return _restored(output, sees, inputs)


def as_given(inputs: Inputs) -> tuple[Float[Array, "B K G T H"], Any]:
    """The query that "xla" is given, in the dtype of the keys, and the scale that it multiplies the logits by.

    Divided by beta and rounded, the query is the caller's own 16-bit one again, so that nothing is lost. One beta a
    head stays in the query, since `jax.nn` takes one scale; so does it in float32, where nothing would be gained.
    """
    scale: Any = 1.0
    if inputs.key.dtype != inputs.query.dtype and inputs.beta.ndim == 0:
        scale = jnp.where(inputs.beta == 0, 1, inputs.beta)
    return (inputs.query / scale).astype(inputs.key.dtype), scale


def tokamax(inputs: Inputs, *, tabled: bool, implementation: Any) -> Float[Array, "B K G T E"]:
    """`tokamax.dot_product_attention`; it falls back to another kernel unless told which."""
    import tokamax  # ty: ignore[import-not-found] (optional: the extra `fused`)
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # tokamax would parse the command line of this program as its own
    given, sees = _operands(inputs, tabled=tabled)
    output = tokamax.dot_product_attention(
        given.query,
        given.key,
        given.value,
        given.bias,
        given.visible,
        scale=1.0,
        is_causal=given.causal,
        key_value_seq_lengths=given.lengths,
        local_window_size=None if given.window is None else (given.window, 0),
        precision=lax.Precision.HIGHEST,
        implementation=implementation,
    )
    return _restored(output, sees, inputs)


def splash(inputs: Inputs, *, tabled: bool, interpret: bool = False) -> Float[Array, "B K G T E"]:
    """The splash attention kernel that jax ships for TPUs; `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    given, sees = _operands(inputs, tabled=tabled)
    shape = (inputs.mask.num_queries, inputs.mask.num_keys)
    hidden = kernels.CausalMask(shape) if given.causal else kernels.FullMask(shape)
    if given.window is not None:
        hidden = kernels.LocalMask(shape, (given.window, 0), offset=0)
    every = kernels.MultiHeadMask([hidden] * given.query.shape[2])
    kernel = kernels.make_splash_mha(mask=every, head_shards=1, q_seq_shards=1, interpret=interpret)
    ids = _segment_ids(inputs.mask, given.lengths)
    segments = None if ids is None else kernels.SegmentIds(*ids)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (given.query, given.key, given.value)]
    output = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segment_ids=segments))(*heads_first, segments)
    return _restored(jnp.swapaxes(output, 1, 2), sees, inputs)


def _operands(inputs: Inputs, *, tabled: bool) -> tuple[Operands, Bool[Array, "b k g T"]]:
    """The operands, and which queries see any key; `tabled` writes out every hidden pair."""
    mask, B = inputs.mask, inputs.query.shape[0]
    width = max(inputs.query.shape[-1], inputs.value.shape[-1])
    query = jnp.moveaxis(inputs.query.astype(inputs.key.dtype), 3, 1)
    query = query.reshape(B, mask.num_queries, -1, query.shape[-1])
    wide = [
        jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),))
        for x in (query, jnp.swapaxes(inputs.key, 1, 2), jnp.swapaxes(inputs.value, 1, 2))
    ]
    if not tabled:
        lengths = _key_lengths(mask)
        if lengths is not None:
            # A kernel may divide 0 by 0 where there is no key: it is given one, which `emptied` has set to zero.
            lengths = jnp.broadcast_to(lengths, (B,)).clip(1).astype(jnp.int32)
        window = None if mask.window is None else min(mask.window[0], mask.num_keys)
        return Operands(*wide, mask.causal and mask.offset is None, window, lengths, None, None), _sees_any(mask)
    visible, bias = mask.whole(), None
    if inputs.bias is not None:
        visible = visible & ~jnp.isneginf(inputs.bias)
        bias = _by_head(jnp.where(visible, inputs.bias, 0))
    return Operands(*wide, False, None, None, _by_head(visible), bias), visible.any(-1)


def _restored(output: Float[Array, "B T N H"], sees: Bool[Array, "b k g T"], inputs: Inputs):
    """`B T N H` as `B K G T E` in the dtype of the query; 0, with gradient 0, in rows that see no key."""
    B, K, G, T, _ = inputs.query.shape
    output = output[..., : inputs.value.shape[-1]].astype(inputs.query.dtype)
    output = jnp.moveaxis(output.reshape(B, T, K, G, -1), 1, 3)
    return jnp.where(sees[..., None], output, 0)


def _by_head(table: Array) -> Array:
    """`b k g T S` as `b n T S`."""
    b, k, g, T, S = table.shape
    return table.reshape(b, k * g, T, S)


def _key_lengths(mask: Mask) -> Int[Array, " b"] | None:
    """How many keys there are for every query: one query, wherever it stands, makes causality a length."""
    if mask.offset is None or not mask.causal:
        return mask.key_lengths
    return mask.offset + 1 if mask.key_lengths is None else jnp.minimum(mask.offset + 1, mask.key_lengths)


def _sees_any(mask: Mask) -> Bool[Array, "b 1 1 T"]:
    """Which queries see a key, by band, lengths and segments; exact where segments come without a window."""
    first, last = mask.key_range()
    sees = first <= last
    if mask.query_segments is not None and mask.key_segments is not None:

        def earliest(queries, keys):  # the first key of each query's segment, S where there is none
            order = jnp.argsort(keys, stable=True)
            at = order[jnp.searchsorted(keys[order], queries).clip(max=keys.size - 1)]
            return jnp.where(keys[at] == queries, at, keys.size)

        sees &= jax.vmap(earliest)(mask.query_segments, mask.key_segments) <= last
    return sees[:, None, None, :]


def _segment_ids(mask: Mask, lengths: Int[Array, " B"] | None) -> tuple[Array, Array] | None:
    """Segments and lengths as one pair of segment ids, in which -1 marks a key that no query sees."""
    queries, keys = mask.query_segments, mask.key_segments
    if queries is None or keys is None:
        if lengths is None:
            return None
        queries, keys = (jnp.zeros((lengths.size, n), jnp.int32) for n in (mask.num_queries, mask.num_keys))

    def ranked(queries, keys):  # ids may be any integers, so that none is free to mark with
        known = jnp.sort(queries)
        ranks = [jnp.searchsorted(known, ids).astype(jnp.int32) for ids in (queries, keys)]
        member = known[ranks[1].clip(max=known.size - 1)] == keys
        return ranks[0], jnp.where(member, ranks[1], -1)

    queries, keys = jax.vmap(ranked)(queries, keys)
    if lengths is not None:
        keys = jnp.where(jnp.arange(mask.num_keys)[None] < lengths[:, None], keys, -1)
    return queries, keys
