"""What a layer is made of beside its method: projections, norms, and the scale of its heads."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention.scale_rules import initial_scale, scale_rule


class Constant(nnx.Variable):
    """What a random method drew: part of the model, never of the gradient."""


class Singular(Constant):
    """A singular vector as far as power iteration has come; `MultiHeadAttention.power_iteration` renews it."""


class SpectralLinear(nnx.Linear):
    r"""A linear map whose spectral norm is a parameter (sigma-reparametrisation).

        y = (gamma / sigma) x W + b,    sigma = l^T W r

    with l and r the singular vectors of W of the largest singular value, found by power iteration: exact at first, one
    iteration a call of `power_iteration` from then on. They have no gradient. gamma starts at 1.

    Takes what `nnx.Linear` takes.

    Cost: that of the linear map, 4 D O operations for sigma, and as many for an iteration.
    Error bound: sigma is at most the spectral norm of W, and below it while power iteration lags behind W.

    References:
        Zhai et al., "Stabilizing Transformer training by preventing attention entropy collapse", arXiv 2303.06296,
        section 3.2.
    """

    def __init__(self, inputs: int, outputs: int, **options: Any):
        super().__init__(inputs, outputs, **options)
        left, _, right = jnp.linalg.svd(self.kernel[...], full_matrices=False)
        self.gamma = nnx.Param(jnp.ones((), left.dtype))
        self.left, self.right = Singular(left[:, 0]), Singular(right[0])

    def __call__(self, inputs: Float[Array, "*N D"], out_sharding: Any = None) -> Float[Array, "*N O"]:
        sigma = jnp.einsum(
            "D,DO,O->", self.left[...], self.kernel[...], self.right[...], precision=jax.lax.Precision.HIGHEST
        )
        return super().__call__((inputs * (self.gamma[...] / sigma)).astype(inputs.dtype), out_sharding)

    def power_iteration(self) -> None:
        """Brings the singular vectors closer to those of the kernel as it is."""
        kernel = self.kernel[...]
        right = _unit(self.left[...] @ kernel)
        self.right[...], self.left[...] = right, _unit(kernel @ right)


def by_token(function: Callable[[Array], Array], x) -> Float[Array, "B T O"]:
    """A function of matrices applied to all tokens of a batch as the rows of one matrix.

    The gradient of a linear layer is then one plain product, which XLA computes on a CPU in less than half of the time
    that operands with a batch take.
    """
    return function(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def unit_norm(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Every head's vector divided by its Euclidean norm, in float32 at least; a vector of zeros stays one.

    References:
        Henry et al., "Query-key normalization for transformers", arXiv 2010.04245, section 3.
    """
    return _unit(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def _unit(x: Array) -> Array:
    square = (x * x).sum(-1, keepdims=True)
    seen = square > 0  # where it is not, the square root has no derivative
    return jnp.where(seen, x * jax.lax.rsqrt(jnp.where(seen, square, 1)), 0)


def rows_scaled(query: Float[Array, "B T N H"], factor: Float[Array, "b T n"]) -> Float[Array, "B T N H"]:
    """The queries times one number a row, in float32 at least."""
    return (query.astype(factor.dtype) * factor[..., None]).astype(query.dtype)


def starting_scale(
    scale: str | float, *, num_heads: int, head_dim: int, length: int | None, dtype: Any
) -> nnx.Param | float:
    """What a layer keeps as its scale: a number, or a parameter with one a head."""
    if not isinstance(scale, str):
        return scale
    start = initial_scale(scale, head_dim, length)
    return nnx.Param(jnp.full((num_heads,), start, dtype)) if scale_rule(scale).learned else start


def check_sizes(D: int, N: int, K: int, H: int | None, rotary_base: float | None) -> None:
    """Raises ValueError for the first size that no layer can have."""
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


def plain(tree: Any) -> Any:
    """Mappings of any type as dicts, which is what nnx looks into."""
    return {name: plain(leaf) for name, leaf in tree.items()} if isinstance(tree, Mapping) else tree


def values(variables: Any) -> Any:
    """The arrays of a tree of variables."""
    return jax.tree.map(lambda x: x[...], variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
