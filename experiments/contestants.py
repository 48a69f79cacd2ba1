"""What the benchmarks of exact attention race: ours, jax's own, the vendors', and PyTorch's where it is installed."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention.fused.kernels import KERNELS
from experiments.timing import temporaries

MATRIX_SIZE = 2048


class Cell(NamedTuple):
    """One problem: attention of one batch element, to itself unless it has another number of queries."""

    length: int
    gradient: bool
    causal: bool
    heads: int
    head_size: int
    dtype: str = "float32"
    queries: int | None = None

    @property
    def label(self) -> str:
        if self.queries is not None:
            return f"{self.queries} query, {self.dtype}"
        direction = "forward and backward" if self.gradient else "forward"
        kind = f"{direction}, causal" if self.causal else direction
        return kind if self.dtype == "float32" else f"{kind}, {self.dtype}, H = {self.head_size}"

    @property
    def operations(self) -> float:
        """Floating-point operations that the definition needs: 2 products forward, 5 more backward."""
        pairs = self.length * (self.length + 1) / 2 if self.causal else self.length * (self.queries or self.length)
        return 4.0 * self.heads * pairs * self.head_size * (3.5 if self.gradient else 1.0)

    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Query, key, value and the cotangent of the output, in float32: `B T N H` and `B S N H`."""
        rng = np.random.default_rng(self.length)
        shapes = [(1, n or self.length, self.heads, self.head_size) for n in (self.queries, None, None, self.queries)]
        query, key, value, cotangent = (rng.standard_normal(shape, np.float32) for shape in shapes)
        return query, key, value, cotangent


class Contestant(NamedTuple):
    """A call that returns when its result is there, and the bytes of temporaries that it is known to need."""

    call: Callable[[], Any]
    temporaries: int | None = None


def loss_of(cell: Cell, attend: Callable[..., jax.Array], cotangent: Any = 1.0) -> Callable[..., Any]:
    """What a cell computes: the output of attention, or the gradients of its product with a cotangent."""

    def loss(query, key, value):
        return (attend(query, key, value) * cotangent).sum()

    return jax.grad(loss, (0, 1, 2)) if cell.gradient else attend


def in_jax(cell: Cell, attend: Callable[..., jax.Array]) -> Contestant:
    """An attention function of jax arrays `B T N H`."""
    *operands, cotangent = (jnp.asarray(x, cell.dtype) for x in cell.operands())
    function = jax.jit(loss_of(cell, attend, cotangent))
    return Contestant(lambda: jax.block_until_ready(function(*operands)), temporaries(function, *operands))


def ours(cell: Cell, method: attention.Method) -> Contestant:
    return in_jax(cell, functools.partial(attention.dot_product_attention, method=method, is_causal=cell.causal))


def jax_nn(cell: Cell) -> Contestant:
    return in_jax(cell, functools.partial(jax.nn.dot_product_attention, is_causal=cell.causal))


def pytorch(cell: Cell, *, heads_first: bool = True) -> Contestant | None:
    """PyTorch's scaled_dot_product_attention on the CPU, or None where it is not installed.

    Its operands lie in memory as its kernel reads them, heads first, or else as ours do.
    """
    try:
        import torch  # ty: ignore[import-not-found] (a peer to race, never needed)
    except ImportError:
        return None
    dtype = getattr(torch, cell.dtype)
    *operands, cotangent = (torch.tensor(x, dtype=dtype).transpose(1, 2) for x in cell.operands())
    operands = [(x.contiguous() if heads_first else x).requires_grad_(cell.gradient) for x in operands]

    def call():
        output = torch.nn.functional.scaled_dot_product_attention(*operands, is_causal=cell.causal)
        return torch.autograd.grad((output * cotangent).sum(), operands) if cell.gradient else output

    return Contestant(call)


def matrix_product(dtype: str = "float32") -> Contestant:
    """A product of two square matrices, whose rate is what the machine can give."""
    size = matrix_size()
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return Contestant(lambda: product(matrix, matrix).block_until_ready())


def matrix_size() -> int:
    """The size of a matrix whose product fills the machine."""
    return MATRIX_SIZE if jax.default_backend() == "cpu" else 4 * MATRIX_SIZE


def peers(cell: Cell) -> dict[str, Contestant]:
    """Everything that ours is measured against."""
    found: dict[str, Contestant | None] = {"jax.nn": jax_nn(cell)}
    if jax.default_backend() == "cpu":
        found["PyTorch"] = pytorch(cell)
        if cell.queries is not None:
            found["PyTorch, our layout"] = pytorch(cell, heads_first=False)
    if cell.queries is None:
        found["matrix product"] = matrix_product(cell.dtype)
    return {name: contestant for name, contestant in found.items() if contestant is not None and fits(contestant)}


def fits(contestant: Contestant) -> bool:
    """Whether the temporaries take no more than half of the machine's memory, where it says how much there is."""
    stats = jax.devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return (contestant.temporaries or 0) <= room / 2


def kernels(cell: Cell) -> dict[str, Contestant]:
    """Every kernel of `attention.Fused` that takes this problem here, tiles, and what the machine can give."""
    found = {"Chunked": ours(cell, attention.Chunked())}
    for kernel in KERNELS:
        try:
            found[kernel.name] = ours(cell, attention.Fused(implementation=kernel.name))
        except (attention.UnsupportedError, ImportError):
            continue
    return found | {"matrix product": matrix_product(cell.dtype)}
