"""Boxes around pages bound every logit, and the state of decoding keeps them whatever lies beyond its length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import BlockTopK, LocalChunked, SlidingWindow, dot_product_attention
from attention.sparse.pages import PagedCache, paged, sound_box_bound
from attention.testing.cases import draw, families

C = 3
bounds = jax.jit(lambda q, k, v: sound_box_bound(q, paged(k, v, C, None).box[0, 0]))
append = jax.jit(PagedCache.append)


def test_a_box_bounds_every_logit_of_its_page():
    """Against float64: outward rounding leaves no logit of the operands as given above the bound."""
    for seed in range(24):
        case = families(seed, B=8, T=13).astype(jnp.float32)
        scale = np.float32(10.0 ** np.random.default_rng(seed).uniform(-3, 3))
        query, key = jnp.asarray(case.query[:, :, 0] * scale), case.key[:, :, 0]
        for b in range(8):
            found = np.asarray(bounds(query[b][None], key[b][None, None], key[b][None, None]), np.float64)[0]
            exact = np.asarray(query[b], np.float64) @ np.asarray(key[b], np.float64).T
            for page in range(-(-13 // C)):
                assert np.all(exact[:, page * C : (page + 1) * C] <= found[:, page, None])


@pytest.mark.parametrize("garbage", [7.0, np.inf, np.nan])
def test_a_state_ignores_what_lies_beyond_its_length(garbage):
    method, case, outputs = BlockTopK.examples()[0], draw(0).astype(jnp.float32), []
    for fill in (0.0, garbage):
        state = method.init_state(2, 2, 8, 16, jnp.float32)
        room = jnp.full_like(state.key, fill)
        state = dataclasses.replace(state, key=room, value=room)
        for token in range(7):
            state, output = method.extend(state, *(x[:, token : token + 1] for x in case))
            outputs.append(np.asarray(output))
    np.testing.assert_array_equal(outputs[:7], outputs[7:])


def test_a_state_has_the_boxes_of_its_pages():
    key = jnp.asarray(np.moveaxis(draw(1).key, 2, 1), jnp.float32)
    state = PagedCache.empty(2, 2, 1, 8, 16, C, 1, jnp.float32)
    for start, end in ((0, 4), (4, 5), (5, 13)):
        state = append(state, key[:, :, start:end], key[:, :, start:end])
    np.testing.assert_array_equal(state.box[:, :, :5], paged(key, key, C, None).box)
    assert not np.any(state.box[:, :, 5:])


def test_a_scan_decodes_from_the_empty_state():
    """Of grouped heads, by tiles of 7 that choose for their tokens: the state has its shape from the start."""
    method, case = BlockTopK.examples()[0], draw(2).astype(jnp.float32)
    tokens = [jnp.moveaxis(x, 1, 0)[:, :, None] for x in case]
    state = method.init_state(2, 2, 8, 16, jnp.float32, num_heads=4)
    _, outputs = jax.jit(lambda state, x: jax.lax.scan(lambda s, t: method.extend(s, *t), state, x))(state, tokens)
    whole = dot_product_attention(*case, method=method, is_causal=True)
    # Both are sums of at most 13 products of order one, in two orders.
    np.testing.assert_allclose(jnp.moveaxis(outputs[:, :, 0], 0, 1), whole, atol=2.0**-19, rtol=0)


def test_a_full_state_says_so():
    state = PagedCache.empty(2, 2, 1, 8, 4, C, 1, jnp.float32)  # two pages, six tokens
    with pytest.raises(ValueError, match="cache holds 0 tokens of max_length 6: 7 more do not fit"):
        state.append(jnp.zeros((2, 2, 7, 8)), jnp.zeros((2, 2, 7, 8)))


def shown(method, T: int, causal: bool) -> np.ndarray:
    """Which keys each query reads: values are unit vectors, so that weights are the output."""
    value = np.eye(T)[None, :, None]
    query = key = np.zeros((1, T, 1, 4))
    output = dot_product_attention(*map(jnp.asarray, (query, key, value)), method=method, is_causal=causal)
    return np.asarray(output)[0, :, 0] > 0


@pytest.mark.parametrize("causal", [False, True])
def test_window_and_blocks_read_what_they_say(causal):
    T = 14
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    past = (j <= i) if causal else np.ones((T, T), bool)
    window = shown(SlidingWindow(window=3, sinks=2, query_chunk=5), T, causal)
    np.testing.assert_array_equal(window, past & ((abs(i - j) < 3) | (j < 2)))
    local = shown(LocalChunked(chunk=4), T, causal)
    np.testing.assert_array_equal(local, past & (j // 4 <= i // 4) & (j // 4 >= i // 4 - 1))


def test_sinks_and_blocks_count_from_the_segment():
    ids = np.repeat([[5, 2, 5]], [4, 6, 3], axis=1)
    start = np.repeat([0, 4, 10], [4, 6, 3])
    same, i, j = ids[0][:, None] == ids, np.arange(13)[:, None], np.arange(13)[None]
    value = np.broadcast_to(np.eye(13)[None, :, None], (1, 13, 1, 13))
    zeros = np.zeros((1, 13, 1, 4))
    for method, expected in (
        (SlidingWindow(window=2, sinks=1, query_chunk=5), (abs(i - j) < 2) | (j == start[:, None])),
        (LocalChunked(chunk=2, previous=0), (i - start[:, None]) // 2 == (j - start[:, None]) // 2),
    ):
        output = dot_product_attention(
            *map(jnp.asarray, (zeros, zeros, value)), method=method, query_segment_ids=ids, key_value_segment_ids=ids
        )
        np.testing.assert_array_equal(np.asarray(output)[0, :, 0] > 0, same & expected)


def test_a_tile_reads_the_page_that_holds_its_key():
    """One key points where all queries look; its page is the one that is chosen, wherever it lies."""
    rng = np.random.default_rng(2)
    for at in (0, 17, 31):
        query = np.ones((1, 32, 1, 4)) + 0.1 * rng.standard_normal((1, 32, 1, 4))
        key = rng.standard_normal((1, 32, 1, 4)) - 2
        key[0, at] = 9
        value = np.zeros((1, 32, 1, 1))
        value[0, at] = 1
        method = BlockTopK(blocks=1, block_size=4, query_block=8)
        output = dot_product_attention(*map(jnp.asarray, (query, key, value)), method=method)
        # Its logit is at least 9 above every other of the 4 in the page: scale 1/2, query near 4 ones, keys below 2.
        assert np.all(np.asarray(output) > 0.99)


def test_limits_and_fields():
    assert BlockTopK(block_size=8).exact_limit(20).blocks == 3
    for cls, fields in (
        (BlockTopK, {"blocks": 0}),
        (BlockTopK, {"window": -1}),
        (SlidingWindow, {"sinks": -1}),
        (LocalChunked, {"previous": -2}),
    ):
        with pytest.raises(ValueError, match=f"{cls.__name__}.{next(iter(fields))} is"):
            cls(**fields)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_choose_together_read_the_same_pages(causal):
    """A value says which page it is of, so that an output shows where its weights lie."""
    T, C = 64, 8
    query, key, _ = draw(31, B=2, T=T).astype(jnp.float32)
    value = np.broadcast_to(np.repeat(np.eye(T // C, dtype=np.float32), C, axis=0)[None, :, None], (2, T, 2, T // C))
    same = {}
    for shared in (True, False):
        method = BlockTopK(blocks=2, block_size=C, query_block=16, shared=shared)
        output = dot_product_attention(query, key, value, method=method, is_causal=causal)
        read = np.asarray(output).reshape(2, T, 2, 2, -1) > 0
        same[shared] = np.all(read[:, :, :, 0] == read[:, :, :, 1], axis=-1)
        assert read.sum(-1).max() == (4 if causal else 2)
    assert np.all(same[True])
    assert not np.all(same[False])
