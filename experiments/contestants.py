"""What the benchmark of exact attention races: ours, jax's own, and PyTorch's where it is installed."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import attention
from experiments.timing import temporaries

MATRIX_SIZE = 2048


class Cell(NamedTuple):
    """One problem: self-attention of one batch element in float32."""

    length: int
    gradient: bool
    causal: bool
    heads: int
    head_size: int

    @property
    def label(self) -> str:
        direction = "forward and backward" if self.gradient else "forward"
        return f"{direction}, causal" if self.causal else direction

    @property
    def operations(self) -> float:
        """Floating-point operations that the definition needs: 2 products forward, 5 more backward."""
        pairs = self.length * (self.length + 1) / 2 if self.causal else self.length**2
        return 4.0 * self.heads * pairs * self.head_size * (3.5 if self.gradient else 1.0)

    def operands(self) -> list[np.ndarray]:
        rng = np.random.default_rng(self.length)
        shape = (4, 1, self.length, self.heads, self.head_size)
        return list(rng.standard_normal(shape, np.float32))


class Contestant(NamedTuple):
    """A call that returns when its result is there, and the bytes of temporaries that it is known to need."""

    call: Callable[[], Any]
    temporaries: int | None = None


def in_jax(cell: Cell, attend: Callable[..., jax.Array]) -> Contestant:
    """An attention function of jax arrays `B T N H`."""
    *operands, cotangent = (jnp.asarray(x) for x in cell.operands())

    def loss(query, key, value):
        return (attend(query, key, value) * cotangent).sum()

    function = jax.jit(jax.grad(loss, (0, 1, 2)) if cell.gradient else attend)
    return Contestant(lambda: jax.block_until_ready(function(*operands)), temporaries(function, *operands))


def chunked(cell: Cell, query_chunk: int | None = None, key_chunk: int | None = None) -> Contestant:
    method = attention.Chunked(query_chunk=query_chunk, key_chunk=key_chunk)
    return in_jax(cell, functools.partial(attention.dot_product_attention, method=method, is_causal=cell.causal))


def jax_nn(cell: Cell) -> Contestant:
    return in_jax(cell, functools.partial(jax.nn.dot_product_attention, is_causal=cell.causal))


def pytorch(cell: Cell) -> Contestant | None:
    """PyTorch's scaled_dot_product_attention on the CPU, or None where it is not installed."""
    try:
        import torch  # ty: ignore[import-not-found] (a peer to race, never needed)
    except ImportError:
        return None
    *operands, cotangent = (torch.tensor(x).transpose(1, 2).contiguous() for x in cell.operands())
    operands = [x.requires_grad_(cell.gradient) for x in operands]

    def call():
        output = torch.nn.functional.scaled_dot_product_attention(*operands, is_causal=cell.causal)
        return torch.autograd.grad((output * cotangent).sum(), operands) if cell.gradient else output

    return Contestant(call)


def matrix_product() -> Contestant:
    """A product of two square matrices in float32, whose rate is what the machine can give."""
    matrix = jax.random.normal(jax.random.key(0), (MATRIX_SIZE, MATRIX_SIZE))
    product = jax.jit(jnp.matmul)
    return Contestant(lambda: product(matrix, matrix).block_until_ready())


def peers(cell: Cell) -> dict[str, Contestant]:
    """Everything that ours is measured against."""
    every: Iterable[tuple[str, Contestant | None]] = (
        ("jax.nn", jax_nn(cell)),
        ("PyTorch", pytorch(cell) if jax.default_backend() == "cpu" else None),
        ("matrix product", matrix_product()),
    )
    return {name: contestant for name, contestant in every if contestant is not None}
