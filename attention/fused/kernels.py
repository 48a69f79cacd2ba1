"""What each kernel takes, as data, and the choice among them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

from jaxtyping import Array

from attention.fused.calls import Call
from attention.fused.vendors import jax_nn, splash, tokamax
from attention.native import calls as native
from attention.native.build import KEYS

Name = Literal["native", "xla", "cudnn", "tpu:splash", "tokamax:mosaic", "tokamax:triton", "tokamax:xla_chunked"]
HALF = ("bfloat16", "float16")
UP_TO_32 = (*HALF, "float32")
WITHOUT_FLOAT16 = ("bfloat16", "float32")
PLAIN = frozenset({"causal", "window", "lengths"})
BESIDES = frozenset({"soft cap", "residual", "certificate"})  # what no table of hidden pairs can give
RANGES = PLAIN | {"segments", "offset"}  # what the first and the last key of each query, and segments, can say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel: of a vendor, or that in C.

    Attributes:
        name: what `Fused.implementation` calls it.
        run: calls it.
        backends, dtypes: where it runs, and on which operands.
        hides: what it hides without being given a table of T times S booleans.
        any_window: whether it takes every window so, and not only one that looks back among as many keys.
        tables: dtypes of operands for which it takes such a table, and a bias; none if empty.
        even_tables: whether a table needs an even T and S.
        generations: compute capabilities, from the first to below the second.
        head_multiple: of which the head size is a multiple.
        head_limits: the largest head size from a compute capability on.
        length_multiple: of which T and S are multiples.
        with_residual: calls it for the log normaliser too, which has a derivative then; None where it cannot.
        unread: whether slots that no query sees may hold anything, as it reads none unless there are segments.
        tile: keys, after each of which it rescales its sums; 0 where it does not.
        rounds_weights: whether it rounds them to the dtype of the operands before it sums the values.
        soft_cap: whether it takes one that is traced.
        certified: backends and dtypes for which `attention.fused.method` bounds its rounding.
        package: what has to be installed.
    """

    name: Name
    run: Callable[..., Array]
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    hides: frozenset[str] = PLAIN
    any_window: bool = False
    tables: tuple[str, ...] = ()
    even_tables: bool = False
    generations: tuple[float, float] = (0.0, math.inf)
    head_multiple: int = 1
    head_limits: tuple[tuple[float, int], ...] = ()
    length_multiple: int = 1
    with_residual: Callable[..., tuple[Array, Array]] | None = None
    unread: bool = False
    tile: int = 0
    rounds_weights: bool = False
    soft_cap: bool = False
    certified: tuple[tuple[str, str], ...] = ()
    package: str = ""

    def tabled(self, call: Call) -> bool:
        """Whether what the call hides has to be written out for this kernel, or it brings a bias."""
        asks = call.asks
        # One rule for windows, the narrowest that any kernel has: cuDNN's look back, and none may leave a row empty.
        window = "window" in asks and (
            "causal" not in asks or call.queries != call.keys or bool(asks & {"lengths", "segments"})
        )
        return (window and not self.any_window) or not asks <= self.hides | BESIDES

    def refusal(self, call: Call) -> str | None:
        """Why the kernel cannot do a call, or None."""
        limit = max((size for since, size in self.head_limits if since <= call.generation), default=call.head_size)
        tabled = self.tabled(call)
        first, end = self.generations
        what = " and ".join(sorted(call.asks - BESIDES))
        reasons = (
            (call.backend not in self.backends, f"it runs on {_listed(self.backends)}, not {call.backend}"),
            (self.package == "tokamax" and not call.tokamax, "it needs tokamax: pip install attention-lab[fused]"),
            (self.name == "native" and bool(call.native), f"it is not there: {call.native}"),
            (not first <= call.generation < end, f"it needs a compute capability from {first} to below {end}"),
            (call.dtype not in self.dtypes, f"it takes {_listed(self.dtypes)} operands, not {call.dtype}"),
            (
                bool(call.head_size % self.head_multiple),
                f"it takes head sizes that are multiples of {self.head_multiple}",
            ),
            (call.head_size > limit, f"it takes head sizes up to {limit}, not {call.head_size}"),
            (
                bool(call.queries % self.length_multiple or call.keys % self.length_multiple),
                f"it takes T and S that are multiples of {self.length_multiple}, not {call.queries} and {call.keys}",
            ),
            (
                "soft cap" in call.asks and not self.soft_cap,
                "its soft cap, if it has one, is compiled in and cannot be traced",
            ),
            (
                "residual" in call.asks and self.with_residual is None,
                "the log normaliser that it returns, if any, has no derivative",
            ),
            (
                "certificate" in call.asks and (call.backend, call.dtype) not in self.certified,
                f"no bound is known on its rounding with {call.dtype} operands on {call.backend}",
            ),
            (tabled and call.dtype not in self.tables, f"it does not take {what} with {call.dtype} operands"),
            (
                tabled and self.even_tables and bool(call.queries % 2 or call.keys % 2),
                f"it takes {what} for even T and S alone, not {call.queries} and {call.keys}",
            ),
        )
        return next((reason for holds, reason in reasons if holds), None)


# In the order in which "auto" tries them: on one backend the first that takes a call is chosen.
KERNELS = (
    Kernel(
        name="native",
        run=native.attend,
        backends=("cpu",),
        dtypes=UP_TO_32,
        hides=RANGES | {"mask"},
        any_window=True,
        with_residual=native.attend_with_residual,
        unread=True,
        tile=KEYS,
        soft_cap=True,
        certified=tuple(("cpu", dtype) for dtype in UP_TO_32),
    ),
    Kernel(
        name="cudnn",
        run=functools.partial(jax_nn, implementation="cudnn"),
        backends=("gpu",),
        dtypes=HALF,
        tables=("bfloat16",),  # a hidden key gets -32768 in float16, which logits of that size outweigh
        even_tables=True,  # its derivative wants them
        generations=(8.0, math.inf),
        head_multiple=8,
        head_limits=((8.0, 128), (9.0, 256)),
    ),
    Kernel(
        name="tokamax:mosaic",
        run=functools.partial(tokamax, implementation="mosaic"),
        backends=("gpu",),
        dtypes=HALF,
        tables=HALF,
        generations=(9.0, 11.0),
        length_multiple=128,  # keys are padded to a block, and what is padded is not hidden
        package="tokamax",
    ),
    Kernel(
        name="tokamax:triton",
        run=functools.partial(tokamax, implementation="triton"),
        backends=("gpu",),
        dtypes=UP_TO_32,
        tables=UP_TO_32,
        generations=(8.0, math.inf),
        package="tokamax",
    ),
    Kernel(
        name="tpu:splash",
        run=splash,
        backends=("tpu",),
        dtypes=("bfloat16", "float32"),
        hides=PLAIN | {"segments"},
        length_multiple=128,
    ),
    Kernel(
        name="tokamax:mosaic",
        run=functools.partial(tokamax, implementation="mosaic"),
        backends=("tpu",),
        dtypes=("bfloat16", "float32"),
        hides=frozenset({"causal"}),
        length_multiple=128,
        package="tokamax",
    ),
    Kernel(
        name="xla",
        run=functools.partial(jax_nn, implementation="xla"),
        backends=("gpu",),
        dtypes=UP_TO_32,
        tables=UP_TO_32,
        certified=(("gpu", "float32"),),
    ),
    Kernel(
        name="xla",
        run=functools.partial(jax_nn, implementation="xla"),
        backends=("cpu", "tpu"),
        dtypes=WITHOUT_FLOAT16,  # float16 asks for a product that XLA compiles for GPUs alone
        tables=WITHOUT_FLOAT16,
        rounds_weights=True,
        certified=(("cpu", "bfloat16"), ("cpu", "float32"), ("tpu", "float32")),
    ),
    Kernel(
        name="tokamax:xla_chunked",
        run=functools.partial(tokamax, implementation="xla_chunked"),
        backends=("gpu",),
        dtypes=UP_TO_32,
        tables=UP_TO_32,
        package="tokamax",
    ),
    Kernel(
        name="tokamax:xla_chunked",
        run=functools.partial(tokamax, implementation="xla_chunked"),
        backends=("cpu", "tpu"),
        dtypes=WITHOUT_FLOAT16,
        tables=WITHOUT_FLOAT16,
        package="tokamax",
    ),
)


def chosen(call: Call) -> Kernel | None:
    """The first kernel that takes a call; None where there is none."""
    return next((kernel for kernel in KERNELS if kernel.refusal(call) is None), None)


def able(call: Call) -> list[str]:
    """The names of the kernels that take a call."""
    return [kernel.name for kernel in KERNELS if kernel.refusal(call) is None]


def named(name: str, backend: str) -> Kernel:
    """The kernel of a name, that of the backend where several share it."""
    return max((kernel for kernel in KERNELS if kernel.name == name), key=lambda kernel: backend in kernel.backends)


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(names)
