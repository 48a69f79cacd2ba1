"""Whether pages can be left out at all, from what costs one pass over keys and values and a few of the queries.

Of a page of n keys, lambda is at least mean |y|^2 / H and psi at least 1 / 2 (`attention.sparse.plan`), and so the
share of its mean at least n e^s |q|^2 D mean |y|^2 / (2 H). Where rows read nearly all pages even so, they read all.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from attention.inputs import Inputs
from attention.rounding import norms, product
from attention.sparse.plan import Limits, threshold
from attention.sparse.visible import first_keys, first_rows, spaced

LOOKS = 256  # queries that are looked at
MOST = 0.9  # of the pages: if they read more, all are read


def hopeless(part: Inputs, own: Limits, page: int, width, tolerance: float) -> Bool[Array, ""]:
    """Whether some rows of a head read most of their pages however small their errors are; no bound relies on it.

    All queries see the same keys; `width` is a lower bound on the largest distance of two values.
    """
    dtype, H = part.query.dtype, part.query.shape[-1]
    keys = part.key[0, 0].astype(dtype).reshape(-1, page, H)
    at = spaced(first_rows(part), max(1, LOOKS // part.query.shape[2]))
    query, own = part.query[0, 0][:, at].reshape(-1, H), Limits(*(x[:, at].reshape(-1) for x in own))
    whole = (jnp.arange(len(keys)) + 1) * page <= first_keys(part)
    centre = keys.mean(1)
    spread = jnp.maximum((keys**2).mean((1, 2)) - (centre**2).mean(1), 0)
    logits = jnp.where(whole[:, None], product("PH,QH->PQ", centre, query), -jnp.inf)
    weights = jnp.exp(logits - logits.max(0)[None])
    share = weights * spread[:, None] * (norms(query) ** 2 * own.diameter / 2)[None]
    budget = jnp.maximum(tolerance * width - own.rounding, 0) / own.odds * weights.sum(0)
    read = share > threshold(share, budget)[None]
    return ~((read & whole[:, None]).mean() <= MOST * whole.mean())
