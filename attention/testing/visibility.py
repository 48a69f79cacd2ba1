"""Laws of who sees whom: causality bit for bit, slots that do not exist, rows that see nothing, segments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.cache import KeyValueCache
from attention.method import Method
from attention.testing.cases import LONG, ROOM, SAME, Case, attended, draw, extend, masks, run, run_with_gradients
from attention.testing.law import expect, expect_bitwise, expect_same, law

GARBAGE = (7.0, 1e300, np.inf, np.nan)


@law("causal", float64=True)
def the_future_does_not_exist(method: Method) -> None:
    now, seen = 6, {}
    case, other = draw(10), draw(11)
    cotangent = np.random.default_rng(12).standard_normal(case.query.shape)
    cotangent[:, now:] = 0  # a loss of the prefix
    later = np.arange(13)[:, None, None] >= now
    changed = {f"x {factor}": Case(*(np.where(later, factor * x, x) for x in case)) for factor in (1, 2, 40, 1e4)}
    changed["other"] = Case(*(np.where(later, b, a) for a, b in zip(case, other, strict=True)))
    for name, future in changed.items():
        output, grads = run_with_gradients(method, future, cotangent, is_causal=True)
        with jax.enable_x64(False):
            single, _ = run(method, future.astype(jnp.float32), "both", is_causal=True)
        seen[name] = [np.asarray(x)[:, :now] for x in (output, *grads, single)]
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


def _ways(method: Method) -> tuple[bool, ...]:
    """What `is_causal` can be."""
    return (False, True) if method.capabilities.causal else (False,)


def _garbage_changes_nothing(method: Method, case: Case, unused, what: str, **options) -> None:
    """`unused`: for query, key and value, which of `B T` no one sees."""
    cotangent = np.random.default_rng(15).standard_normal((*case.query.shape[:3], case.value.shape[3]))
    results = []
    for garbage in (0.0, *GARBAGE):
        filled = Case(*(np.where(u[:, :, None, None], garbage, x) for x, u in zip(case, unused, strict=True)))
        output, grads = run_with_gradients(method, filled, cotangent, **options)
        results.append((output, *grads))
        expect_bitwise(results[-1], results[0], f"{what} filled with {garbage} changed an output or a gradient")
    expect(all(np.isfinite(x).all() for x in results[0]), f"beside {what} an output or a gradient is not finite")
    for grad, u in zip(results[0][1:], unused, strict=True):
        expect(not np.any(np.asarray(grad)[u]), f"{what} has a gradient")
    expect(not np.any(np.asarray(results[0][0])[unused[0]]), f"a query in {what} has an output")


@law("lengths", float64=True)
def padding_does_not_exist(method: Method) -> None:
    case, lengths = draw(14, T=LONG), ((9, LONG), (7, LONG))
    queries, keys = (np.arange(LONG)[None] >= np.array(n)[:, None] for n in lengths)
    options = masks(method, query_lengths=lengths[0], key_lengths=lengths[1])
    _garbage_changes_nothing(method, case, (queries, keys, keys), "padding", **options)
    if method.capabilities.causal:
        options = masks(method, causal=True, key_lengths=lengths[1])
        _garbage_changes_nothing(method, case, (keys & False, keys, keys), "causal padding", **options)


@law("lengths", float64=True)
def padding_equals_truncation(method: Method) -> None:
    case = draw(15, T=LONG)
    cut = Case(*(x[:, :13] for x in case))
    for causal in _ways(method):
        # Queries of the padding are told apart where a later one could matter: a method may pool queries.
        lengths = {"key_lengths": (13, 13)} | ({} if causal else {"query_lengths": (13, 13)})
        padded = attended(method, case, **masks(method, causal=causal, **lengths))
        short = _alone(method, cut, causal)
        expect_same(np.asarray(padded)[:, :13], short, SAME, "a padded sequence differs from a short one")


def _alone(method: Method, case: Case, causal: bool):
    """The output where nothing but the future is hidden."""
    return attended(method, case, is_causal=True) if causal else run(method, case)


@law("segments", float64=True)
def other_segments_room_does_not_exist(method: Method) -> None:
    ids = np.array([[0] * 4 + [1] * 5 + [2] * (LONG - 9), [3] * LONG])
    theirs = np.where(ids == 2, -1, ids)  # keys of no query's segment; and queries without a key
    unused = (ids == 2, theirs == -1, theirs == -1)
    for causal in _ways(method):
        options = masks(method, causal=causal, query_segments=ids, key_segments=theirs)
        _garbage_changes_nothing(method, draw(16, T=LONG), unused, "an unread segment", **options)


@law("dense_mask", float64=True)
def hidden_keys_do_not_exist(method: Method) -> None:
    mask = np.ones((2, 1, LONG, LONG), bool)
    mask[0, :, :, 4] = mask[1, :, 6, :] = False
    keys, queries = np.zeros((2, 2, LONG), bool)
    keys[0, 4] = queries[1, 6] = True
    unused = (queries, keys, keys)
    options = masks(method, mask=mask)
    _garbage_changes_nothing(method, draw(17, T=LONG), unused, "a hidden key or an idle query", **options)


@law("lengths", float64=True)
def rows_that_see_nothing_are_zero(method: Method) -> None:
    case, every = draw(18, T=LONG), np.ones((2, LONG), bool)
    first = np.array([[True], [False]]) & every
    for causal in _ways(method):
        options = masks(method, causal=causal, key_lengths=(0, LONG))
        _garbage_changes_nothing(method, case, (first, first, first), "a sequence without keys", **options)
    late = np.arange(LONG) >= np.array([[5], [LONG]])
    options = masks(method, query_lengths=(5, LONG))
    _garbage_changes_nothing(method, case, (late, ~every, ~every), "queries beyond their length", **options)


@law("decoding", float64=True)
def unused_cache_does_not_exist(method: Method) -> None:
    case, outputs = draw(19), []
    for garbage in (0.0, *GARBAGE):
        state = method.init_state(2, 2, 8, ROOM, jnp.float64, num_heads=4)
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
    case, other, few = draw(20), draw(20, T=LONG), LONG - 13
    # 13 tokens behind a short segment in the first sequence, before one in the second.
    places = np.arange(LONG) >= few, np.arange(LONG) < 13
    packed = Case(*(x.copy() for x in other))
    for b, place in enumerate(places):
        for x, tokens in zip(packed, case, strict=True):
            x[b, place] = tokens[b]
    for causal in _ways(method):
        outputs = attended(method, packed, **masks(method, causal=causal, query_segments=np.where(places, 9, 4)))
        mine = np.stack([np.asarray(outputs)[b, place] for b, place in enumerate(places)])
        alone = _alone(method, case, causal)
        expect_same(mine, alone, SAME, "a packed segment differs from it alone")
