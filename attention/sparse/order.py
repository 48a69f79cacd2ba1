"""The order in which queries and keys make coherent pages and tiles, where every query of a head sees the same keys.

There the order of keys changes no output, and that of queries is undone. Of a sample of the keys each next centre is
the one farthest from those before it; with r_k the distance of the k-th from them, there are as many clusters as the
last k with r_k >= 2 r_{k+1}, if there is any. A key belongs to the nearest centre, a query to that of its largest
logit. Whole pages of a cluster come first and what is left over of all clusters last, so that few pages have keys of
two. Nothing is sorted where there are no clusters, or where most neighbours are in one cluster as they stand.

References:
    Gonzalez, "Clustering to minimize the maximum intercluster distance", Theoretical Computer Science 38 (1985).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attention.inputs import Inputs
from attention.rounding import product, roundoff
from attention.sparse.kernel import Short
from attention.sparse.plan import Limits
from attention.sparse.visible import alike, first_keys, first_rows, spaced

LEAST = 2048  # queries, and keys, below which nothing is sorted
PAGES = 8  # of keys, likewise
MOST = 128  # centres
SAMPLE = 8  # keys looked at for each centre: a cluster as large as a page is missed with odds of e^-8
FALL = 2.0  # of the distances, from between clusters to within them
AGREE = 0.5  # the share of neighbours in one cluster from which on the given order is left


class Clusters(NamedTuple):
    """Keys in the middle of the others; those from `count` on are none, and 0 says that there are no clusters."""

    centres: Float[Array, "K H"]
    count: Int[Array, ""]

    @property
    def apart(self) -> Float[Array, " K"]:
        """Half the squares of the centres: what makes the largest of k.c - apart that of the nearest."""
        return 0.5 * (self.centres**2).sum(-1)


class Look(NamedTuple):
    """The clusters of a head, and whether queries and keys are to be sorted by them."""

    found: Clusters
    sorts: Bool[Array, ""]


def pays(inputs: Inputs, page: int) -> bool:
    """Whether order changes nothing, and there is enough to sort."""
    queries, keys = inputs.mask.num_queries, inputs.mask.num_keys
    return alike(inputs) and min(queries, keys) >= LEAST and keys >= PAGES * page


def looked(part: Inputs, page: int) -> Look:
    """The clusters of one key head, and whether they are in no order.

    Cost: K = min(S / page, 128) centres of 8 K keys, 2 (8 K)^2 H operations.
    """
    query, key, rows, keys = _still(part)
    found = clusters(key, keys, min(len(key) // page, MOST))
    nothing = jnp.zeros_like(found.apart)
    near = _neighbours(key, keys, found, found.apart, page) & _neighbours(query[0], rows, found, nothing, page)
    return Look(found, (found.count > 1) & ~near)


def ordered(part: Inputs, own: Limits, added: Short | None, look: Look, page: int):
    """The operands and limits of one key head, sorted if that pays, and what undoes it.

    Cost: if it sorts, 2 (T + S) K H operations and sorts. Nothing has a derivative but the values that are moved.
    """
    query, key, rows, keys = _still(part)
    found, sorts = look

    def moved(part, bounds):
        by_key = by_pages(jnp.where(jnp.arange(len(key)) < keys, labels(key, found, found.apart), MOST), page)
        label = labels(query.reshape(-1, query.shape[-1]), found, jnp.zeros_like(found.apart)).reshape(query.shape[:2])
        label = jnp.where(jnp.arange(query.shape[1])[None] < rows, label, MOST)
        by_query = jnp.argsort(label, axis=1, stable=True)
        key_, value = (jnp.take(x, by_key, axis=2, unique_indices=True) for x in (part.key, part.value))
        part = dataclasses.replace(part, query=_moved(part.query[0, 0], by_query)[None, None], key=key_, value=value)
        return part, jax.tree.map(lambda x: _moved(x, by_query), bounds), jnp.argsort(by_query, axis=1)

    def kept(part, bounds):
        return part, bounds, jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])

    part, bounds, back = lax.cond(sorts, moved, kept, part, (own, added))
    return part, *bounds, lambda x: lax.cond(sorts, lambda: _moved(x, back), lambda: x)


def _still(part: Inputs):
    """Queries and keys of one key head, and how many of them there are."""
    query, key = (lax.stop_gradient(x).astype(part.query.dtype) for x in (part.query[0, 0], part.key[0, 0]))
    return query, key, first_rows(part), first_keys(part)


def clusters(key: Float[Array, "S H"], keys: Int[Array, ""], most: int) -> Clusters:
    """The clusters of the first `keys` keys, `most` at most."""
    some = key[spaced(keys, SAMPLE * most)]
    centred = some - some.mean(0)[None]
    square = (centred**2).sum(-1)
    apart = square[:, None] + square[None] - 2 * product("SH,RH->SR", centred, centred)

    def add(i, carry):
        chosen, radii, nearest = carry
        j = nearest.argmax()
        return chosen.at[i].set(j.astype(chosen.dtype)), radii.at[i].set(nearest[j]), jnp.minimum(nearest, apart[j])

    start = jnp.zeros(most + 1, jnp.int32), jnp.zeros(most + 1, key.dtype), jnp.full(len(some), jnp.inf, key.dtype)
    chosen, radii, _ = lax.fori_loop(0, most + 1, add, start)
    # Equal keys are apart by what rounding makes of their distance.
    radii = jnp.maximum(radii, 8 * key.shape[1] * roundoff(key.dtype) * square.max())
    falls = radii[1:-1] >= FALL**2 * radii[2:]
    return Clusters(some[chosen[:-1]], jnp.where(falls, jnp.arange(2, most + 1), 0).max())


def labels(x: Float[Array, "N H"], found: Clusters, apart: Float[Array, " K"]) -> Int[Array, " N"]:
    """The centre with the largest x.c less its `apart`: with |c|^2 / 2, the nearest."""
    index = jnp.arange(len(apart))[:, None]
    scores = product("KH,NH->KN", found.centres, x) - apart[:, None]
    scores = jnp.where(index < found.count, scores, -jnp.inf)
    return jnp.where(scores >= scores.max(0)[None], index, 0).max(0)  # an argmax that runs along vector units


def by_pages(label: Int[Array, " S"], page: int) -> Int[Array, " S"]:
    """The order of whole pages of each cluster, what is left over of clusters, and those of label `MOST`."""
    order = jnp.argsort(label, stable=True)
    label = label[order]
    starts = jnp.searchsorted(label, jnp.arange(MOST + 2))
    size, rank = jnp.diff(starts)[label], jnp.arange(len(label)) - starts[label]
    last = jnp.where(label < MOST, rank >= size - size % page, 2)
    return order[jnp.argsort(last, stable=True)]


def _neighbours(x: Float[Array, "N H"], count, found: Clusters, apart, page: int) -> Bool[Array, ""]:
    """Whether those half a page from each other tend to be in one cluster."""
    at = spaced(count - page // 2, 2 * len(apart))
    both = labels(jnp.concatenate([x[at], x[at + page // 2]]), found, apart)
    return jnp.mean(both[: len(at)] == both[len(at) :]) >= AGREE


def _moved(x: Float[Array, "G T *E"], order: Int[Array, "G T"]) -> Float[Array, "G T *E"]:
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
