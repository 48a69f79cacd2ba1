"""Softmax attention in NumPy float64, written apart from the library: what every method is measured against."""

from typing import NamedTuple

import numpy as np


class Softmax(NamedTuple):
    """Softmax attention in its parts, heads repeated: what a query head reads stands beside it.

    Attributes:
        query, key, value: `B N T H`, `B N S H`, `B N S E`, with zeros in what nothing sees.
        beta: scale / temperature, `N 1 1`.
        scores: beta q.k, `B N T S`.
        logits: after cap and bias, -inf where the key is not visible.
        visible, weights: `B N T S`.
        residual: log(sum(exp(logits))), `B N T 1`; 0 in rows that see no key.
        output: `B N T E`.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    beta: np.ndarray
    scores: np.ndarray
    logits: np.ndarray
    visible: np.ndarray
    weights: np.ndarray
    residual: np.ndarray
    output: np.ndarray


def softmax_attention(
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
) -> Softmax:
    """Every part of softmax attention in float64, for the arguments of `attention.dot_product_attention` (with B)."""
    q, k, v = (np.moveaxis(np.asarray(x).astype(np.float64), 2, 1) for x in (query, key, value))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    visible = visibility(
        (*q.shape[:3], k.shape[2]),
        mask,
        is_causal,
        causal_alignment,
        query_seq_lengths,
        key_value_seq_lengths,
        local_window_size,
        query_segment_ids,
        key_value_segment_ids,
    )
    seen = visible.any(2)[..., None]  # what nothing sees may hold anything
    k, v = (np.where(seen, x, 0) for x in (k, v))
    q = np.where(visible.any(3)[..., None], q, 0)
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else np.asarray(scale, np.float64)
    beta = np.broadcast_to(scale / np.asarray(temperature, np.float64), q.shape[1])[:, None, None]
    scores = logits = q @ np.swapaxes(k, 2, 3) * beta
    if logits_soft_cap is not None:
        logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + np.where(visible, np.asarray(bias).astype(np.float64), 0)
    logits = np.where(visible, logits, -np.inf)
    top = logits.max(3, keepdims=True)
    top = np.where(np.isneginf(top), 0, top)
    mass = np.exp(logits - top)
    total = mass.sum(3, keepdims=True)
    total = np.where(total > 0, total, 1)
    weights = mass / total
    visible = ~np.isneginf(logits)  # a bias of -inf masks
    return Softmax(q, k, v, beta, scores, logits, visible, weights, top + np.log(total), weights @ v)


def oracle(query, key, value, bias=None, mask=None, **options):
    """The output and the weights in float64, for the arguments of `attention.dot_product_attention` (with B).

    Returns:
        (output `B T N E`, weights `B N T S`); rows that see no key are zero in both.
    """
    parts = softmax_attention(query, key, value, bias, mask, **options)
    return np.moveaxis(parts.output, 1, 2), parts.weights


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
    """The gradients of sum(cotangent * output) to query, key and value in float64, by the closed form."""
    parts = softmax_attention(query, key, value, **options)
    d = np.moveaxis(np.asarray(cotangent).astype(np.float64), 2, 1)
    change = parts.weights * (d @ np.swapaxes(parts.value, 2, 3) - (d * parts.output).sum(3, keepdims=True))
    if (cap := options.get("logits_soft_cap")) is not None:
        change = change * (1 - np.tanh(parts.scores / cap) ** 2)
    change = change * parts.beta
    dk, dv = np.swapaxes(change, 2, 3) @ parts.query, np.swapaxes(parts.weights, 2, 3) @ d
    return np.moveaxis(change @ parts.key, 1, 2), *(by_key_head(x, key) for x in (dk, dv))


def by_key_head(x, key):
    """`B N S H`, summed over the query heads of each key head, as `B S K H`."""
    groups = x.reshape(x.shape[0], np.shape(key)[2], -1, *x.shape[2:])
    return np.moveaxis(groups.sum(2), 1, 2)
