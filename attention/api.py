"""The two calls that every method answers, and the stages of the exact one."""

import jax.numpy as jnp

from attention.exact import AttentionSteps, Exact, softmax, weighted_values
from attention.expressions import make_method
from attention.inputs import prepare, ungrouped
from attention.method import Certificate, Method, UnsupportedError, capable, compiled


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    method: Method = Exact(),
    scale=None,
    temperature=1.0,
    logits_soft_cap=None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    params=None,
    rng=None,
    implementation: str | None = None,
    return_residual: bool = False,
):
    r"""softmax(scale / temperature * Q K^T + bias) V, exactly or by an approximation.

    Takes every argument of `jax.nn.dot_product_attention` under the same name and in the same layout, so
    that a caller changes the import and nothing else. Differences: a row that sees no key gives 0 (jax
    gives the mean of all values), and a slot that no query sees may hold anything, NaN included.

    Args:
        query: `B T N H` or `T N H`, float16, bfloat16, float32 or float64.
        key: `B S K H`, where K divides N; head n of the queries reads head n // (N / K) of the keys.
        value: `B S K E`.
        bias: broadcastable to `B N T S`, added to the logits after scale and cap.
        mask: boolean, broadcastable to `B N T S`, True where a key may be seen.
        method: how to compute it; see `attention.METHODS`.
        scale: multiplies the scores; 1 / sqrt(H) if None. A number or `(N,)`, may be traced.
        temperature: divides the scores. A number or `(N,)`, greater than 0, may be traced; infinity gives
            the mean over the visible keys.
        logits_soft_cap: the scaled scores l become cap * tanh(l / cap).
        is_causal: query i sees keys up to its own position, `i` where `causal_alignment` is "top_left",
            `i + S - T` (by lengths, where there are any) where it is "bottom_right".
        query_seq_lengths, key_value_seq_lengths: `(B,)` integers; what lies beyond is neither computed nor seen.
        local_window_size: (left, right), how far around its own position a query sees; one number for both.
        query_segment_ids, key_value_segment_ids: `B T` and `B S` integers; a query sees its own segment.
            One of them serves for both if T = S.
        params: what `method.init` returned.
        rng: a key for methods that draw; without `params` the constants are drawn from it.
        implementation: as in jax. None and "xla" leave it to `method`, "cudnn" is
            `method=Fused(implementation="cudnn")`; other kernels are methods alone.
        return_residual: also return log(sum(exp(logits))) of each row, `B T N`.

    Returns:
        The output, `B T N E` in the dtype of `query`; with `return_residual` the pair (output, residual).

    Raises:
        TypeError: a dtype is not one that attention takes.
        ValueError: a shape or a value is wrong.
        UnsupportedError: `method` cannot honour an argument; the message names the methods that can.

    Example:
        >>> import jax, attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 8, 64))
        >>> attention.dot_product_attention(q, k, v, method=attention.Chunked(), temperature=2.0).shape
        (1, 128, 8, 64)
    """
    method = _implemented(method, implementation)
    inputs = prepare(
        method,
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        temperature=temperature,
        logits_soft_cap=logits_soft_cap,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        params=params,
        rng=rng,
    )
    dtype = jnp.asarray(query).dtype
    if return_residual:
        if not method.capabilities.residual:
            raise UnsupportedError(f"{type(method).__name__} does not take return_residual; {capable('residual')}")
        output, residual = compiled(inputs, method=method, hook="attend_with_residual")
        return ungrouped(output, query).astype(dtype), ungrouped(residual, query)
    return ungrouped(compiled(inputs, method=method, hook="attend"), query).astype(dtype)


def certified_attention(query, key, value, bias=None, mask=None, *, method: Method = Exact(), **options):
    """`dot_product_attention` with a certificate of its error.

    Args:
        query, key, value, bias, mask, options: as in `dot_product_attention`, without `implementation` and
            `return_residual`.
        method: how to compute it. A method without a bound answers with a certificate of kind `none`,
            whose error bound is infinite: nothing is ever made up.

    Returns:
        (output, certificate), the output as `dot_product_attention` gives it.

    Raises:
        As `dot_product_attention`.

    Example:
        >>> import jax, attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 8, 64))
        >>> output, certificate = attention.certified_attention(q, k, v, method=attention.TopK(k=32))
        >>> certificate.kind, certificate.error_bound.shape
        ('deterministic', (1, 128, 8))
    """
    inputs = prepare(method, query, key, value, bias, mask, **options)
    output, certificate = compiled(inputs, method=method, hook="certify")
    if certificate is None:
        unknown = jnp.ones(output.shape[:-1], output.dtype)
        certificate = Certificate(error_bound=unknown * jnp.inf, dropped_mass=unknown, work=jnp.ones((), output.dtype))
    bound, dropped = (ungrouped(x, query) for x in (certificate.error_bound, certificate.dropped_mass))
    certificate = Certificate(
        error_bound=bound,
        dropped_mass=dropped,
        work=certificate.work,
        kind=certificate.kind,
        confidence=certificate.confidence,
    )
    return ungrouped(output, query).astype(jnp.asarray(query).dtype), certificate


def attention_steps(query, key, value, bias=None, mask=None, **options) -> AttentionSteps:
    """The stages of exact attention, for looking at.

    Args:
        query, key, value, bias, mask, options: as in `dot_product_attention`, without `method`.

    Returns:
        `AttentionSteps`: `scores`, `scaled_scores`, `masked_scores`, `weights` of shape `B N T S` and `output`
        of shape `B T N E`, in float32 (float64 for float64 inputs).

    Example:
        >>> import jax, attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 8))
        >>> attention.attention_steps(q, k, v, is_causal=True).weights.sum(-1).round(3).tolist()[0][0]
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    inputs = prepare(Exact(), query, key, value, bias, mask, **options)
    T, S = inputs.mask.num_queries, inputs.mask.num_keys
    raw = prepare(Exact(), query, key, value, scale=1.0)
    masked = inputs.masked_scores(0, T, 0, S)
    weights = softmax(masked)

    def by_head(x):  # B K G T S -> B N T S
        x = x.reshape(x.shape[0], -1, T, S)
        return x if jnp.ndim(query) == 4 else x[0]

    return AttentionSteps(
        scores=by_head(raw.scores(0, T, 0, S)),
        scaled_scores=by_head(inputs.scores(0, T, 0, S)),
        masked_scores=by_head(masked),
        weights=by_head(weights),
        output=ungrouped(weighted_values(weights, inputs.value), query),
    )


def _implemented(method: Method, implementation: str | None) -> Method:
    """The method that jax's `implementation` names; `method` where it names none."""
    if implementation in (None, "xla"):
        return method
    if implementation != "cudnn":
        raise ValueError(f"implementation is {implementation!r}: expected None, 'xla' or 'cudnn'; others are a method=")
    if method != Exact():
        raise ValueError(f"implementation is 'cudnn' and method is {method!r}: expected one of them alone")
    return make_method("fused", implementation=implementation)


__all__ = ["attention_steps", "certified_attention", "dot_product_attention"]
