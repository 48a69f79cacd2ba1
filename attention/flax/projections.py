"""The learned linear maps around multi-head attention."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention.flax.parts import SpectralLinear, by_token, check_sizes, unit_norm
from attention.positions import rotated


class Projections(nnx.Module):
    r"""Queries, keys and values of tokens, and what becomes of the heads' outputs.

        q_n = R(x Wq_n),   k_m = R(x Wk_m),   v_m = x Wv_m,   y = ([o_1 ... o_N] * sigmoid(x Wg)) Wo

    with R the rotation of a token by its position, or nothing, and without the sigmoid unless there is a gate.

    Args:
        in_features: D.
        num_heads: N.
        rngs: draws the kernels from `params`, in the order query, key, value, output, gate.
        num_kv_heads: K, which divides N; N if None.
        head_dim: H; D / N if None.
        out_features: the size of the output; D if None.
        unit_norm: whether queries and keys are divided by their norms before R.
        spectral: whether the four projections are sigma-reparametrised (`SpectralLinear`).
        gated: whether the heads' outputs are gated, entry by entry, by the tokens that ask.
        rotary_base: the base of the rotary frequencies, usually 10,000; None for no positions. H must be even.
        use_bias: whether the four projections add a bias.
        dtype: of the activations; that to which input and parameters promote if None.
        param_dtype: of the parameters.
        kernel_init, out_kernel_init: draw the kernels `D NH`, `D KH`, `D KH`, and `NH out`; the same if one is None.

    Attributes:
        query, key, value, output, gate: the projections; `gate` is None without one.

    Cost: 2 T (D (N + 2 K) H + N H out) operations, 2 T D N H for a gate.

    Raises:
        ValueError: a size does not fit.

    References:
        Qiu et al., "Gated attention for large language models", arXiv 2505.06708, section 2.2: the gate at the output
        of attention, one number a head and entry.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        unit_norm: bool = False,
        spectral: bool = False,
        gated: bool = False,
        rotary_base: float | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        out_kernel_init: nnx.Initializer | None = None,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        out_features = in_features if out_features is None else out_features
        check_sizes(in_features, num_heads, num_kv_heads, head_dim, rotary_base)
        self.unit_norm, self.rotary_base = unit_norm, rotary_base
        self.in_features, self.num_heads, self.num_kv_heads = in_features, num_heads, num_kv_heads
        self.head_dim = in_features // num_heads if head_dim is None else head_dim
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)

        queries, keys = num_heads * self.head_dim, num_kv_heads * self.head_dim
        options: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = SpectralLinear if spectral else nnx.Linear
        self.query = linear(in_features, queries, kernel_init=kernel_init, **options)
        self.key = linear(in_features, keys, kernel_init=kernel_init, **options)
        self.value = linear(in_features, keys, kernel_init=kernel_init, **options)
        self.output = linear(queries, out_features, kernel_init=out_kernel_init or kernel_init, **options)
        self.gate = nnx.Linear(in_features, queries, kernel_init=kernel_init, **options) if gated else None

    def projected(
        self, x, context=None, start: Any = 0
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Query, key and value of tokens of which the first stands at position `start`, normalised and rotated."""
        context = x if context is None else context
        for name, tokens in (("x", x), ("context", context)):
            if tokens.ndim != 3 or tokens.shape[-1] != self.in_features:
                raise ValueError(f"{name} has shape {tokens.shape}: expected 3 axes, B T D with D = {self.in_features}")
        query = by_token(self.query, x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
        key, value = (
            by_token(project, context).reshape(*context.shape[:2], self.num_kv_heads, self.head_dim)
            for project in (self.key, self.value)
        )
        if self.unit_norm:
            query, key = unit_norm(query), unit_norm(key)
        if self.rotary_base is not None:
            query, key = (rotated(y, jnp.arange(y.shape[1]) + start, self.rotary_base) for y in (query, key))
        return query, key, value

    def power_iteration(self) -> None:
        """Brings the singular vectors of sigma-reparametrised projections up to date; after each training step."""
        for linear in (self.query, self.key, self.value, self.output):
            if isinstance(linear, SpectralLinear):
                linear.power_iteration()

    def merged(self, heads: Float[Array, "B T N H"], tokens: Any) -> Float[Array, "B T O"]:
        """The output for the heads' outputs, gated by the tokens that asked."""
        merged = heads.reshape(*heads.shape[:2], -1)
        if self.gate is None:
            return by_token(self.output, merged)
        if tokens is None:
            raise ValueError("tokens is None: expected the tokens of the queries, since the layer has a gate")
        return by_token(self.output, merged * jax.nn.sigmoid(by_token(self.gate, tokens)))
