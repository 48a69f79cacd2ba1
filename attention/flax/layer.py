"""A multi-head attention layer for nnx, around any method."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attention.api import dot_product_attention
from attention.exact import Exact
from attention.flax.parts import Constant, plain, rows_scaled, starting_scale, values
from attention.flax.projections import Projections
from attention.method import Method, Params
from attention.scale_rules import adaptive_factor, scale_rule, visible_keys


class DecodingState(NamedTuple):
    """How many tokens a layer has read, and what its method keeps of them."""

    length: Int[Array, ""]
    kept: Any


class MultiHeadAttention(Projections):
    r"""Multi-head attention with grouped key heads: learned Wq, Wk, Wv and Wo around one method.

        y = [o_1 ... o_N] Wo,    o_n = softmax(beta_n R(x Wq_n) R(x Wk_m)^T + bias) (x Wv_m),    m = floor(n K / N)

    with beta_n = scale_n / temperature_n and R the rotation of a token by its position, or nothing. The scale rule
    "qk-norm" divides the vectors in R by their norms, and "ssmax" multiplies the scores of a row by the log of how many
    keys it sees. With a gate, [o_1 ... o_N] is multiplied by sigmoid(x Wg) before Wo.

    Args:
        in_features: D.
        num_heads: N.
        rngs: draws the kernels from `params`, and then what the method draws.
        method: how to compute attention; see `attention.METHODS`.
        scale: one of `attention.SCALE_RULES`, or a number. The rules "learned", "qk-norm" and "ssmax" train one number
            a head.
        training_length: tokens of a training sequence, by which "qk-norm" and "ssmax" choose where their scales start.
        logits_soft_cap: scaled scores l become cap * tanh(l / cap).
        local_window_size: (left, right), how far around its own position a query sees; one number for both.
        param_dtype: of the parameters.
        projections: others that `Projections` takes: `num_kv_heads`, `head_dim`, `out_features`, `spectral`, `gated`,
            `rotary_base`, `use_bias`, `dtype`, `kernel_init`, `out_kernel_init`.

    Attributes:
        trained, constants: what `method.init` returned, as `nnx.Param` and as `Constant`.

    Cost: that of `method`, and 2 T (D (N + 2 K) H + N H out) operations for the projections, 2 T D N H for a gate.
    Error bound: that of `method`.

    Raises:
        ValueError: a size does not fit, or `scale` names no rule, or one that needs a `training_length`.

    References:
        Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.2.2.

    Example:
        >>> import attention, attention.flax, jax
        >>> from flax import nnx
        >>> layer = attention.flax.MultiHeadAttention(
        ...     32, 4, method=attention.Performer(features=64), num_kv_heads=2, rotary_base=10_000.0, rngs=nnx.Rngs(0)
        ... )
        >>> x = jax.random.normal(jax.random.key(1), (2, 13, 32))
        >>> whole = layer(x, is_causal=True)
        >>> state = layer.init_state(batch=2, max_length=13)
        >>> state, prefill = layer.extend(state, x[:, :12])
        >>> state, last = layer.extend(state, x[:, 12:])
        >>> whole.shape, last.shape, bool(abs(whole[:, 12:] - last).max() < 1e-5)
        ((2, 13, 32), (2, 1, 32), True)
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        method: Method = Exact(),
        scale: str | float = "1/sqrt(H)",
        training_length: int | None = None,
        logits_soft_cap: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        param_dtype: Any = jnp.float32,
        **projections: Any,
    ):
        rule = scale_rule(scale) if isinstance(scale, str) else None
        unit_norm, self.by_length = (rule.unit_norm, rule.by_length) if rule else (False, False)
        super().__init__(in_features, num_heads, unit_norm=unit_norm, param_dtype=param_dtype, rngs=rngs, **projections)
        self.method = method
        self.logits_soft_cap, self.local_window_size = logits_soft_cap, local_window_size
        self.scale = starting_scale(
            scale, num_heads=num_heads, head_dim=self.head_dim, length=training_length, dtype=param_dtype
        )
        drawn = method.init(rngs.params(), num_heads=num_heads, head_dim=self.head_dim)
        self.trained = nnx.data(jax.tree.map(nnx.Param, plain(drawn.trained)))
        self.constants = nnx.data(jax.tree.map(Constant, plain(drawn.constants)))

    def __call__(self, x, context=None, **options: Any) -> Float[Array, "B T O"]:
        """Attention of the tokens `x` to themselves, or to `context`.

        Args:
            x: `B T D`.
            context: `B S D`, where keys and values come from; `x` if None.
            options: as `attended` takes them.

        Raises:
            As `attention.dot_product_attention`.
        """
        return self.attended(*self.projected(x, context), tokens=x, **options)

    def attended(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        *,
        tokens: Any = None,
        **options: Any,
    ) -> Float[Array, "B T O"]:
        """The layer's output for what `projected` returned.

        Args:
            query, key, value: what `projected` returned.
            tokens: `B T D`, the tokens of the queries; a gate needs them.
            options: as `scored` takes them.

        Raises:
            As `attention.dot_product_attention`; ValueError where a gate has no tokens.
        """
        query, options = self.scored(query, key, **options)
        output = dot_product_attention(query, key, value, method=self.method, **options)
        return self.merged(output, tokens)

    def scored(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        *,
        scale: Any = None,
        temperature: Any = 1.0,
        logits_soft_cap: Any = None,
        adaptive: bool = False,
        **options: Any,
    ) -> tuple[Float[Array, "B T N H"], dict[str, Any]]:
        """The queries, and the options of `attention.dot_product_attention`, whose logits are the layer's.

        Args:
            query, key: what `projected` returned.
            scale: takes the place of the layer's own; a number or `(N,)`, may be traced.
            temperature: divides the scores; a number or `(N,)`, may be traced.
            logits_soft_cap: takes the place of the layer's own; may be traced.
            adaptive: whether to sharpen rows of high entropy, as `attention.adaptive_factor` does.
            options: others of `attention.dot_product_attention` that belong to one call: `bias`, `mask`,
                `is_causal`, `causal_alignment`, lengths, segments, `rng`.
        """
        options |= self._settings(scale, temperature, logits_soft_cap)
        if self.by_length:
            query = self._by_length(query, visible_keys(query, key, **options))
        if adaptive:
            query = rows_scaled(query, adaptive_factor(query, key, **options))
        return query, options

    def init_state(self, batch: int, max_length: int) -> DecodingState:
        """The state before the first token, with room for `max_length`.

        Raises:
            UnsupportedError: the method does not decode; the message names those that do.
        """
        sizes = batch, self.num_kv_heads, self.head_dim, max_length
        kept = self.method.init_state(*sizes, self.dtype, num_heads=self.num_heads)
        return DecodingState(jnp.zeros((), jnp.int32), kept)

    def extend(
        self,
        state: DecodingState,
        x,
        *,
        scale: Any = None,
        temperature: Any = 1.0,
        logits_soft_cap: Any = None,
        rng: Any = None,
    ) -> tuple[DecodingState, Float[Array, "B T O"]]:
        """Reads T >= 1 more tokens; any split of a sequence into calls gives the causal output of the whole."""
        query, key, value = self.projected(x, start=state.length)
        if self.by_length:
            seen = state.length + jnp.arange(1, x.shape[1] + 1)
            if (window := self.local_window_size) is not None:
                seen = jnp.minimum(seen, (window if isinstance(window, int) else window[0]) + 1)
            query = self._by_length(query, seen.astype(jnp.promote_types(query.dtype, jnp.float32))[None, :, None])
        settings = self._settings(scale, temperature, logits_soft_cap)
        kept, output = self.method.extend(state.kept, query, key, value, **settings, rng=rng)
        return DecodingState(state.length + x.shape[1], kept), self.merged(output, x)

    def redraw(self, rng: Array, *, step: Any, every: int) -> None:
        """Gives the method the constants of a training step, as `Method.redrawn` draws them; before each step.

        Raises:
            UnsupportedError: the method has none that are redrawn.
        """
        redrawn = self.method.redrawn(self.params(), rng, step=step, every=every)
        for name, drawn in redrawn.constants.items():
            self.constants[name][...] = drawn

    def _by_length(self, query: Array, seen: Float[Array, "b T n"]) -> Float[Array, "B T N H"]:
        return rows_scaled(query, jnp.log(jnp.maximum(seen, 1)))  # a row without keys has an output of 0

    def _settings(self, scale: Any, temperature: Any, logits_soft_cap: Any) -> dict[str, Any]:
        own = self.scale[...] if isinstance(self.scale, nnx.Variable) else self.scale
        return {
            "scale": own if scale is None else scale,
            "temperature": temperature,
            "logits_soft_cap": self.logits_soft_cap if logits_soft_cap is None else logits_soft_cap,
            "local_window_size": self.local_window_size,
            "params": self.params(),
        }

    def params(self) -> Params:
        """What the method trains and has drawn, as `attention.dot_product_attention` takes it."""
        return Params(trained=values(self.trained), constants=values(self.constants))
