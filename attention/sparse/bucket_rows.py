"""What a row reads of its buckets, attention over it, and what it leaves out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attention.exact import softmax
from attention.inputs import Inputs
from attention.logits import soft_capped
from attention.masks import Mask
from attention.rounding import product
from attention.sparse.bounds import tail_share
from attention.sparse.buckets import Asked, Table, asked, found, latest, listed


class Rule(NamedTuple):
    """What a row reads; the fields are those of `attention.Hashed`."""

    rounds: int
    bucket: int
    window: int


class _Read(NamedTuple):
    """What each row reads: keys, and which of the slots hold one."""

    keys: Int[Array, "C n"]
    exists: Bool[Array, "C n"]


def _reach(rule: Rule, mask: Mask) -> tuple[int, int]:
    """How many keys of a bucket are read up to a row, and behind it."""
    most = min(rule.bucket, mask.num_keys)
    return most, 0 if mask.causal else most


def _asked(rule: Rule, part: Inputs, rows, codes, own: Table) -> Asked:
    mine = part.mask.query_segments
    return asked(own, codes, _positions(part.mask, rows), None if mine is None else mine[0][rows])


def attended(rule: Rule, part: Inputs, rows: Int[Array, " C"], codes: Int[Array, "C R"], own: Table):
    """Softmax of each row over its own keys."""
    read = _latest(rule, part, rows, codes, own) if not own.columns else _listed(rule, part, rows, codes, own)
    visible = jax.vmap(lambda i, at: part.mask.at(i[None], at)[0, 0, 0, 0])(rows, read.keys) & read.exists
    query = part.query[0, 0, 0][rows]
    key, value = (jnp.take(x[0, 0], read.keys, axis=0).astype(query.dtype) for x in (part.key, part.value))
    logits = soft_capped(product("ch,cnh->cn", query, key), part.soft_cap)
    weights = softmax(jnp.where(visible, logits, -jnp.inf))
    return product("cn,cne->ce", weights, value)


def _listed(rule: Rule, part: Inputs, rows, codes, own: Table) -> _Read:
    """The keys beside each row, then those that a round finds and that are not beside it."""
    mask, S = part.mask, part.mask.num_keys
    position = _positions(mask, rows)[:, None]
    beside = position + jnp.arange(1 - rule.window, 1 if mask.causal else rule.window)[None]
    keys, first = listed(own, _asked(rule, part, rows, codes, own), *_reach(rule, mask))
    exists = jnp.concatenate([(beside >= 0) & (beside < S), first & ~_beside(rule, position, keys)], axis=1)
    return _Read(jnp.concatenate([beside.clip(0, S - 1), keys], axis=1), exists)


def _latest(rule: Rule, part: Inputs, rows, codes, own: Table) -> _Read:
    """The same for one row behind all keys."""
    every, position = jnp.arange(part.mask.num_keys), _positions(part.mask, rows)
    chosen = latest(own.code, codes[0], every <= position[0], _reach(rule, part.mask)[0])
    chosen |= _beside(rule, position[0], every) & (every <= position[0])
    count = jnp.cumsum(chosen, dtype=jnp.int32)
    n = min(every.size, rule.window + rule.rounds * rule.bucket)
    exists = jnp.arange(n) < count[-1]
    keys = jnp.searchsorted(count, jnp.arange(1, n + 1)).astype(jnp.int32)  # where the count rises to 1, 2, ...
    return _Read(jnp.where(exists, keys, position[0])[None], exists[None])  # beyond it a cache may hold anything


def _beside(rule: Rule, position, keys):
    return jnp.abs(position - keys) < rule.window


def dropped(rule: Rule, part: Inputs, rows, codes, own: Table) -> tuple[Float[Array, " C"], Bool[Array, " C"]]:
    """The share of the keys that were not read, and whether any was, by the definition of A and all logits."""
    mask, every = part.mask, jnp.arange(part.mask.num_keys)
    query, key = part.query[0, 0, 0][rows], part.key[0, 0].astype(part.query.dtype)
    logits = soft_capped(product("ch,sh->cs", query, key), part.soft_cap)
    logits = jnp.where(mask.at(rows, every)[0, 0, 0], logits, -jnp.inf)
    kept = found(_asked(rule, part, rows, codes, own), own.code[None], own.place[None], *_reach(rule, mask)).any(-1)
    kept |= _beside(rule, _positions(mask, rows)[:, None], every[None])
    return tail_share(logits, ~kept), (kept & (logits > -jnp.inf)).any(-1)


def _positions(mask: Mask, rows: Int[Array, " C"]) -> Int[Array, " C"]:
    return rows if mask.offset is None else rows + mask.offset[0]
