"""A multi-head attention layer for nnx, around any method."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attention.api import dot_product_attention
from attention.exact import Exact
from attention.logits import SCALE_RULES
from attention.method import Method, Params, unknown
from attention.positions import rotated


class Constant(nnx.Variable):
    """What a random method drew: part of the model, never of the gradient."""


class DecodingState(NamedTuple):
    """How many tokens a layer has read, and what its method keeps of them."""

    length: Int[Array, ""]
    kept: Any


class MultiHeadAttention(nnx.Module):
    r"""Multi-head attention with grouped key heads: learned Wq, Wk, Wv and Wo around one method.

        y = [o_1 ... o_N] Wo,    o_n = softmax(beta_n R(x Wq_n) R(x Wk_m)^T + bias) (x Wv_m),    m = floor(n K / N)

    with beta_n = scale_n / temperature_n and R the rotation of a token by its position, or nothing.

    Args:
        in_features: D.
        num_heads: N.
        rngs: draws the kernels from `params`, in the order query, key, value, output; then what the method draws.
        method: how to compute attention; see `attention.METHODS`.
        num_kv_heads: K, which divides N; N if None.
        head_dim: H; D / N if None.
        out_features: the size of the output; D if None.
        scale: the rule "1/sqrt(H)" or "1/H"; "learned", one parameter a head that starts at 1 / sqrt(H); or a number.
        rotary_base: the base of the rotary frequencies, usually 10,000; None for no positions. H must be even.
        logits_soft_cap: scaled scores l become cap * tanh(l / cap).
        local_window_size: (left, right), how far around its own position a query sees; one number for both.
        use_bias: whether the four projections add a bias.
        dtype: of the activations; that to which input and parameters promote if None.
        param_dtype: of the parameters.
        kernel_init, out_kernel_init: draw the kernels `D NH`, `D KH`, `D KH`, and `NH out`; the same if one is None.

    Attributes:
        query, key, value, output: the projections.
        trained, constants: what `method.init` returned, as `nnx.Param` and as `Constant`.

    Cost: that of `method`, and 2 T (D (N + 2 K) H + N H out) operations for the projections.
    Error bound: that of `method`.

    Raises:
        ValueError: a size does not fit, or `scale` names no rule.

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
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        scale: str | float = "1/sqrt(H)",
        rotary_base: float | None = None,
        logits_soft_cap: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        out_kernel_init: nnx.Initializer | None = None,
    ):
        self.method, self.rotary_base = method, rotary_base
        self.logits_soft_cap, self.local_window_size = logits_soft_cap, local_window_size
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        out_features = in_features if out_features is None else out_features
        _check_sizes(in_features, num_heads, num_kv_heads, head_dim, rotary_base)
        self.in_features, self.num_heads, self.num_kv_heads = in_features, num_heads, num_kv_heads
        self.head_dim = in_features // num_heads if head_dim is None else head_dim
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)

        def linear(inputs, outputs, init):
            return nnx.Linear(
                inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.query = linear(in_features, num_heads * self.head_dim, kernel_init)
        self.key = linear(in_features, num_kv_heads * self.head_dim, kernel_init)
        self.value = linear(in_features, num_kv_heads * self.head_dim, kernel_init)
        self.output = linear(num_heads * self.head_dim, out_features, out_kernel_init or kernel_init)
        self.scale = _initial_scale(scale, num_heads, self.head_dim, param_dtype)
        drawn = method.init(rngs.params(), num_heads=num_heads, head_dim=self.head_dim)
        self.trained = nnx.data(jax.tree.map(nnx.Param, _plain(drawn.trained)))
        self.constants = nnx.data(jax.tree.map(Constant, _plain(drawn.constants)))

    def __call__(self, x, context=None, **options: Any) -> Float[Array, "B T O"]:
        """Attention of the tokens `x` to themselves, or to `context`.

        Args:
            x: `B T D`.
            context: `B S D`, where keys and values come from; `x` if None.
            options: as `attended` takes them.

        Raises:
            As `attention.dot_product_attention`.
        """
        return self.attended(*self.projected(x, context), **options)

    def projected(
        self, x, context=None, start: Any = 0
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Query, key and value of tokens of which the first stands at position `start`, rotated where they are."""
        context = x if context is None else context
        for name, tokens in (("x", x), ("context", context)):
            if tokens.ndim != 3 or tokens.shape[-1] != self.in_features:
                raise ValueError(f"{name} has shape {tokens.shape}: expected 3 axes, B T D with D = {self.in_features}")
        query = by_token(self.query, x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
        key, value = (
            by_token(project, context).reshape(*context.shape[:2], self.num_kv_heads, self.head_dim)
            for project in (self.key, self.value)
        )
        if self.rotary_base is not None:
            query, key = (rotated(y, jnp.arange(y.shape[1]) + start, self.rotary_base) for y in (query, key))
        return query, key, value

    def attended(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        *,
        scale: Any = None,
        temperature: Any = 1.0,
        **options: Any,
    ) -> Float[Array, "B T O"]:
        """The layer's output for what `projected` returned.

        Args:
            query, key, value: what `projected` returned.
            scale: takes the place of the layer's own; a number or `(N,)`, may be traced.
            temperature: divides the scores; a number or `(N,)`, may be traced.
            options: others of `attention.dot_product_attention` that belong to one call: `bias`, `mask`,
                `is_causal`, `causal_alignment`, lengths, segments, `rng`.

        Raises:
            As `attention.dot_product_attention`.
        """
        output = dot_product_attention(
            query, key, value, method=self.method, **self._settings(scale, temperature), **options
        )
        return self._merged(output)

    def init_state(self, batch: int, max_length: int) -> DecodingState:
        """The state before the first token, with room for `max_length`.

        Raises:
            UnsupportedError: the method does not decode; the message names those that do.
        """
        kept = self.method.init_state(batch, self.num_kv_heads, self.head_dim, max_length, self.dtype)
        return DecodingState(jnp.zeros((), jnp.int32), kept)

    def extend(
        self,
        state: DecodingState,
        x,
        *,
        scale: Any = None,
        temperature: Any = 1.0,
        rng: Any = None,
    ) -> tuple[DecodingState, Float[Array, "B T O"]]:
        """Reads T >= 1 more tokens; any split of a sequence into calls gives the causal output of the whole."""
        query, key, value = self.projected(x, start=state.length)
        settings = self._settings(scale, temperature)
        kept, output = self.method.extend(state.kept, query, key, value, **settings, rng=rng)
        return DecodingState(state.length + x.shape[1], kept), self._merged(output)

    def _settings(self, scale: Any, temperature: Any) -> dict[str, Any]:
        own = self.scale[...] if isinstance(self.scale, nnx.Variable) else self.scale
        return {
            "scale": own if scale is None else scale,
            "temperature": temperature,
            "logits_soft_cap": self.logits_soft_cap,
            "local_window_size": self.local_window_size,
            "params": self.params(),
        }

    def params(self) -> Params:
        """What the method trains and has drawn, as `attention.dot_product_attention` takes it."""
        return Params(trained=_values(self.trained), constants=_values(self.constants))

    def _merged(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T O"]:
        return by_token(self.output, heads.reshape(*heads.shape[:2], -1))


def by_token(function: Callable[[Array], Array], x: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
    """A function of matrices applied to all tokens of a batch as the rows of one matrix.

    The gradient of a linear layer is then one plain product, which XLA computes on a CPU in less than half of the time
    that operands with a batch take.
    """
    return function(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _check_sizes(D: int, N: int, K: int, H: int | None, rotary_base: float | None) -> None:
    for name, size in (("in_features", D), ("num_heads", N), ("num_kv_heads", K), ("head_dim", H)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}: expected an integer of at least 1")
    if H is None and D % N:
        raise ValueError(f"in_features is {D}: expected a multiple of num_heads = {N}, or a head_dim")
    if N % K:
        raise ValueError(f"num_kv_heads is {K}: expected a divisor of num_heads = {N}")
    H = D // N if H is None else H
    if rotary_base is not None and H % 2:
        raise ValueError(f"head_dim is {H}: expected an even number, since rotary positions turn pairs")


def _initial_scale(scale: str | float, num_heads: int, head_dim: int, dtype: Any) -> nnx.Param | float:
    if scale == "learned":
        return nnx.Param(jnp.full((num_heads,), SCALE_RULES["1/sqrt(H)"](head_dim), dtype))
    if isinstance(scale, str):
        if scale not in SCALE_RULES:
            raise ValueError(unknown("scale", scale, [*SCALE_RULES, "learned"]))
        return float(SCALE_RULES[scale](head_dim))
    return scale


def _plain(tree: Any) -> Any:
    """Mappings of any type as dicts, which is what nnx looks into."""
    return {name: _plain(leaf) for name, leaf in tree.items()} if isinstance(tree, Mapping) else tree


def _values(variables: Any) -> Any:
    return jax.tree.map(lambda x: x[...], variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
