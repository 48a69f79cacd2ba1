"""What the benchmark of sparse attention races: its methods against `Chunked`, and a threshold against a sort."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import attention
from attention.cache import KeyValueCache
from attention.method import Method
from attention.sparse.threshold import kth_largest
from experiments.certified import FAMILIES
from experiments.contestants import Cell, Contestant, ours

BASELINE = "baseline"
ROWS, TILE = 2048, 128  # of the selection: 8 heads of 256 queries, as many at once as `TopK` has them
SHARE = 8  # of the pages, one in so many is chosen


class Selection(NamedTuple):
    """The k largest entries of rows of `length` numbers."""

    length: int
    k: int

    @property
    def label(self) -> str:
        return f"selection, k = {self.k}; baseline lax.top_k"

    @property
    def operations(self) -> float:
        return float(ROWS * self.length)  # one comparison an entry, which no selection can do without


class Pair(NamedTuple):
    """Attention over whole sequences, as `experiments.contestants.Cell` has it."""

    length: int
    causal: bool
    heads: int
    head_size: int

    @property
    def problem(self) -> Cell:
        return Cell(self.length, False, self.causal, self.heads, self.head_size)

    @property
    def label(self) -> str:
        return f"{self.problem.label}; baseline Chunked"

    @property
    def operations(self) -> float:
        return self.problem.operations


class Step(NamedTuple):
    """A step of decoding after `length` tokens, which are in the cache: of one of `experiments.certified.FAMILIES`."""

    length: int
    heads: int
    head_size: int
    family: str
    share: int = 16

    @property
    def label(self) -> str:
        return f"a step of decoding, {self.family}; baseline Chunked"

    @property
    def operations(self) -> float:
        return 4.0 * self.heads * self.length * self.head_size


def contestants(cell: Selection | Pair | Step) -> dict[str, Contestant]:
    """Everything that is raced in a cell."""
    if isinstance(cell, Selection):
        return _selections(cell)
    return _attentions(cell) if isinstance(cell, Pair) else _steps(cell)


def _selections(cell: Selection) -> dict[str, Contestant]:
    rows = jax.random.normal(jax.random.key(0), (ROWS // TILE, TILE, cell.length))
    by_sort = jax.jit(lambda x: lax.top_k(x, cell.k)[0][..., -1:])
    by_count = jax.jit(lambda x: lax.map(lambda tile: kth_largest(tile, cell.k), x))
    calls = {BASELINE: by_sort, "kth_largest": by_count}
    return {name: Contestant(lambda f=f: f(rows).block_until_ready()) for name, f in calls.items()}


def _attentions(cell: Pair) -> dict[str, Contestant]:
    pages = cell.length // attention.BlockTopK().block_size
    methods: dict[str, Method] = {BASELINE: attention.Chunked()}
    methods["BlockTopK, 1/8 of all pages"] = attention.BlockTopK(blocks=pages // SHARE, query_block=256)
    methods["SlidingWindow"] = attention.SlidingWindow()
    methods["LocalChunked"] = attention.LocalChunked()
    if cell.causal:  # a query sees half of the pages on average
        methods["BlockTopK, 1/8 of those seen"] = attention.BlockTopK(blocks=pages // SHARE // 2, query_block=256)
    return {name: ours(cell.problem, method) for name, method in methods.items()}


def _steps(cell: Step) -> dict[str, Contestant]:
    C = attention.BlockTopK().block_size
    sparse = attention.BlockTopK(blocks=cell.length // C // cell.share, query_block=1)
    draw = FAMILIES[cell.family](np.random.default_rng(cell.length), cell.length, cell.heads, cell.head_size, True)
    operands = tuple(jnp.asarray(x) for x in draw)
    names = {
        BASELINE: attention.Chunked(),
        f"BlockTopK, 1/{cell.share} of the pages": sparse,
        "Certified": attention.Certified(),
    }
    found = {name: _step(operands, method) for name, method in names.items()}
    return found | {"Certified, without a state": _whole(operands, attention.Certified())}


def _step(operands: tuple[jax.Array, ...], method: Method) -> Contestant:
    """`extend` by the last token again, over and over from the same length, in a state that is updated in place."""
    (_, length, heads, size), token = operands[0].shape, [x[:, -1:] for x in operands]
    state = method.init_state(1, heads, size, length + 64, jnp.float32)
    key, value = operands[1:]
    if isinstance(state, KeyValueCache):
        state = jax.jit(KeyValueCache.append)(state, key, value)
    else:
        more = {"bound": method.bound} if isinstance(method, attention.Certified) else {}
        append = jax.jit(functools.partial(type(state).append, **more))
        state = append(state, *(jnp.swapaxes(x, 1, 2) for x in (key, value)))

    def step(state, query, key, value):
        longer, output = method.extend(state, query, key, value)
        return dataclasses.replace(longer, length=state.length), output

    program, held = jax.jit(step, donate_argnums=0), [state]

    def call():
        held[0], output = program(held[0], *token)
        return output.block_until_ready()

    return Contestant(call)


def _whole(operands: tuple[jax.Array, ...], method: Method) -> Contestant:
    """The last query over all keys, of which nothing is known beforehand."""
    options = {"method": method, "is_causal": True, "causal_alignment": "bottom_right"}
    program = jax.jit(functools.partial(attention.dot_product_attention, **options))
    query, key, value = operands
    return Contestant(lambda: program(query[:, -1:], key, value).block_until_ready())
