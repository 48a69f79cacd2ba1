"""One name for the kernels that vendors write for softmax attention."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.cache import Cached
from attention.exact import Exact, exact_certificate
from attention.fused.calls import described
from attention.fused.kernels import Name, able, chosen, named
from attention.fused.vendors import as_given
from attention.inputs import Inputs
from attention.method import Certificate, Cost, Method, UnsupportedError
from attention.registry import unknown
from attention.rounding import max_over_visible, norms, sum_rounding

Implementation = Literal["auto", Name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused(Cached):
    """softmax(beta Q K^T + bias) V by one kernel: a vendor's, or that of this library for a CPU.

    "native" is the one in C of `attention.native`, which the machine's compiler makes when it is first asked
    for (or that of `pip install attention-lab[native]`). "xla" and "cudnn" are those of
    `jax.nn.dot_product_attention`, "tpu:splash" is the one that jax ships for TPUs, and the others are those of
    tokamax (`pip install attention-lab[fused]`). "auto" takes the first that can do what a call asks, in the order of
    `attention.fused.kernels.KERNELS`, and `Exact` where none can: for float64, or, but for "native", a soft cap or the
    log normaliser. `Fused().resolved(inputs)` is its choice; at H = 64 and T = S = 4,096, after a comma where tokamax
    is installed, and in brackets where there is no C compiler, it is this (plain and in a causal window as causal):

        backend  operands  causal or lengths    segments             mask                 bias
        cpu      float32   native (xla)         native (xla)         native (xla)         xla
        cpu      bfloat16  native (xla)         native (xla)         native (xla)         xla
        cpu      float16   native (Exact)       native (Exact)       native (Exact)       Exact
        gpu 8.0  float32   xla, tokamax:triton  xla, tokamax:triton  xla, tokamax:triton  xla, tokamax:triton
        gpu 8.0  bfloat16  cudnn                cudnn                cudnn                cudnn
        gpu 8.0  float16   cudnn                xla, tokamax:triton  xla, tokamax:triton  xla, tokamax:triton
        gpu 9.0  float32   xla, tokamax:triton  xla, tokamax:triton  xla, tokamax:triton  xla, tokamax:triton
        gpu 9.0  bfloat16  cudnn                cudnn                cudnn                cudnn
        gpu 9.0  float16   cudnn                xla, tokamax:mosaic  xla, tokamax:mosaic  xla, tokamax:mosaic
        tpu      float32   tpu:splash           tpu:splash           xla                  xla
        tpu      bfloat16  tpu:splash           tpu:splash           xla                  xla
        tpu      float16   Exact                Exact                Exact                Exact

    The order on a GPU and a TPU is not measured. A named kernel is never replaced: what it cannot do raises.

    Kernels other than "xla" have first derivatives in reverse mode alone, "native" those of the log normaliser and by
    the cap too; `Chunked` has all. Those of vendors round beta times the query to the dtype of the operands, as none
    takes a traced scale; "xla" does so with one scale a head. "native" reads 16-bit keys and values as float32, keeps
    query and weights in it, and rounds outputs and gradients once. In float32, "xla" asks for products in float32 where
    the backend has faster ones. A row that sees no key gives 0, with gradient 0, whatever the kernel makes of it. What
    a kernel has no name for, it gets as T S booleans; "native" reads those of a mask as they are given, unbroadcast.

    Attributes:
        implementation: "auto", or the name of a kernel.

    Cost: 2 T S (H + E) operations a head, half of it where causal, and operands read once; "xla" computes the
    masked half too, and keeps T S weights a head. The backward pass of "native" takes 5 T S (H + E) operations and
    up to 8 copies of the gradients of keys and values.
    Error bound: `attention.rounding.rounding_bound` for "native" and for "xla" in float32, for "xla" `weights_bound`
    more in bfloat16 on a CPU; no bound known for the others. "auto" certifies with a kernel that has a bound, or with
    `Exact`.

    Raises:
        ValueError: `implementation` is no such name.
        UnsupportedError: a named kernel cannot do what a call asks; the message says why, and which can.

    References:
        Dao et al., "FlashAttention", arXiv 2205.14135, section 3.1.
        Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.
    """

    implementation: Implementation = "auto"

    # In 16 bits weights are rounded before they meet the values: one more roundoff beside the output's two.
    capabilities = dataclasses.replace(Exact.capabilities, rounding=1.5)

    def __post_init__(self) -> None:
        if self.implementation not in get_args(Implementation):
            raise ValueError(unknown("implementation of Fused", self.implementation, get_args(Implementation)))

    def resolved(self, inputs: Inputs, *asks: str) -> Method:
        if self.implementation == "auto":
            kernel = chosen(described(inputs, *asks))
            return Exact() if kernel is None else Fused(implementation=kernel.name)
        call = described(inputs, *asks)
        reason = named(self.implementation, call.backend).refusal(call)
        if reason is not None:
            others = ", ".join(able(call)) or f"none, and {Exact()!r} does"
            raise UnsupportedError(f"{self!r} cannot do this: {reason}; implementations that can: {others}")
        return self

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        method = self.resolved(inputs)
        if method != self:
            return method.attend(inputs)
        call = described(inputs)
        kernel = named(self.implementation, call.backend)
        return kernel.run(inputs, tabled=kernel.tabled(call))

    def attend_with_residual(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
        method = self.resolved(inputs, "residual")
        if method != self:
            return method.attend_with_residual(inputs)
        with_residual = named(self.implementation, described(inputs).backend).with_residual
        assert with_residual is not None  # or `resolved` had refused
        return with_residual(inputs)

    def attend_cached(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        method = self.resolved(inputs)
        if not isinstance(method, Fused) or not named(method.implementation, described(inputs).backend).unread:
            return super().attend_cached(inputs)
        return method.attend(inputs)

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate | None]:
        if self.implementation == "auto":
            return self.resolved(inputs, "certificate").certify(inputs)
        call = described(inputs, "certificate")
        output = self.attend(inputs)
        kernel = named(self.implementation, call.backend)
        if (call.backend, call.dtype) not in kernel.certified:
            return output, None
        # As `Chunked`, but that the level of exponentials may lag behind the maximum: two rescalings more.
        tiles = -(-call.keys // kernel.tile) + 1 if kernel.tile else 0
        rescalings, depth = (tiles + 2, kernel.tile + tiles) if tiles else (0, None)
        certificate = exact_certificate(inputs, rescalings=rescalings, depth=depth)
        if kernel.rounds_weights:
            bound = certificate.error_bound + weights_bound(inputs)
            certificate = dataclasses.replace(certificate, error_bound=bound)
        return output, certificate

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        if self.implementation in ("auto", "xla"):  # "auto" at its most expensive
            return Exact().cost(T, S, num_heads=num_heads, head_dim=head_dim, is_causal=is_causal)
        pairs = T * (T + 1) / 2 if is_causal and T == S else T * S
        return Cost(4.0 * num_heads * pairs * head_dim, 4.0 * num_heads * (2 * T + 2 * S) * head_dim)


def weights_bound(inputs: Inputs) -> Float[Array, "B K G T"]:
    r"""What "xla" adds to `attention.rounding.rounding_bound` with operands of 16 bits, in the units of the values.

    It rounds the weights to 16 bits before it sums the values, and beta times the query too where beta is one
    number a head. With u their unit roundoff, s the smallest positive number, n keys, C the largest norm of a
    visible value, q the query times beta, q^ what the kernel is given for it, e the `sum_rounding` of the weights:

        C [2 tanh((|q - q^| + 4 u_32 |q|) max|k| / 2) + (1 + 2 e / (1 - e)) u + n s / 2]

    `docs/bounds.md` derives it. 0 for float32 operands, whose weights stay as they are.
    """
    dtype = inputs.key.dtype
    if dtype == inputs.query.dtype:
        return jnp.zeros(inputs.query.shape[:-1], inputs.query.dtype)
    low, wide = jnp.finfo(dtype), jnp.finfo(inputs.query.dtype)
    given, scale = as_given(inputs)
    moved = norms(inputs.query - given.astype(inputs.query.dtype) * scale)
    keys = max_over_visible(inputs.mask, norms(inputs.key.astype(inputs.query.dtype)))
    shift = 2 * jnp.tanh((moved + 2 * float(wide.eps) * norms(inputs.query)) * keys / 2)
    relative = jnp.minimum(sum_rounding(inputs, rescalings=0), 0.5)
    weights = (1 + 2 * relative / (1 - relative)) * float(low.eps) / 2
    lost = inputs.mask.num_keys * float(low.smallest_subnormal) / 2
    largest = max_over_visible(inputs.mask, norms(inputs.value.astype(inputs.query.dtype)))
    # As in `rounding_bound`, one part in a thousand covers the rounding of this expression.
    return 1.001 * largest * (shift + weights + lost)
