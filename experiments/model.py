"""A decoder-only language model over bytes or other tokens, with an attention method in every layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import attention
import attention.flax
from attention import positions
from attention.flax.parts import by_token
from experiments import config


class Attended(NamedTuple):
    """What a layer attends with: query `B T N H`, key and value `B T K H`, with all but scale and temperature."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]


class DecodingState(NamedTuple):
    """What each layer keeps of the tokens that the model has read."""

    layers: tuple[attention.flax.DecodingState, ...]

    @property
    def length(self) -> Int[Array, ""]:
        return self.layers[0].length


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the MLP gated (SwiGLU; Shazeer, arXiv 2002.05202)."""

    def __init__(self, model: config.Model, method: attention.Method, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = _norm(model, rngs), _norm(model, rngs)
        self.attention = attention.flax.MultiHeadAttention(
            model.width,
            model.heads,
            method=method,
            num_kv_heads=model.kv_heads,
            scale=model.scale_rule,
            training_length=model.context,
            spectral=model.spectral,
            gated=model.gated,
            rotary_base=positions.BASE if model.positions == "rotary" else None,
            dtype=jnp.dtype(model.dtype),
            kernel_init=_kernel_init(),
            out_kernel_init=_kernel_init(branches=2 * model.layers),
            rngs=rngs,
        )
        self.gate = _linear(model, model.width, model.mlp_width, rngs)
        self.up = _linear(model, model.width, model.mlp_width, rngs)
        self.down = _linear(model, model.mlp_width, model.width, rngs, branches=2 * model.layers)

    def __call__(self, x, **numbers):
        tokens = self.attention_norm(x)
        query, key, value = self.attention.projected(tokens)
        attended = self.attention.attended(query, key, value, tokens=tokens, is_causal=True, **numbers)
        # Only evaluations use it.
        scored, _ = self.attention.scored(query, key, is_causal=True, **numbers)
        return self._with_mlp(x + attended), Attended(scored, key, value)

    def extend(self, state, x, **numbers):
        state, attended = self.attention.extend(state, self.attention_norm(x), **numbers)
        return state, self._with_mlp(x + attended)

    def _with_mlp(self, x):
        return x + by_token(self._mlp, self.mlp_norm(x))

    def _mlp(self, h):
        return self.down(_gated(self.gate(h), self.up(h)))


class LanguageModel(nnx.Module):
    """Logits of the next token at every position.

    Its calls take what `attention.flax.MultiHeadAttention.scored` takes: `scale` (None for the layers' own),
    `temperature`, `logits_soft_cap`, `adaptive`.

    Activations are in `model.dtype`; parameters, softmax statistics, and logits are in float32.

    Args:
        model: the sizes.
        methods: the attention method of each layer.
        vocabulary: V, how many different tokens there are.
        rngs: draws the parameters, and the constants of random methods.
    """

    def __init__(self, model: config.Model, methods: tuple[attention.Method, ...], vocabulary: int, rngs: nnx.Rngs):
        self.context, self.positions, self.dtype = model.context, model.positions, jnp.dtype(model.dtype)
        self.width = model.width
        normal = nnx.initializers.normal(stddev=0.02)
        self.embedding = nnx.Embed(vocabulary, model.width, embedding_init=normal, dtype=self.dtype, rngs=rngs)
        if model.positions == "learned":
            self.position = nnx.Embed(model.context, model.width, embedding_init=normal, dtype=self.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(model, method, rngs) for method in methods])
        self.norm = nnx.RMSNorm(model.width, dtype=jnp.float32, rngs=rngs)
        self.head = nnx.Linear(model.width, vocabulary, use_bias=False, kernel_init=normal, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"], **numbers: Any) -> Float[Array, "B T V"]:
        return self.observed(tokens, **numbers)[0]

    def observed(self, tokens: Int[Array, "B T"], **numbers: Any) -> tuple[Float[Array, "B T V"], tuple[Attended, ...]]:
        """The logits, and what each layer attended with, for whoever looks at its attention."""
        x, seen = self._embedded(tokens, jnp.arange(tokens.shape[1])), []
        for block in self.blocks:
            x, attended = block(x, **numbers)
            seen.append(attended)
        return by_token(self.head, self.norm(x)), tuple(seen)

    def init_state(self, batch: int, max_length: int) -> DecodingState:
        """The state before the first token, with room for `max_length`.

        Raises:
            ValueError: learned positions end at `context`.
            UnsupportedError: a layer's method does not decode.
        """
        if self.positions == "learned" and max_length > self.context:
            raise ValueError(f"max_length is {max_length}: learned positions end at the context, {self.context}")
        return DecodingState(tuple(block.attention.init_state(batch, max_length) for block in self.blocks))

    def extend(
        self, state: DecodingState, tokens: Int[Array, "B T"], **numbers: Any
    ) -> tuple[DecodingState, Float[Array, "B T V"]]:
        """Reads T >= 1 more tokens; any split of a sequence into calls gives the logits of the whole."""
        x, layers = self._embedded(tokens, state.length + jnp.arange(tokens.shape[1])), []
        for block, kept in zip(self.blocks, state.layers, strict=True):
            kept, x = block.extend(kept, x, **numbers)
            layers.append(kept)
        return DecodingState(tuple(layers)), by_token(self.head, self.norm(x))

    def redraw(self, rng: Array, *, step: Any, every: int) -> None:
        """Gives every layer whose method redraws its constants those of a training step, by a key of its own."""
        for i, block in enumerate(self.blocks):
            if config.redraws(block.attention.method):
                block.attention.redraw(jax.random.fold_in(rng, i), step=step, every=every)

    def power_iteration(self) -> None:
        """Brings the singular vectors of sigma-reparametrised projections up to date; after each training step."""
        for block in self.blocks:
            block.attention.power_iteration()

    def _embedded(self, tokens, places):
        x = self.embedding(tokens.astype(jnp.int32))
        if self.positions == "learned":
            x = x + self.position(places)[None]
        elif self.positions == "sinusoidal":
            # At the scale of the embedding, which training starts at 0.02.
            x = x + (0.02 * positions.sinusoids(places, self.width)).astype(self.dtype)[None]
        return x


@jax.checkpoint
def _gated(gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
    # Computed again in the backward pass, which is cheaper than to pass what it needs through memory.
    return jax.nn.silu(gate) * up


def _linear(model: config.Model, inputs: int, outputs: int, rngs: nnx.Rngs, branches: int = 1) -> nnx.Linear:
    dtype = jnp.dtype(model.dtype)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=_kernel_init(branches), dtype=dtype, rngs=rngs)


def _kernel_init(branches: int = 1) -> nnx.Initializer:
    # `branches` outputs are added to the residual stream: 1 / branches of the variance each keeps its size
    # (GPT-2; Radford et al. 2019, section 2.3).
    return nnx.initializers.variance_scaling(1.0 / branches, "fan_in", "normal")


def _norm(model: config.Model, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(model.width, dtype=jnp.dtype(model.dtype), rngs=rngs)
