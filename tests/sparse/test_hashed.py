"""Buckets collide as often as their closed form says, and a row reads what its buckets hold, each key once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Hashed, dot_product_attention
from attention.sparse.buckets import key_codes, query_codes
from attention.testing.cases import draw
from attention.testing.oracle import visibility

DRAWS, H, M = 4096, 8, 3.0
METHOD = Hashed(rounds=3, bits=2, bucket=3, window=2, query_chunk=5)


@pytest.fixture(scope="module")
def pairs():
    """A query, and keys at angles and lengths of all kinds, some of them beyond the radius."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal(H)
    away = rng.standard_normal(H)
    away -= query * (away @ query) / (query @ query)
    angles, lengths = (x.ravel() for x in np.meshgrid(np.linspace(0.05, 3.1, 6), (0.1, 1.5, 2.9, 9.0)))
    along, across = query / np.linalg.norm(query), away / np.linalg.norm(away)
    keys = lengths[:, None] * (np.cos(angles)[:, None] * along + np.sin(angles)[:, None] * across)
    cosines = keys @ along / np.maximum(lengths, M)
    return query.astype(np.float32), keys.astype(np.float32), np.arccos(np.clip(cosines, -1, 1))


@pytest.mark.parametrize("bits", [1, 3])
def test_buckets_collide_as_the_closed_form_says(pairs, bits):
    """P(same bit) = 1 - angle / pi with cos(angle) = q.k / (|q| max(|k|, M)), so bits^th powers for a bucket, and
    1 - (1 - p)^R for R rounds. Frequencies over independent draws err by sqrt(p (1 - p) / draws): 4 of that."""
    query, keys, angles = pairs
    directions = jax.random.normal(jax.random.key(bits), (DRAWS, bits, H + 1))
    mine, theirs = query_codes(jnp.asarray(query), directions), key_codes(jnp.asarray(keys), directions, jnp.float32(M))
    same = np.asarray(mine)[None] == np.asarray(theirs)
    once = (1 - angles / np.pi) ** bits
    for rounds in (1, 4):
        expected = 1 - (1 - once) ** rounds
        seen = same.reshape(len(keys), -1, rounds).any(-1)
        error = np.sqrt(expected * (1 - expected) / seen.shape[1])
        assert np.all(np.abs(seen.mean(1) - expected) <= 4 * error + 1e-12), f"{rounds} rounds"


def test_keys_within_the_radius_collide_in_the_order_of_their_logits(pairs):
    query, keys, angles = pairs
    inside = np.linalg.norm(keys, axis=1) <= M
    order = np.argsort(keys[inside] @ query)
    assert np.all(np.diff(angles[inside][order]) <= 1e-6)


def test_the_radius_of_a_sample_goes_with_its_scale():
    """By powers of two, which round nothing."""
    key = draw(0).astype(jnp.float32).key
    params = METHOD.init(jax.random.key(0), num_heads=4, head_dim=8)
    codes = []
    for scale in (1.0, 2.0**-10, 2.0**10):
        own = METHOD.fitted(params, key * scale).constants
        codes.append(np.asarray(key_codes(key * scale, own["directions"], own["radius"])))
    assert np.array_equal(codes[0], codes[1])
    assert np.array_equal(codes[0], codes[2])
    assert math.isclose(
        float(METHOD.fitted(params, key).constants["radius"]), np.linalg.norm(key, axis=-1).max(), rel_tol=1e-6
    )


OPTIONS = {
    "all": {},
    "causal": {"is_causal": True},
    "lengths": {"query_seq_lengths": np.array([13, 6]), "key_value_seq_lengths": np.array([5, 12])},
    "segments": {"is_causal": True, "query_segment_ids": np.sort(np.random.default_rng(0).integers(3, size=(2, 13)))},
}


def by_definition(case, params, options):
    """Softmax over the keys of each row, found one by one: `B T N E`."""
    B, T, N, _ = case.query.shape
    S, K = case.key.shape[1:3]
    names = ("query_seq_lengths", "key_value_seq_lengths", "local_window_size", "query_segment_ids")
    causal, segments = options.get("is_causal", False), options.get("query_segment_ids", np.zeros((B, T), int))
    visible = visibility((B, N, T, S), None, causal, "top_left", *(options.get(n) for n in names), None)
    lengths = options.get("key_value_seq_lengths", (S,) * B)
    query, key, _ = case.astype(jnp.float32)
    queries = np.asarray(query_codes(query, params.constants["directions"]))
    keys = np.asarray(key_codes(key, **params.constants))
    output = np.zeros((B, T, N, case.value.shape[3]))
    for b, i, n in np.ndindex(B, T, N):
        k = n // (N // K)
        mine, theirs = queries[b, i, n], keys[b, :, k]
        chosen = {j for j in range(S) if abs(i - j) < METHOD.window}
        for r in range(METHOD.rounds):
            bucket = [j for j in range(lengths[b]) if theirs[j, r] == mine[r] and segments[b, j] == segments[b, i]]
            chosen |= set([j for j in bucket if j <= i][-METHOD.bucket :])
            chosen |= set() if causal else set([j for j in bucket if j > i][: METHOD.bucket])
        kept = [j for j in chosen if visible[b, n, i, j]]
        if kept:
            logits = case.query[b, i, n] @ case.key[b, kept, k].T / np.sqrt(case.query.shape[3])
            weights = np.exp(logits - logits.max())
            output[b, i, n] = weights @ case.value[b, kept, k] / weights.sum()
    return output


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_row_reads_what_its_buckets_hold_once(options):
    """Against sets, key by key. 1e-5 is a hundred roundoffs of a value; a key counted twice is of order one."""
    case = draw(1)
    params = METHOD.init(jax.random.key(1), num_heads=4, head_dim=8)
    attended = jax.jit(functools.partial(dot_product_attention, method=METHOD), static_argnames="is_causal")
    output = attended(*case.astype(jnp.float32), params=params, **options)
    assert np.all(np.abs(np.asarray(output) - by_definition(case, params, options)) <= 1e-5)


def test_fields_and_params():
    for fields in ({"rounds": 0}, {"bits": -1}, {"bits": 31}, {"bucket": 0}, {"window": 0}, {"query_chunk": 0}):
        with pytest.raises(ValueError, match=f"Hashed.{next(iter(fields))} is"):
            Hashed(**fields)
    case = draw(2).astype(jnp.float32)
    with pytest.raises(ValueError, match="draws constants"):
        dot_product_attention(*case, method=METHOD)
    with pytest.raises(ValueError, match="directions have shape"):
        dot_product_attention(*case, method=METHOD, params=Hashed().init(jax.random.key(0), num_heads=4, head_dim=8))
