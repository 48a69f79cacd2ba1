"""Queries, keys and values with and without structure, for what is measured of sparse attention."""

import functools
from collections.abc import Callable

import numpy as np

RUN = 256  # keys around a shared centre


def iid(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Standard normal, as everything else before it is given a structure: `1 T N H`, float32."""
    del causal
    return tuple(rng.standard_normal((1, T, N, H), np.float32) for _ in range(3))


def long(rng: np.random.Generator, T: int, N: int, H: int, causal: bool, *, norm: float):
    """The same with queries and keys `norm` long at H = 64, where iid is 8, and trained models have 11 to 14."""
    query, key, value = iid(rng, T, N, H, causal)
    return np.float32(norm / 8) * query, np.float32(norm / 8) * key, value


def clustered(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Keys of a run of 64 around a centre of their own, of the same size as their spread; queries anywhere."""
    query, key, value = iid(rng, T, N, H, causal)
    centres = np.repeat(rng.standard_normal((1, -(-T // 64), N, H), np.float32), 64, axis=1)[:, :T]
    return query, (centres + key) / np.float32(np.sqrt(2)), value


def power_law(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Entry h of queries and keys in proportion to 1 / h, at the norm of a standard normal one."""
    query, key, value = iid(rng, T, N, H, causal)
    decay = np.arange(1, H + 1, dtype=np.float32) ** -1
    decay *= np.sqrt(H / np.sum(decay**2))
    return query * decay, key * decay, value


def coherent(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Runs of keys 0.2 around centres of size 1.5, and runs of queries around another's centre; causal, their own."""
    query, key, value = iid(rng, T, N, H, causal)
    runs = -(-T // RUN)
    centres = 1.5 * rng.standard_normal((1, runs, N, H), np.float32)
    others = np.arange(runs) if causal else rng.permutation(runs)
    around = (np.repeat(x, RUN, axis=1)[:, :T] for x in (centres[:, others], centres))
    query, key = (centre + np.float32(0.2) * x for centre, x in zip(around, (query, key), strict=True))
    return query.astype(np.float32), key.astype(np.float32), value


def shuffled(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """The same, with the queries in any order, and the keys with their values in another."""
    query, key, value = coherent(rng, T, N, H, causal)
    queries, keys = rng.permutation(T), rng.permutation(T)
    return query[:, queries], key[:, keys], value[:, keys]


def duplicated(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """Each key is one of 16, anywhere; its value is its own."""
    query, key, value = iid(rng, T, N, H, causal)
    return query, key[:, rng.integers(min(16, T), size=T)], value


def huge_key(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """One key in the first half is 20 times as long: half of the queries see little else, the others hardly it."""
    query, key, value = iid(rng, T, N, H, causal)
    key[:, rng.integers(max(1, T // 2))] *= 20
    return query, key, value


def huge_values(rng: np.random.Generator, T: int, N: int, H: int, causal: bool):
    """A run of 64 keys in the first half, which no query looks at, has values 1,000 times as large."""
    query, key, value = iid(rng, T, N, H, causal)
    query, key = np.abs(query), np.abs(key)
    first = rng.integers(max(1, T // 2))
    key[:, first : first + 64] *= -1
    value[:, first : first + 64] *= 1000
    return query, key, value


FAMILIES = {
    "iid": iid,
    "clustered pages": clustered,
    "power law": power_law,
    "coherent runs": coherent,
    "duplicated keys": duplicated,
    "one huge key": huge_key,
    "huge values unseen": huge_values,
}
NORMS = (10, 11, 12, 14)
RACED: dict[str, Callable[..., tuple[np.ndarray, ...]]] = {
    **FAMILIES,
    "shuffled runs": shuffled,
    **{f"iid, norms of {norm}": functools.partial(long, norm=norm) for norm in NORMS},
}
