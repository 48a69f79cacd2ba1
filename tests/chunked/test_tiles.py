"""Tiles cover an axis once; a span holds every key tile that anything sees, and calls full only what is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.chunked.sizes import AREA, BANDED_AREA, chosen, even
from attention.chunked.spans import span
from attention.masks import Mask
from attention.tiles import Tiles

AXES = [(1, 1), (7, 1), (7, 7), (7, 3), (12, 4), (13, 8)]


@pytest.mark.parametrize(("length", "size"), AXES)
def test_split_and_join_are_inverse(length, size):
    tiles = Tiles(length, size)
    x = jnp.arange(2 * length * 3.0).reshape(2, length, 3)
    split = tiles.split(x, 1)
    assert split.shape == (tiles.count, 2, size, 3)
    np.testing.assert_array_equal(split[-1], x[:, tiles.start(tiles.count - 1) :])
    np.testing.assert_array_equal(tiles.join(split, 1), x)


@pytest.mark.parametrize(("length", "size"), AXES)
def test_every_index_is_owned_once(length, size):
    tiles, owners = Tiles(length, size), np.zeros(length)
    for i in range(tiles.count):
        owners[tiles.start(i) : tiles.start(i) + size] += np.asarray(tiles.owned(i))
    np.testing.assert_array_equal(owners, 1)


@given(
    st.sampled_from([1, 7, 13]),  # a pool of shapes, since every new one is compiled
    st.sampled_from([1, 11, 16]),
    st.sampled_from([1, 4, 20]),
    st.sampled_from([1, 3, 20]),
    st.booleans(),
    st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.none() | st.integers(-9, 9),
    st.none() | st.integers(0, 20),
    st.none() | st.integers(0, 20),
)
def test_span_is_what_the_mask_says(T, S, R, C, causal, window, offset, query_length, key_length):
    def one(number, limit):
        return None if number is None else jnp.array([min(number, limit)])

    mask = Mask(
        num_queries=T,
        num_keys=S,
        causal=causal,
        window=window,
        offset=one(offset, 9),
        query_lengths=one(query_length, T),
        key_lengths=one(key_length, S),
    )
    queries, keys = Tiles(T, min(R, T)), Tiles(S, min(C, S))
    spans = jax.vmap(lambda i: jnp.stack([jnp.asarray(x) for x in span(mask, i, queries, keys)]))
    spans = np.asarray(spans(jnp.arange(queries.count)))
    whole = np.broadcast_to(np.asarray(mask.whole())[0, 0, 0], (T, S))
    for i in range(queries.count):
        rows = whole[queries.start(i) : queries.start(i) + queries.size]
        seen = [bool(rows[:, j * keys.size : (j + 1) * keys.size].any()) for j in range(keys.count)]
        first, opened, shut, end = spans[i]
        wanted = np.flatnonzero(seen)
        if wanted.size:
            assert (first, end) == (wanted[0], wanted[-1] + 1)
        else:
            assert first >= end
        for j in range(opened, shut):
            assert rows[:, keys.start(j) : keys.start(j) + keys.size].all()
            assert keys.start(j) == j * keys.size
        if opened < shut:
            assert first <= opened
            assert shut <= end


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_even_tiles_are_as_many_as_asked_for(length, size):
    tiles = Tiles(length, even(length, size))
    assert tiles.count <= -(-length // size)
    # Rounding up to vectors of 16 adds at most 15 indices a tile.
    assert tiles.overlap <= 16 * tiles.count
    assert tiles.size < size + 16


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    ("B", "K", "G", "T", "S"),
    [(1, 8, 1, 1, 1), (1, 8, 1, 1, 32768), (2, 8, 1, 4096, 4096), (1, 3, 8, 4096, 4099), (6, 5, 600, 4099, 31)],
)
def test_default_tiles_hold_a_bounded_number_of_logits(B, K, G, T, S, skips):
    batch, heads, queries, keys = chosen(B, K, G, T, S, skips=skips)
    assert B % batch.size == 0
    assert K % heads.size == 0
    assert batch.size == 1 or heads.size == K
    area = BANDED_AREA if skips else AREA
    # Once more for rounding sizes up to vectors of 16, and G where not even one row of each head is less.
    assert batch.size * heads.size * G * queries.size * keys.size <= 2 * area * max(1, G // 512 + 1)
    _, _, queries, keys = chosen(B, K, G, T, S, skips=skips, query_chunk=3, key_chunk=5)
    assert (queries, keys) == (Tiles(T, min(T, 3)), Tiles(S, min(S, 5)))
