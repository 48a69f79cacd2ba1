"""Laws of who sees whom: causality bit for bit, slots that do not exist, rows that see nothing, segments."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from attention.cache import KeyValueCache
from attention.method import Method
from attention.testing.cases import ROOM, SAME, Case, draw, extend, run, run_with_gradients
from attention.testing.law import expect, expect_bitwise, expect_same, law

GARBAGE = (7.0, 1e30, np.inf, np.nan)


@law("causal")
def the_future_does_not_exist(method: Method) -> None:
    now, seen = 6, {}
    case, other = draw(10), draw(11)
    cotangent = np.random.default_rng(12).standard_normal(case.query.shape)
    cotangent[:, now:] = 0  # a loss of the prefix
    later = np.arange(13)[:, None, None] >= now
    changed = {f"x {factor}": Case(*(np.where(later, factor * x, x) for x in case)) for factor in (1, 2, 40, 1e4)}
    changed["other"] = Case(*(np.where(later, b, a) for a, b in zip(case, other, strict=True)))
    for name, future in changed.items():
        output, grads = run_with_gradients(method, future.astype(jnp.float32), cotangent, is_causal=True)
        seen[name] = [np.asarray(x)[:, :now] for x in (output, *grads)]
        expect_bitwise(seen[name], seen["x 1"], f"the prefix or its gradients changed with future tokens ({name})")


@law("causal", "cross")
def the_future_does_not_exist_when_aligned_to_the_end(method: Method) -> None:
    case = draw(13, T=5, S=13)
    options: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right"}
    before = np.asarray(run(method, case.astype(jnp.float32), **options))
    for row in (0, 2):
        future = 13 - 5 + row + 1
        later = np.arange(13)[:, None, None] >= future
        changed = Case(case.query, *(np.where(later, 40 * x, x) for x in case[1:]))
        after = np.asarray(run(method, changed.astype(jnp.float32), **options))
        message = f"row {row} of 5 changed with keys after {future - 1} of 13"
        expect_bitwise(after[:, : row + 1], before[:, : row + 1], message)


def _garbage_changes_nothing(method: Method, case: Case, unused, what: str, **options) -> None:
    """`unused`: for query, key and value, which of `B T` no one sees."""
    cotangent = np.random.default_rng(15).standard_normal((*case.query.shape[:3], case.value.shape[3]))
    results = []
    for garbage in (0.0, *GARBAGE):
        filled = Case(*(np.where(u[:, :, None, None], garbage, x) for x, u in zip(case, unused, strict=True)))
        output, grads = run_with_gradients(method, filled.astype(jnp.float32), cotangent, **options)
        results.append((output, *grads))
        expect_bitwise(results[-1], results[0], f"{what} filled with {garbage} changed an output or a gradient")
    for grad, u in zip(results[0][1:], unused, strict=True):
        expect(not np.any(np.asarray(grad)[u]), f"{what} has a gradient")
    expect(not np.any(np.asarray(results[0][0])[unused[0]]), f"a query in {what} has an output")


@law("lengths")
def padding_does_not_exist(method: Method) -> None:
    case = draw(14)
    lengths = np.array([[9, 13], [7, 13]])
    queries, keys = (np.arange(13)[None] >= n[:, None] for n in lengths)
    options = {"query_seq_lengths": lengths[0], "key_value_seq_lengths": lengths[1]}
    _garbage_changes_nothing(method, case, (queries, keys, keys), "padding", **options)
    if method.capabilities.causal:
        _garbage_changes_nothing(method, case, (queries, keys, keys), "causal padding", is_causal=True, **options)


@law("lengths", float64=True)
def padding_equals_truncation(method: Method) -> None:
    case, lengths = draw(15), np.array([7, 7])
    cut = Case(*(x[:, :7] for x in case))
    for causal in (False, True) if method.capabilities.causal else (False,):
        padded, short = (
            run(method, case, key_value_seq_lengths=lengths, is_causal=causal),
            run(method, cut, is_causal=causal),
        )
        expect_same(np.asarray(padded)[:, :7], short, SAME, "a padded sequence differs from a short one")


@law("segments")
def other_segments_room_does_not_exist(method: Method) -> None:
    ids = np.array([[0] * 4 + [1] * 5 + [2] * 4, [3] * 13])
    theirs = np.where(ids == 2, -1, ids)  # keys of no query's segment; and queries without a key
    unused = (ids == 2, theirs == -1, theirs == -1)
    options = {"query_segment_ids": ids, "key_value_segment_ids": theirs}
    _garbage_changes_nothing(method, draw(16), unused, "an unread segment", **options)


@law("dense_mask")
def hidden_keys_do_not_exist(method: Method) -> None:
    mask = np.ones((2, 1, 13, 13), bool)
    mask[0, :, :, 4] = mask[1, :, 6, :] = False
    keys, queries = np.zeros((2, 2, 13), bool)
    keys[0, 4] = queries[1, 6] = True
    case = draw(17)
    _garbage_changes_nothing(method, case, (queries, keys, keys), "a hidden key or an idle query", mask=mask)


@law("lengths")
def rows_that_see_nothing_are_zero(method: Method) -> None:
    case, every = draw(18), np.ones((2, 13), bool)
    first = np.array([[True], [False]]) & every
    options = {"query_seq_lengths": np.array([13, 13]), "key_value_seq_lengths": np.array([0, 13])}
    _garbage_changes_nothing(method, case, (first, first, first), "a sequence without keys", **options)
    late = np.arange(13) >= np.array([[5], [13]])
    options = {"query_seq_lengths": np.array([5, 13]), "key_value_seq_lengths": np.array([13, 13])}
    _garbage_changes_nothing(method, case, (late, ~every, ~every), "queries beyond their length", **options)


@law("decoding", float64=True)
def unused_cache_does_not_exist(method: Method) -> None:
    case, outputs = draw(19), []
    for garbage in (0.0, *(1e300 if x == 1e30 else x for x in GARBAGE)):
        state = method.init_state(2, 2, 8, ROOM, jnp.float64)
        if not isinstance(state, KeyValueCache):
            return  # no room that waits for tokens
        room = np.full(state.key.shape, garbage)
        state = KeyValueCache(key=jnp.asarray(room), value=jnp.asarray(room), length=state.length)
        state, first = extend(method, state, Case(*(x[:, :6] for x in case)))
        _, second = extend(method, state, Case(*(x[:, 6:7] for x in case)))
        outputs.append((first, second))
        expect_bitwise(outputs[-1], outputs[0], f"unused cache filled with {garbage} changed an output")


@law("segments", float64=True)
def packed_segments_equal_segments_alone(method: Method) -> None:
    case = draw(20, B=1, T=14)
    ids = np.repeat([[4, 9]], 7, axis=1)
    parts = Case(*(x.reshape(2, 7, *x.shape[2:]) for x in case))
    for causal in (False, True) if method.capabilities.causal else (False,):
        packed = run(method, case, query_segment_ids=ids, key_value_segment_ids=ids, is_causal=causal)
        alone = run(method, parts, is_causal=causal)
        expect_same(np.asarray(packed).reshape(alone.shape), alone, SAME, "a packed segment differs from it alone")
