"""Which pages each query reads, and which it replaces by their means: decided before a key is read.

For a page of n keys with mean key c and mean value m, s = q.c and x_j = q.(k_j - c), the mean's share of the error is

    |sum_j e^{s + x_j} (v_j - o) - n e^s (m - o)| <= n e^s [psi(R) lambda |q|^2 D + mu |q|] + rounding,

with |x_j| <= R, psi(R) = (e^R - 1 - R) / R^2, lambda and mu the norms of the page's second moments, and D no less than
|v_j - o|. A page's sum of e^l is at least n e^s (Jensen), so that division by the sum of n e^s bounds the error of the
output; `docs/bounds.md` has the derivation. A row's plan depends on what that row sees and on nothing else.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attention.exponential import power, unit
from attention.inputs import Inputs
from attention.rounding import Sizes, calm_limit, norms, product, rounding_bound, roundoff, sizes
from attention.sparse.bounds import odds_rounding, value_reach
from attention.sparse.moments import Moments
from attention.sparse.visible import Edge, Visible

Reach = Callable[[Array, Moments], Array]


class Limits(NamedTuple):
    """What bounds the error of a query beside its plan.

    Attributes:
        diameter: D, an upper bound on the distance of a value that the query sees from its output.
        rounding: the error of attention to the keys that are read and to the means, in floating point.
        odds: the factor by which rounding can change the ratio of two sums of exponentials.
        size: an upper bound on the size of the logits.
        width: a lower bound on the largest distance of two values that it sees, as far as one is known before pages.
    """

    diameter: Float[Array, "*B G T"]
    rounding: Float[Array, "*B G T"]
    odds: Float[Array, "*B G T"]
    size: Float[Array, "*B G T"]
    width: Float[Array, "*B G T"]


class Plan(NamedTuple):
    """What becomes of each page, and the error that the means can cause, in units of e^top.

    Pages come first: what is added up over them then spreads along the vector units of a CPU.

    Attributes:
        read: whether the keys of the page are read.
        mean: whether the page is replaced by its means.
        logits: q.c.
        top: the largest logit of a mean of keys that the query sees; 0 where none is known.
        error: an upper bound on |sum over replaced pages of the difference of weighted values - o|.
        mass: an upper bound on the sum of e^{l} over the keys of replaced pages.
    """

    read: Bool[Array, "P G T"]
    mean: Bool[Array, "P G T"]
    logits: Float[Array, "P G T"]
    top: Float[Array, "G T"]
    error: Float[Array, "G T"]
    mass: Float[Array, "G T"]


def limits(inputs: Inputs, page: int, *, rescalings: int, fixed_shift: float) -> Limits:
    """The limits of every query, by prefixes of the keys; `rescalings` and `fixed_shift` as in `rounding_bound`."""
    return limits_of(sizes(inputs), value_reach(inputs), page, rescalings=rescalings, fixed_shift=fixed_shift)


def limits_of(
    of: Sizes,
    reach: Float[Array, "B K 1 T"],
    page: int,
    *,
    rescalings: int,
    fixed_shift: float,
    depth: int | None = None,
) -> Limits:
    """The same from the sizes, and from how far the values are apart at most; `depth` as in `rounding_bound`."""
    means = 2 * (page + 8) * roundoff(of.query.dtype) * of.value
    return Limits(
        diameter=jnp.broadcast_to(reach + means, of.query.shape),
        rounding=rounding_bound(of, rescalings=rescalings, depth=depth, fixed_shift=fixed_shift) + means,
        # A mean key is off by (page + 8) u max|k|, which moves its logits by less than (page + 8) / H of what D allows.
        odds=odds_rounding(of, rescalings=rescalings, share=1 + (page + 8) / of.head),
        size=calm_limit(of),
        width=jnp.zeros_like(of.query),
    )


def plan(
    query: Float[Array, "G T H"],
    pages: Moments,
    visible: Visible,
    edge: Edge,
    own: Limits,
    *,
    size: int,
    tolerance: float,
    reach: Reach,
) -> Plan:
    """The plan of a tile of queries of one head, for pages of `size` keys.

    The budget is tolerance times a lower bound on diam(V), that of `own` or the width of a page that the query sees
    whole, less what rounding may take; shares of the error up to a threshold go to the means, the others are read.

    Cost: 2 T P H operations for the logits, two exponentials and about 30 more for each query and page, and `reach`.
    """
    whole, length, diameter = visible.whole, norms(query)[None], own.diameter[None]
    spread, coupling, width, key_shift, value_shift = (
        x.reshape(-1, 1, 1) for x in (pages.spread, pages.coupling, pages.width, pages.key_shift, pages.value_shift)
    )
    logits = product("GTH,PH->PGT", query, pages.key)
    part = jnp.where(edge.count > 0, (query * edge.mean[None]).sum(-1), -jnp.inf)
    top = jnp.maximum(jnp.where(whole, logits, -jnp.inf).max(0), part)
    top = jnp.where(jnp.isfinite(top), top, 0)
    exponent, R = logits - top[None], reach(query, pages)
    near = jnp.where(whole, power(exponent * unit(exponent.dtype)), 0)
    total = size * near.sum(0) + edge.count[None] * jnp.exp(part - top)
    second = _remainder(near, exponent, R) * jnp.minimum(spread * length**2, R**2)
    shift = key_shift * length * (diameter + value_shift) + value_shift
    share = size * (second * diameter + _positive(near) * (coupling * length + shift))
    share = jnp.where(whole & (share < jnp.inf), share, jnp.inf)  # NaN is not known
    width = jnp.maximum(jnp.where(whole, width, 0).max(0), own.width)
    budget = jnp.maximum(tolerance * width - own.rounding, 0) / own.odds * total
    mean = whole & (share <= threshold(share, budget)[None])
    error = jnp.where(mean, share, 0).sum(0)
    mass = size * jnp.where(mean, near + second, 0).sum(0)
    return Plan(visible.seen & ~mean, mean, logits, top, error, mass)


def threshold(share: Float[Array, "P ..."], budget: Float[Array, "..."]) -> Float[Array, "..."]:
    """The budget over 2^e, with the smallest e >= 0 for which the shares up to it add up to no more than the budget.

    With e = log2(P) they always do; bisection over the integers up to it.
    """
    low, high = jnp.zeros(budget.shape, jnp.int32), jnp.full(budget.shape, len(share).bit_length(), jnp.int32)
    for _ in range(_halvings(len(share))):
        middle = (low + high) // 2
        level = budget * jnp.exp2(-middle.astype(budget.dtype))
        fits = jnp.where(share <= level[None], share, 0).sum(0) <= budget
        low, high = jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)
    return budget * jnp.exp2(-high.astype(budget.dtype))


def _halvings(pages: int) -> int:
    """Halvings that leave one of bit_length + 1 exponents."""
    return pages.bit_length().bit_length() + 1


def _remainder(near, exponent, R):
    """Psi(R) e^exponent: (e^R - 1 - R) / R^2 for large R, and 1 / (2 (1 - R / 3)), which is no less, for small.

    psi(R) = sum R^k / (k + 2)! <= sum (R / 3)^k / 2. Beyond R = 1 the difference loses less than 7 times its operands'
    relative error.
    """
    far = jnp.exp(exponent + R)
    large = (far - near * (1 + R)) / jnp.maximum(R, 1) ** 2
    small = _positive(near) / (2 * (1 - jnp.minimum(R, 1) / 3))
    return jnp.where(R < 1, small, _positive(large))


def _positive(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """No less than the smallest normal number: what underflows is counted."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
