"""More queries and keys, which neither see nor are seen, so that tiles and blocks come out even."""

import dataclasses

import jax.numpy as jnp

from attention.inputs import Inputs


def padded(inputs: Inputs, rows: int, cols: int) -> Inputs:
    """The inputs with as many more queries and keys, none of which sees or is seen, as fill tiles of rows by cols."""
    mask, T, S = inputs.mask, inputs.mask.num_queries, inputs.mask.num_keys
    more_rows, more_cols = -T % rows, -S % cols
    if not more_rows and not more_cols:
        return inputs

    def grown(x, axes, least: int = 0):
        """Padded with zeros along `axes`, but for those of a size of at most `least`, which stand for every index."""
        if x is None:
            return None
        return jnp.pad(x, [(0, axes.get(n, 0) if size > least else 0) for n, size in enumerate(x.shape)])

    known = [x.shape[0] for x in (mask.offset, mask.query_lengths, mask.key_lengths, mask.dense) if x is not None]
    batch = max(known, default=1)  # as many as the mask has, of which one may stand for all
    lengths = {
        "query_lengths": jnp.full((batch,), T) if mask.query_lengths is None else mask.query_lengths,
        "key_lengths": jnp.full((batch,), S) if mask.key_lengths is None else mask.key_lengths,
    }
    tables = {3: more_rows, 4: more_cols}
    mask = dataclasses.replace(
        mask,
        num_queries=T + more_rows,
        num_keys=S + more_cols,
        query_segments=grown(mask.query_segments, {1: more_rows}),
        key_segments=grown(mask.key_segments, {1: more_cols}),
        dense=grown(mask.dense, tables, least=1),
        **lengths,
    )
    return dataclasses.replace(
        inputs,
        query=grown(inputs.query, {3: more_rows}),
        key=grown(inputs.key, {2: more_cols}),
        value=grown(inputs.value, {2: more_cols}),
        bias=grown(inputs.bias, tables, least=1),
        mask=mask,
    )
