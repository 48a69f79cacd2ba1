"""Softmax attention in NumPy float64, written apart from the library: what every method is measured against."""

import numpy as np


def oracle(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    temperature=1.0,
    logits_soft_cap=None,
    is_causal=False,
    causal_alignment="top_left",
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
):
    """The output and the weights in float64, for the arguments of `attention.dot_product_attention` (with B).

    Returns:
        (output `B T N E`, weights `B N T S`); rows that see no key are zero in both.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    batch, queries, heads, size = q.shape
    keys, key_heads = k.shape[1:3]
    visible = visibility(
        (batch, heads, queries, keys),
        mask,
        is_causal,
        causal_alignment,
        query_seq_lengths,
        key_value_seq_lengths,
        local_window_size,
        query_segment_ids,
        key_value_segment_ids,
    )
    group = heads // key_heads
    output = np.zeros((batch, queries, heads, v.shape[3]))
    weights = np.zeros((batch, heads, queries, keys))
    scale = np.broadcast_to(np.float64(1 / np.sqrt(size)) if scale is None else np.asarray(scale, np.float64), heads)
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), heads)
    bias = None if bias is None else np.broadcast_to(np.asarray(bias).astype(np.float64), weights.shape)
    for b in range(batch):
        for n in range(heads):
            seen = visible[b, n].any(0)  # what nothing sees may hold anything
            kk, vv = (np.where(seen[:, None], x[b, :, n // group], 0) for x in (k, v))
            qq = np.where(visible[b, n].any(1)[:, None], q[b, :, n], 0)
            logits = (qq @ kk.T) * (scale[n] / temperature[n])
            if logits_soft_cap is not None:
                logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
            if bias is not None:
                logits = logits + np.where(visible[b, n], bias[b, n], 0)
            logits = np.where(visible[b, n], logits, -np.inf)
            top = logits.max(1, keepdims=True)
            mass = np.exp(logits - np.where(np.isneginf(top), 0, top))
            total = mass.sum(1, keepdims=True)
            weights[b, n] = mass / np.where(total > 0, total, 1)
            output[b, :, n] = weights[b, n] @ vv
    return output, weights


def visibility(shape, mask, is_causal, alignment, query_lengths, key_lengths, window, query_segments, key_segments):
    """Which keys each query sees, `B N T S`, one condition after the other."""
    batch, _, queries, keys = shape
    visible = np.ones(shape, bool)
    i = np.arange(queries)[:, None]
    j = np.arange(keys)[None, :]
    for b in range(batch):
        t = queries if query_lengths is None else int(query_lengths[b])
        s = keys if key_lengths is None else int(key_lengths[b])
        position = i + (s - t if alignment == "bottom_right" else 0)
        visible[b] &= (i < t) & (j < s)
        if is_causal:
            visible[b] &= j <= position
        if window is not None:
            left, right = (window, window) if isinstance(window, int) else window
            visible[b] &= (j >= position - left) & (j <= position + right)
        if query_segments is not None:
            theirs = query_segments if key_segments is None else key_segments
            visible[b] &= np.asarray(query_segments)[b][:, None] == np.asarray(theirs)[b][None, :]
    return visible if mask is None else visible & np.asarray(mask)


def oracle_gradients(query, key, value, cotangent, **options):
    """The gradients of sum(cotangent * output) to query, key and value in float64, by the closed form.

    For plain and masked softmax (`logits_soft_cap` and arrays that broadcast over heads are not taken).
    """
    output, weights = oracle(query, key, value, **options)
    q, k, v, d = (np.asarray(x).astype(np.float64) for x in (query, key, value, cotangent))
    heads, key_heads = q.shape[2], k.shape[2]
    scale, temperature = options.get("scale"), options.get("temperature", 1.0)
    beta = (1 / np.sqrt(q.shape[3]) if scale is None else scale) / temperature
    kk, vv = (np.repeat(x, heads // key_heads, axis=2) for x in (k, v))
    dv = np.einsum("bnts,btne->bsne", weights, d)
    dp = np.einsum("btne,bsne->bnts", d, vv)
    ds = weights * (dp - np.einsum("btne,btne->bnt", d, output)[..., None]) * beta
    dq = np.einsum("bnts,bsnh->btnh", ds, kk)
    dk = np.einsum("bnts,btnh->bsnh", ds, q)
    fold = (k.shape[0], k.shape[1], key_heads, heads // key_heads)
    return dq, dk.reshape(*fold, -1).sum(3), dv.reshape(*fold, -1).sum(3)
