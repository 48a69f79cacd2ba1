"""A decoder-only language model over bytes, with an attention method in every layer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import attention
from experiments import config
from experiments.positions import rotated, sinusoids

VOCABULARY = 256  # bytes


class Constant(nnx.Variable):
    """What a random method drew: part of the model, never of the gradient."""


class QueryKey(NamedTuple):
    """What a layer's scores are made of: query `B T N H` and key `B T K H`, positions included."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]


class DecodingState(NamedTuple):
    """How many tokens the model has read, and what each layer's method keeps of them."""

    length: Int[Array, ""]
    layers: tuple[Any, ...]


class Attention(nnx.Module):
    """Multi-head attention with grouped key heads: learned Wq, Wk, Wv and Wo around one method."""

    def __init__(self, model: config.Model, method: attention.Method, rngs: nnx.Rngs):
        self.method, self.rotary = method, model.positions == "rotary"
        self.heads, self.kv_heads, self.head_size = model.heads, model.kv_heads, model.width // model.heads
        self.query = _linear(model, model.width, model.heads * self.head_size, rngs)
        self.key = _linear(model, model.width, model.kv_heads * self.head_size, rngs)
        self.value = _linear(model, model.width, model.kv_heads * self.head_size, rngs)
        self.output = _linear(model, model.heads * self.head_size, model.width, rngs, branches=2 * model.layers)
        drawn = method.init(rngs.params(), num_heads=model.heads, head_dim=self.head_size)
        self.trained = nnx.data(jax.tree.map(nnx.Param, _plain(drawn.trained)))
        self.constants = nnx.data(jax.tree.map(Constant, _plain(drawn.constants)))

    def __call__(self, x: Float[Array, "B T D"], scale, temperature) -> tuple[Float[Array, "B T D"], QueryKey]:
        query, key, value = self._projected(x, jnp.arange(x.shape[1]))
        output = attention.dot_product_attention(
            query,
            key,
            value,
            method=self.method,
            scale=scale,
            temperature=temperature,
            is_causal=True,
            params=self.params(),
        )
        return self.output(_flat(output)), QueryKey(query, key)

    def extend(self, state, x: Float[Array, "B T D"], start, scale, temperature) -> tuple[Any, Float[Array, "B T D"]]:
        query, key, value = self._projected(x, start + jnp.arange(x.shape[1]))
        state, output = self.method.extend(
            state, query, key, value, scale=scale, temperature=temperature, params=self.params()
        )
        return state, self.output(_flat(output))

    def _projected(self, x, positions):
        query, key, value = (
            project(x).reshape(*x.shape[:2], heads, self.head_size)
            for project, heads in ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        )
        if self.rotary:
            query, key = rotated(query, positions), rotated(key, positions)
        return query, key, value

    def params(self) -> attention.Params:
        """What `attention.dot_product_attention` takes as `params`."""
        trained, constants = (
            jax.tree.map(lambda variable: variable[...], x, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
            for x in (self.trained, self.constants)
        )
        return attention.Params(trained=trained, constants=constants)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the MLP gated (SwiGLU; Shazeer, arXiv 2002.05202)."""

    def __init__(self, model: config.Model, method: attention.Method, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = _norm(model, rngs), _norm(model, rngs)
        self.attention = Attention(model, method, rngs)
        self.gate = _linear(model, model.width, model.mlp_width, rngs)
        self.up = _linear(model, model.width, model.mlp_width, rngs)
        self.down = _linear(model, model.mlp_width, model.width, rngs, branches=2 * model.layers)

    def __call__(self, x, scale, temperature):
        attended, seen = self.attention(self.attention_norm(x), scale, temperature)
        return self._with_mlp(x + attended), seen

    def extend(self, state, x, start, scale, temperature):
        state, attended = self.attention.extend(state, self.attention_norm(x), start, scale, temperature)
        return state, self._with_mlp(x + attended)

    def _with_mlp(self, x):
        h = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class LanguageModel(nnx.Module):
    """Logits of the next byte at every position.

    Activations are in `model.dtype`; parameters, softmax statistics, and logits are in float32.

    Args:
        model: the sizes.
        methods: the attention method of each layer.
        rngs: draws the parameters, and the constants of random methods.
    """

    def __init__(self, model: config.Model, methods: tuple[attention.Method, ...], rngs: nnx.Rngs):
        self.context, self.positions, self.dtype = model.context, model.positions, jnp.dtype(model.dtype)
        self.width, self.kv_heads, self.head_size = model.width, model.kv_heads, model.width // model.heads
        normal = nnx.initializers.normal(stddev=0.02)
        self.embedding = nnx.Embed(VOCABULARY, model.width, embedding_init=normal, dtype=self.dtype, rngs=rngs)
        if model.positions == "learned":
            self.position = nnx.Embed(model.context, model.width, embedding_init=normal, dtype=self.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(model, method, rngs) for method in methods])
        self.norm = nnx.RMSNorm(model.width, dtype=jnp.float32, rngs=rngs)
        self.head = nnx.Linear(model.width, VOCABULARY, use_bias=False, kernel_init=normal, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"], *, scale, temperature) -> Float[Array, "B T V"]:
        return self.observed(tokens, scale=scale, temperature=temperature)[0]

    def observed(
        self, tokens: Int[Array, "B T"], *, scale, temperature
    ) -> tuple[Float[Array, "B T V"], tuple[QueryKey, ...]]:
        """The logits, and the queries and keys of each layer for whoever looks at its attention."""
        x, seen = self._embedded(tokens, jnp.arange(tokens.shape[1])), []
        for block in self.blocks:
            x, pair = block(x, scale, temperature)
            seen.append(pair)
        return self.head(self.norm(x)), tuple(seen)

    def init_state(self, batch: int, max_length: int) -> DecodingState:
        """The state before the first token, with room for `max_length`.

        Raises:
            ValueError: learned positions end at `context`.
            UnsupportedError: a layer's method does not decode.
        """
        if self.positions == "learned" and max_length > self.context:
            raise ValueError(f"max_length is {max_length}: learned positions end at the context, {self.context}")
        states = [
            block.attention.method.init_state(batch, self.kv_heads, self.head_size, max_length, self.dtype)
            for block in self.blocks
        ]
        return DecodingState(jnp.zeros((), jnp.int32), tuple(states))

    def extend(
        self, state: DecodingState, tokens: Int[Array, "B T"], *, scale, temperature
    ) -> tuple[DecodingState, Float[Array, "B T V"]]:
        """Reads T >= 1 more tokens; any split of a sequence into calls gives the logits of the whole."""
        x, layers = self._embedded(tokens, state.length + jnp.arange(tokens.shape[1])), []
        for block, kept in zip(self.blocks, state.layers, strict=True):
            kept, x = block.extend(kept, x, state.length, scale, temperature)
            layers.append(kept)
        return DecodingState(state.length + tokens.shape[1], tuple(layers)), self.head(self.norm(x))

    def _embedded(self, tokens, positions):
        x = self.embedding(tokens.astype(jnp.int32))
        if self.positions == "learned":
            x = x + self.position(positions)[None]
        elif self.positions == "sinusoidal":
            # At the scale of the embedding, which training starts at 0.02.
            x = x + (0.02 * sinusoids(positions, self.width)).astype(self.dtype)[None]
        return x


def _linear(model: config.Model, inputs: int, outputs: int, rngs: nnx.Rngs, branches: int = 1) -> nnx.Linear:
    # `branches` outputs are added to the residual stream: 1 / branches of the variance each keeps its size
    # (GPT-2; Radford et al. 2019, section 2.3).
    kernel_init = nnx.initializers.variance_scaling(1.0 / branches, "fan_in", "normal")
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=kernel_init, dtype=jnp.dtype(model.dtype), rngs=rngs)


def _norm(model: config.Model, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(model.width, dtype=jnp.dtype(model.dtype), rngs=rngs)


def _flat(heads: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    return heads.reshape(*heads.shape[:2], -1)


def _plain(tree: Any) -> Any:
    """Mappings of any type as dicts, which is what nnx looks into."""
    return {name: _plain(leaf) for name, leaf in tree.items()} if isinstance(tree, Mapping) else tree
