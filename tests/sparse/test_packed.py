"""Where sequences are packed, pages and tiles are those of each segment: whatever lies beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import BlockTopK, certified_attention, dot_product_attention
from attention.masks import Mask
from attention.sparse.pages import paged
from attention.sparse.segments import growing_boxes, sort
from attention.testing.cases import Case, draw, families
from attention.testing.oracle import oracle

T, METHOD = 40, BlockTopK(blocks=1, block_size=3, query_block=4, sinks=1)
IDS = {
    "runs": np.repeat([3, 1, 7, 2], [6, 19, 1, 14]),
    "in turns": np.arange(T) % 3,
    "one a token": np.arange(T)[::-1].copy(),
}


@jax.jit
def reads(case, ids):
    """Which keys each query reads of one head: values are unit vectors, so that weights are the output."""
    case = case._replace(value=jnp.broadcast_to(jnp.eye(T)[None, :, None], (1, T, 1, T)))
    return dot_product_attention(*case, method=METHOD, is_causal=True, query_segment_ids=ids)[0, :, 0] > 0


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_a_segment_reads_what_it_reads_alone(ids):
    """Its tokens, in any runs, moved to the front of a sequence whose others are a segment of their own."""
    case = draw(0, B=1, T=T, N=1, K=1).astype("float32")
    found = np.asarray(reads(case, ids[None]))
    assert not np.any(found & (ids[:, None] != ids[None]))
    assert found.sum(1).max() <= 3 + 3 + 3 + 4  # its page, that of the sink, and those around its tile
    for one in np.unique(ids):
        mine = np.flatnonzero(ids == one)
        order = np.concatenate([mine, np.flatnonzero(ids != one)])
        alone = np.asarray(reads(Case(*(x[:, order] for x in case)), (np.arange(T)[None] >= len(mine)).astype(int)))
        np.testing.assert_array_equal(found[np.ix_(mine, mine)], alone[: len(mine), : len(mine)])


def test_certificates_hold_in_segments():
    """16 problems of 40 tokens; causal and not, each in its own segments."""
    certify = jax.jit(certified_attention, static_argnames=("method", "is_causal"))
    case, ids = families(3, B=16, T=T).astype("float32"), np.stack(list(IDS.values()) * 6)[:16]
    for causal in (False, True):
        output, certificate = certify(*case, method=METHOD, is_causal=causal, query_segment_ids=ids)
        expected, _ = oracle(*case, is_causal=causal, query_segment_ids=ids)
        error = np.linalg.norm(np.asarray(output, np.float64) - expected, axis=-1)
        assert np.all(error <= np.asarray(certificate.error_bound))
        assert 0 < certificate.work < 1
        assert np.mean(error > 1e-3) > 0.05  # pages are left out


def test_growing_boxes_end_as_those_of_the_pages():
    key = jnp.asarray(draw(1, B=1, T=T, K=1).key[0, :, 0], jnp.float32)
    mask = Mask(num_queries=T, num_keys=T, **dict.fromkeys(("query_segments", "key_segments"), jnp.zeros((1, T), int)))
    boxes = np.asarray(growing_boxes(key, sort(mask, 4).start, 3))
    expected = np.asarray(paged(key[None, None], key[None, None], 3, None).box[0, 0])
    np.testing.assert_array_equal(boxes[np.append(np.arange(2, T, 3), T - 1)], expected)
