"""Softmax attention by positive orthogonal random features."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.inputs import Inputs
from attention.linear.base import Linear
from attention.linear.engine import FeatureMap
from attention.linear.state import HIGHEST, Features
from attention.method import Capabilities, Cost, Params, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performer(Linear):
    r"""Softmax attention by positive random features (FAVOR+), in time linear in length.

        e^{x.y} = E[phi(x).phi(y)],    phi(x) = e^{W x - |x|^2 / 2} / sqrt(M),

    with x = beta q / sqrt|beta| and y = k sqrt|beta|, so that x.y is the logit and each carries half of the
    temperature: neither depends on the data, nor on the other side. The M rows of W are N(0, I), independent
    or orthogonal in blocks of H; one W serves all heads. At beta = 0 all features are equal and the output is
    the mean over the visible keys. The sign of a negative beta stays with the query.

    Cost: 2 M (2 H + E) operations a token, and where causal 2 C (M + E) more; a state of M (E + 1) numbers.
    Error bound: no bound known. The kernel is unbiased with relative variance (e^{|x+y|^2} - 1) / M for
    independent rows and no more for orthogonal ones, so the features needed grow as e^{1/temperature}.
    Where every product of features in a row underflows (logits of hundreds) the estimate is lost: the row is 0,
    and `jax.experimental.checkify` reports it.

    Attributes:
        features: M.
        orthogonal: whether W is orthogonal in blocks (section 3 of the paper), or independent.
        chunk: C.

    References:
        Choromanski et al., "Rethinking attention with Performers", arXiv 2009.14794, sections 2.3 and 2.4.
    """

    features: int = 256
    orthogonal: bool = True

    capabilities = Capabilities(causal=True, lengths=True, segments=True, cross=True, decoding=True, random=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "features")

    @classmethod
    def examples(cls) -> "tuple[Performer, ...]":
        return (cls(features=24, chunk=5),)

    def ladder(self, length: int) -> "tuple[Performer, ...]":
        del length
        return tuple(dataclasses.replace(self, features=features) for features in (16, 128, 1024))

    def num_features(self, head_dim: int) -> int:
        del head_dim
        return self.features

    def init(self, rng: Array | None, *, num_heads: int, head_dim: int) -> Params:
        """Draws W, `M H` in float32 whatever the dtype of the operands, from `rng` alone."""
        del num_heads
        if rng is None:
            raise ValueError("Performer.init: rng is None: expected a key, since the projection is drawn from it")
        draw = orthogonal_gaussian if self.orthogonal else jax.random.normal
        return Params(constants={"projection": draw(rng, (self.features, head_dim), jnp.float32)})

    def feature_map(self, inputs: Inputs) -> FeatureMap:
        head_dim, dtype = inputs.query.shape[-1], inputs.query.dtype
        params = inputs.params
        if params is None:
            params = self.init(inputs.rng, num_heads=inputs.query.shape[1], head_dim=head_dim)
        projection = params.constants["projection"]
        if projection.shape != (self.features, head_dim):
            raise ValueError(
                f"params: the projection has shape {projection.shape}: expected {(self.features, head_dim)}; "
                f"pass what this method's init(rng, num_heads=, head_dim={head_dim}) returns"
            )
        projection = projection.astype(dtype)
        own = inputs.beta.ndim > 0 and inputs.query.shape[2] > 1  # a temperature for each head of a group
        down, up = _halves(inputs.beta)

        def query(x, position):
            del position
            return positive_features(x * down, projection)

        def key(y, position):
            del position
            return positive_features(y[:, :, None] * up, projection)

        return FeatureMap(query=query, key=key, size=self.features, groups=inputs.query.shape[2] if own else 1)

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """The engine's, and the projection of every query and key."""
        engine = super().cost(T, S, num_heads=num_heads, head_dim=head_dim, is_causal=is_causal)
        return engine._replace(flops=engine.flops + 2.0 * num_heads * (T + S) * self.features * head_dim)


def positive_features(x: Float[Array, "*N H"], projection: Float[Array, "M H"]) -> Features:
    """phi(x) = e^{W x - |x|^2 / 2} / sqrt(M); the largest feature of a token is 1, the rest is in its log_scale."""
    exponents = jnp.einsum("...H,MH->...M", x, projection, precision=HIGHEST)
    top = lax.stop_gradient(exponents.max(-1))  # it cancels in phi
    log_scale = top - (x * x).sum(-1) / 2 - jnp.log(projection.shape[0]) / 2
    return Features(jnp.exp(exponents - top[..., None]), log_scale.astype(x.dtype))


def orthogonal_gaussian(rng: Array, shape: tuple[int, int], dtype=jnp.float32) -> Float[Array, "M H"]:
    """Rows N(0, I), orthogonal to the others of their block of H; norms are independent, chi-distributed.

    Rows beyond the last full block are the first of another one. Memory O(M H), time O(M H^2).
    """
    M, H = shape
    directions, lengths = jax.random.split(rng)
    square, triangle = jnp.linalg.qr(jax.random.normal(directions, (-(-M // H), H, H), dtype))
    # Times the signs of the triangle's diagonal, the factor is uniform over rotations (Mezzadri, math-ph/0609050).
    signs = jnp.where(jnp.diagonal(triangle, axis1=-2, axis2=-1) < 0, -1, 1).astype(dtype)
    rows = (square * signs[:, None, :]).reshape(-1, H)[:M]
    return rows * jnp.linalg.norm(jax.random.normal(lengths, (M, H), dtype), axis=-1, keepdims=True)


def _halves(beta: Float[Array, "..."]) -> tuple[Array, Array]:
    """What queries (which carry beta) and keys are multiplied by: 1 / sqrt|beta| and sqrt|beta|, 0 and 0 at 0.

    Five axes, `1 K G 1 1` or all of size 1. The square root is guarded, so that its gradient at 0 is not NaN.
    """
    zero = beta == 0
    root = jnp.sqrt(jnp.where(zero, 1, jnp.abs(beta)))
    down, up = jnp.where(zero, 0, 1 / root), jnp.where(zero, 0, root)
    K, G = beta.shape if beta.ndim else (1, 1)
    return down.reshape(1, K, G, 1, 1), up.reshape(1, K, G, 1, 1)
