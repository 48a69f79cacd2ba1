"""Softmax attention through landmarks (Nystrom's method): bidirectional, in time linear in length."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attention.exact import softmax
from attention.inputs import Inputs
from attention.linear.state import HIGHEST
from attention.method import Capabilities, Cost, Method, check_positive
from attention.rounding import sees_any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystrom(Method):
    r"""Softmax attention by way of m landmarks, the means of m runs of equal length of the queries and of the keys.

        O = softmax(Q K~^T) A^+ softmax(Q~ K^T) V,    A = softmax(Q~ K~^T),

    where the rows of Q~ and K~ are the means of tokens floor(r L / m) to floor((r + 1) L / m) - 1 of a sequence of
    length L (of L runs of one token where L <= m). The pseudo-inverse is iterated from Z = A^T / (|A|_1 |A|_inf):

        Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4.

    Queries carry beta, and with them their landmarks, so temperature acts in all three factors as in softmax; at
    infinite temperature each is uniform and the output is the mean. L is that of `query_seq_lengths` and of
    `key_value_seq_lengths`; the latter alone stands for both where T = S. Landmarks mix the tokens of their run, so the
    method is not causal and does not decode.

    Shapes: queries `B T N H`, keys `B S K H`, values `B S K E`; computed in float32, float64 for float64 operands.
    Cost: 2 m (T + S) (H + E) operations and 8 m^3 an iteration, a head; memory m (T + S).
    Error bound: no bound known. Rows of the three factors sum to 1, those of the product only where the iteration has
    converged, and what rounding does grows with the norm of A^+.

    Attributes:
        landmarks: m.
        iterations: of the pseudo-inverse.

    Raises:
        ValueError: a field is no positive integer, or m times the length reaches 2^31.

    References:
        Xiong et al., "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention",
        arXiv 2102.03902, sections 3.2 and 3.3.
    """

    landmarks: int = 64
    iterations: int = 6

    capabilities = Capabilities(lengths=True, cross=True, rounding=64.0)

    def __post_init__(self) -> None:
        check_positive(self, "landmarks", "iterations")

    @classmethod
    def examples(cls) -> "tuple[Nystrom, ...]":
        return (cls(landmarks=4),)

    def ladder(self, length: int) -> "tuple[Nystrom, ...]":
        return tuple(dataclasses.replace(self, landmarks=max(1, length // share)) for share in (16, 4, 2))

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        mask, dtype = inputs.mask, inputs.query.dtype
        key, value = inputs.key.astype(dtype), inputs.value.astype(dtype)
        lengths = mask.query_lengths
        if lengths is None and mask.num_queries == mask.num_keys:
            lengths = mask.key_lengths  # of a padded sequence that attends to itself
        rows, queries = runs(lengths, mask.num_queries, self.landmarks, dtype)
        cols, keys = runs(mask.key_lengths, mask.num_keys, self.landmarks, dtype)
        query_landmarks = _product(rows[:, None, None], inputs.query)
        key_landmarks = _product(cols[:, None], key)
        seen = jnp.ones((1, mask.num_keys), bool)
        if mask.key_lengths is not None:
            seen = jnp.arange(mask.num_keys)[None] < mask.key_lengths[:, None]
        exists = queries[:, None, None, :, None]

        first = _weights(inputs.query, key_landmarks, keys)
        middle = jnp.where(exists, _weights(query_landmarks, key_landmarks, keys), 0)
        last = jnp.where(exists, _weights(query_landmarks, key, seen), 0)
        summary = jnp.einsum("BKGmS,BKSE->BKGmE", last, value, precision=HIGHEST)
        inverse = pseudo_inverse(middle, self.iterations)
        output = _product(first, _product(inverse, summary))
        return jnp.where(sees_any(mask)[..., None], output, 0)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """Three tables of weights, the values through two of them, and four products of m by m an iteration."""
        del is_causal  # it is refused
        m = min(self.landmarks, max(T, S))
        flops = 4.0 * m * (T + S) * head_dim + 2.0 * m * m * head_dim + 8.0 * self.iterations * m**3
        numbers = 2.0 * (T + S) * head_dim + 2.0 * m * (T + S) + 8.0 * self.iterations * m * m
        return Cost(num_heads * flops, 4.0 * num_heads * numbers)


def runs(lengths, size: int, landmarks: int, dtype) -> tuple[Float[Array, "b m n"], Bool[Array, "b m"]]:
    """What takes tokens to the means of runs of them, and which runs have a token."""
    length = jnp.array([size]) if lengths is None else lengths
    m = min(landmarks, size)
    token = jnp.arange(size)[None]
    if size * m >= 2**31:
        raise ValueError(f"Nystrom.landmarks is {landmarks}: expected less than 2**31 / {size}, the length")
    count = jnp.minimum(length, m)[:, None]  # with fewer tokens than landmarks, one token a run
    run = jnp.where(token < length[:, None], token * count // jnp.maximum(length, 1)[:, None], -1)
    member = run[:, None, :] == jnp.arange(m)[None, :, None]
    tokens = member.sum(-1, keepdims=True)
    return jnp.where(member, 1 / jnp.maximum(tokens, 1).astype(dtype), 0), tokens[..., 0] > 0


def pseudo_inverse(A: Float[Array, "*N m n"], iterations: int) -> Float[Array, "*N n m"]:
    """Razavi et al.'s iteration of third order; rows and columns of zeros stay zero (Xiong et al., equation 11)."""
    size = jnp.abs(A)
    scale = size.sum(-1).max(-1) * size.sum(-2).max(-1)
    Z = jnp.swapaxes(A, -1, -2) / jnp.where(scale > 0, scale, 1)[..., None, None]
    identity = jnp.broadcast_to(jnp.eye(A.shape[-2], dtype=A.dtype), (*A.shape[:-1], A.shape[-2]))
    for _ in range(iterations):
        AZ = _product(A, Z)
        Z = _product(Z, 13 * identity - _product(AZ, 15 * identity - _product(AZ, 7 * identity - AZ))) / 4
    return Z


def _weights(query: Float[Array, "B K G r H"], key: Float[Array, "B K c H"], seen: Bool[Array, "b c"]):
    logits = jnp.einsum("BKGrH,BKcH->BKGrc", query, key, precision=HIGHEST)
    return softmax(jnp.where(seen[:, None, None, None, :], logits, -jnp.inf))


def _product(a: Float[Array, "*#N r c"], b: Float[Array, "*#N c k"]) -> Float[Array, "..."]:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
