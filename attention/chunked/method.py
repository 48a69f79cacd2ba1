"""Exact attention in memory linear in the length."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.cache import Cached
from attention.chunked.derivative import attention
from attention.chunked.sizes import chosen
from attention.exact import Exact, exact_certificate
from attention.inputs import Inputs
from attention.method import Capabilities, Certificate, Cost, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunked(Cached):
    query_chunk: int | None = None
    key_chunk: int | None = None

    capabilities = Exact.capabilities

    def __post_init__(self) -> None:
        check_positive(self, "query_chunk", "key_chunk")

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return self.attend_with_residual(inputs)[0]

    def attend_with_residual(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
        return attention(inputs, *chosen(inputs, self.query_chunk, self.key_chunk))

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        _, keys = chosen(inputs, self.query_chunk, self.key_chunk)
        return self.attend(inputs), exact_certificate(inputs, rescalings=keys.count)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        share = 0.5 if is_causal else 1.0
        return Cost(share * 4.0 * num_heads * T * S * head_dim, 1)

    @classmethod
    def examples(cls) -> "tuple[Chunked, ...]":
        return (cls(), cls(query_chunk=5, key_chunk=3))
