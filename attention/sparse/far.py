"""All keys of a head at once, where that is provably enough: their moments up to the third, and some rows exactly.

With c the mean key, w_j = v_j - m the values about theirs, x_j = q.(k_j - c) and p(x) = 1 + b x + a x^2 near e^x,

    o = m + sum_j p(x_j) w_j / sum_j p(x_j),

of which the sums over keys are moments of keys and values, made once for all queries. a and b depend on |q|; a = 0
where that is enough, since the sums then are H by H numbers. If |e^x - p(x)| <= E_g |x| for |x| <= |q| max|k_j - c|,
over the keys of class g, then by Cauchy and Schwarz

    |error| <= sqrt(sum_g E_g^2 s_g^2) sqrt(lambda + |o - m|^2) / (1 + s^2 / (2 + R)) + rounding,

s_g^2 the share of class g in s^2 = mean x^2, and lambda the largest eigenvalue of mean w w^T. `docs/bounds.md` has the
derivation. Rows whose bound is above the tolerance read every key.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.inputs import Inputs
from attention.rounding import gamma, norms, product_roundoff, roundoff, sees_any
from attention.sparse.moments import outward
from attention.sparse.nearest import Line, distance, nearest
from attention.sparse.online import across
from attention.sparse.plan import Limits
from attention.sparse.polynomial import Row, evaluated, exactly, mended, mended_by_definition
from attention.sparse.spread import CHUNK, SHARES, Spread, split, spread
from attention.sparse.visible import alike, first_keys, first_rows, spaced

LOOKS = 1024  # rows, and keys, by which it is predicted how many rows need every key
WORTH = 0.5  # of the time of reading every key: what a polynomial may take, and pages may be worth
READING = 1.2  # how much longer it takes to read every key for some rows apart
SCALES = tuple(2.0 ** (i / 4) for i in range(-8, 17))  # of the R^2 that polynomials are for, by |q|^2 mean |y|^2


def degrees(inputs: Inputs) -> tuple[int, ...]:
    """The polynomials that are cheap enough: where every query sees the same keys, and these are many."""
    return tuple(degree for degree in (1, 2) if alike(inputs) and own_cost(inputs, degree) <= WORTH)


def own_cost(part: Inputs, degree: int) -> float:
    """The time of a polynomial, by that of reading every key: twice its share of the operations."""
    keys, (G, T, H), E = part.mask.num_keys, part.query.shape[2:], part.value.shape[-1]
    row = (len(SHARES) + 1) * H * H + H * E + (math.comb(H + 1, 2) * E if degree == 2 else 0)
    return 2 * row * (G * T + keys) / (G * T * keys * (H + E))


def costs(part: Inputs, width: Float[Array, ""], tolerance: float) -> list[Float[Array, ""]]:
    """The time of a key head by each of its `degrees`, if reading every key takes 1; no bound relies on it.

    By the share of some rows that would have to read every key, with moments of some keys.
    """
    query, key, value, seen, _ = _operands(part)
    rows, keys = spaced(first_rows(part), max(1, LOOKS // part.query.shape[2])), spaced(first_keys(part), LOOKS)
    query = part.query[0, 0][:, rows].reshape(-1, query.shape[-1])
    known = spread(key[keys], value[keys], seen[keys], 1)
    # The largest eigenvalue of fewer values is larger: by this, where they are normal.
    more, fewer = (1 + math.sqrt(value.shape[1] / n) for n in (len(key), len(keys)))
    known = known._replace(eigenvalue=known.eigenvalue * (more / fewer) ** 2)

    def of(degree: int):
        scale = _scale(query, known, degree)
        row = evaluated(query, known, scale, 1)  # without the third moments, which hardly move the output
        line = nearest(scale * known.traces.sum() * norms(query) ** 2, degree)
        error = error_bound(query, known, row._replace(line=line), degree, part.key.dtype)
        return own_cost(part, degree) + READING * jnp.mean(~(error <= tolerance * width), dtype=error.dtype)

    return [of(degree) for degree in degrees(part)]


def attended(part: Inputs, own: Limits, width: Float[Array, ""], *, tolerance: float, degree: int, defined: bool):
    """Output, error bound and replaced mass of all rows, and the share of them that read every key.

    Cost: 2 H (H (classes + 1) + E) operations for each query and each key, and H (H + 1) E more for degree 2.

    Args:
        part: the operands of a key head.
        own: the limits of its queries.
        width: no more than the diameter of its values.
        tolerance: of the error, in units of the diameter of the values.
        degree: of the polynomials.
        defined: whether it takes a form that has a derivative.
    """
    (G, T), (query, key, value, seen, rows) = part.query.shape[2:4], _operands(part)
    known = spread(key, value, seen, degree)
    scale = _scale(lax.stop_gradient(query), lax.stop_gradient(known), degree)

    def some(query):
        row = evaluated(query, known, scale, degree)
        return known.value + row.away, error_bound(*lax.stop_gradient((query, known, row)), degree, part.key.dtype)

    found, error = lax.map(jax.checkpoint(some), split(query, CHUNK))
    found, error = found.reshape(-1, value.shape[1])[: len(query)], error.reshape(-1)[: len(query)]
    wrong = rows & ~(error <= tolerance * width)
    columns = across(value, query.dtype)
    mend = mended_by_definition if defined else mended
    found = mend(query, found, wrong, lambda some: exactly(some, key, columns, seen))
    error = jnp.where(wrong, own.rounding.reshape(-1), error)
    found = jnp.where(rows[:, None], found, 0).reshape(G, T, -1)
    mass = (~wrong).astype(query.dtype)
    return found, error.reshape(G, T), mass.reshape(G, T), wrong.mean(dtype=query.dtype)


def _operands(part: Inputs):
    """Queries, keys and values of a head, which keys are seen, and which queries see any."""
    (G, T, H), dtype = part.query.shape[2:], part.query.dtype
    query, key, value = part.query[0, 0].reshape(-1, H), part.key[0, 0].astype(dtype), part.value[0, 0].astype(dtype)
    rows = jnp.broadcast_to(sees_any(part.mask)[0, 0], (G, T)).reshape(-1)
    return query, key, value, jnp.arange(len(key)) < first_keys(part), rows


def _scale(query: Float[Array, "N H"], known: Spread, degree: int) -> Float[Array, ""]:
    """That of `SCALES` with the least error for a query of the mean length, if its direction does not matter."""
    length = norms(query)
    length = length.sum() / jnp.maximum((length > 0).sum(), 1)
    scales = jnp.array(SCALES, query.dtype)
    line = nearest(scales * known.traces.sum() * length**2, degree)
    far = distance(Line(*(x[:, None] for x in line)), length * known.radii[None], degree)
    return scales[jnp.argmin((far**2 * known.traces[None]).sum(-1))]


def error_bound(query: Float[Array, "N H"], known: Spread, row: Row, degree: int, output_dtype) -> Float[Array, " N"]:
    """A bound on the error of rows by polynomials, which are rounded to a dtype in the end."""
    dtype, (H, E), line = query.dtype, (query.shape[1], known.value.size), row.line
    u, tiny, wide = roundoff(dtype), float(jnp.finfo(dtype).tiny), outward(query.dtype, query.shape[1])
    length, away = wide * norms(query), outward(dtype, E) * norms(row.away)
    R = length[:, None] * known.radii[None]
    radius = known.radii.max()
    # What rounding makes of the sums over keys, and over entries or monomials of a query, by the sums of their sizes.
    lost, lost_of_third = (
        gamma(known.lost + (terms + 16) * product_roundoff(dtype)) for terms in (2 * H, math.comb(H + 1, 2))
    )
    vanished = 8 * tiny * H**2 * ((1 + length) * (1 + radius)) ** 2 * (1 + known.depth)
    rounded = lost * length[:, None] ** 2 * known.traces[None] + vanished[:, None]
    upper = jnp.maximum(row.squares, 0) + rounded
    total, slack = row.squares.sum(1), rounded.sum(1)
    # The numerator's remainder, by the spread of the values about the output.
    remainder = jnp.sqrt((distance(Line(*(x[:, None] for x in line)), R, degree) ** 2 * upper).sum(1))
    remainder = remainder * jnp.sqrt(known.eigenvalue + (away + known.value_shift) ** 2)
    # What rounding makes of numerator and denominator.
    along = length * jnp.sqrt(known.traces.sum()) * known.length
    sums = along * (lost * jnp.abs(line.offset) + lost_of_third * line.slope * length * radius)
    numerator = known.value_shift + sums + vanished
    denominator = (
        jnp.abs(line.offset) * length * known.key_shift + line.slope * slack + 8 * u * (1 + line.slope * total)
    )
    least = 1 - length * known.key_shift + jnp.maximum(total - slack, 0) / (2 + R.max(1))
    error = (remainder + numerator + denominator * away) / jnp.where(least > 0, least, 0)
    # The query, and keys and values about c and m, are rounded, which moves logits and values; and so is the output.
    largest = norms(known.key)[0] * wide + radius
    logits = u * (8 * length * largest + 2 * R.max(1)) + tiny * (H + H**0.5 * (length + largest))
    moved, last = known.depth * (logits + 4 * u), roundoff(output_dtype) + 4 * u
    moved = moved + last * (wide * norms(known.value)[0] + known.depth + error)
    return 1.001 * (error + moved) + float(jnp.finfo(output_dtype).smallest_subnormal) * E**0.5
