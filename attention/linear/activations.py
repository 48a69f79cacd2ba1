r"""What the features of least variance know of the activations: moments of queries and keys, fixed before the call.

A feature map that looked at the tokens of a call would let the future change the past, and tokens of one sequence
those of another. So these numbers are constants of `params`: those of standard normal activations until
`Performer.fitted` takes them from a sample. beta scales them inside the call.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

RIDGE = 2.0**-10
"""Share of the mean variance that is added to every direction, so that a sample that spans fewer has an inverse."""

Moments = dict[str, Array]


def standard_spread() -> Moments:
    """Of entries of mean 0 and variance 1: (x_h + y_h)^2 has the mean 2 beta."""
    return {"spread": jnp.full((1,), 2.0)}


def sample_spread(query: Float[Array, "B T K G H"], key: Float[Array, "B S K H"]) -> Moments:
    """`spread`, `K`: E|q + k|^2 / H over all pairs of a query and a key of a head, from their first two moments.

    References:
        Likhosherstov et al., "Chefs' random tables", arXiv 2205.15317, section 3.1.
    """
    squares = (query**2).sum(-1).mean((0, 1, 3)) + (key**2).sum(-1).mean((0, 1))
    cross = (query.mean((0, 1, 3)) * key.mean((0, 1))).sum(-1)
    return {"spread": (squares + 2 * cross) / key.shape[-1]}


def standard_geometry(H: int) -> Moments:
    """Of entries of mean 0 and variance 1, which no rotation and no rescaling improves."""
    zero, identity = jnp.zeros((1, H)), jnp.eye(H)[None]
    moments = {"query_mean": zero, "key_mean": zero, "query_map": identity, "key_map": identity}
    return moments | {"spread": jnp.full((1, H), 2.0)}


def sample_geometry(query: Float[Array, "B T K G H"], key: Float[Array, "B S K H"]) -> Moments:
    r"""The coordinates in which queries and keys have the same diagonal covariance.

    With means d and c, covariances Q = L_q L_q^T and C = L_k L_k^T, and L_k^T L_q = U S V^T,

        query_map = S^{1/2} V^T L_q^{-1},    key_map = S^{-1/2} V^T L_q^T,    spread = 2 diag S.

    query_map^T key_map = I, so that no logit changes, and both covariances become S. Among the maps that make both
    diagonal it has the least spread in every coordinate: s p + s / p >= 2 s.

    Returns:
        query_mean and key_mean `K H`, query_map and key_map `K H H`, spread `K H`.

    References:
        Likhosherstov et al., "FAVOR#", arXiv 2302.00787, section 3.3 (asymmetric dense-exponential features); the means
        are ours.
    """
    query, key = (jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[-1]) for x in (query, key))
    (d, Lq), (c, Lk) = _factored(query), _factored(key)
    _, S, Vt = jnp.linalg.svd(jnp.swapaxes(Lk, 1, 2) @ Lq)
    root = jnp.sqrt(S)[:, :, None]
    key_map = Vt @ jnp.swapaxes(Lq, 1, 2) / root
    query_map = jnp.swapaxes(jnp.linalg.inv(key_map), 1, 2)
    return {"query_mean": d, "key_mean": c, "query_map": query_map, "key_map": key_map, "spread": 2 * S}


def _factored(x: Float[Array, "K n H"]) -> tuple[Float[Array, "K H"], Float[Array, "K H H"]]:
    """The mean, and the Cholesky factor of the covariance with its ridge."""
    mean = x.mean(1)
    centred = x - mean[:, None]
    covariance = jnp.einsum("KnH,Knh->KHh", centred, centred, precision="highest") / x.shape[1]
    variance = jnp.trace(covariance, axis1=1, axis2=2) / x.shape[2]
    # A sample without any variance is given some, so that it has a factor.
    ridge = RIDGE * jnp.where(variance > 0, variance, 1)
    return mean, jnp.linalg.cholesky(covariance + ridge[:, None, None] * jnp.eye(x.shape[2])[None])
