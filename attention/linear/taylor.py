"""Softmax attention by the Taylor polynomial of the exponential, around the mean of the keys, with a certificate."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.inputs import Inputs, prepare_tokens, ungrouped
from attention.linear.base import Linear, _extended
from attention.linear.engine import FeatureMap
from attention.linear.moments import Spread, mean_of_visible, prefix_sums, taylor_bound
from attention.linear.state import HIGHEST, Features, LinearState
from attention.method import Capabilities, Certificate
from attention.monomials import monomials


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TaylorState:
    """The sums over features, the first key f, and the sum of k - f over all keys."""

    sums: LinearState
    first: Float[Array, "B K H"]
    total: Float[Array, "B K H"]


class Centred(NamedTuple):
    """A call whose keys are k - f, with the logit of the centre behind each query; and what the centre is.

    `inputs` has head size H + 1: a query ends with a = q.(c - f), a key with 0. `centre` is c - f, `B K T H`.
    """

    inputs: Inputs
    centre: Float[Array, "B K T H"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taylor(Linear):
    r"""Softmax attention with e^x replaced by its Taylor polynomial around the mean key, in time linear in length.

        o_i = sum_j T_p(x_ij) v_j / sum_j T_p(x_ij),    T_p(x) = sum_{d <= p} x^d / d!,    x_ij = q_i.(k_j - c_i),

    where c_i is the mean of the keys that query i sees: softmax does not change when a constant is taken from a row's
    logits, and the polynomial is best near 0. (x.y)^d / d! = sum over monomials of degree d of
    x^a y^a / a!, each monomial once, so M = (H + p choose p): 65, 2145, 47,905 and 814,385 for H = 64. The keys'
    features do not depend on c_i: with f the first key, or the mean where nothing is causal, and
    a_i = q_i.(c_i - f), the query's features of degree d carry T_{p - d}(-a_i).

    Even orders are positive, T_2 >= 1/2 and T_4 >= 0.27. The denominator of order 1 is the number of keys. That of
    order 3 may be negative or vanish where some x is below -1.59; what vanishes is 0, and `jax.experimental.checkify`
    reports it. Temperature enters through q alone; the error falls as temperature^-(p + 1).

    Shapes: queries `B T N H`, keys `B S K H`, values `B S K E`; sums in float32, float64 for float64 operands.
    Cost: 2 M (E + 1) operations a query and a key, and where causal 2 C (M + E) more; a state of M (E + 1) numbers.
    Error bound: `attention.linear.moments.taylor_bound`, deterministic: with R and m the largest |x_ij| and the mean
    of x_ij^2, about m (e^R - T_p(R)) / R^2 max|v_j - o_i|, and never more than max|v_j - o_i|.

    Attributes:
        order: p, from 1 to 4.
        chunk: C.

    Raises:
        ValueError: a field is out of range.

    References:
        Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff",
        arXiv 2402.18668, section 3 (order 2). The centring and the certificate: `docs/bounds.md`.
    """

    order: int = 2

    capabilities = Capabilities(
        causal=True, lengths=True, cross=True, decoding=True, certificate="deterministic", rounding=16.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.order, bool) or self.order not in (1, 2, 3, 4):
            raise ValueError(f"Taylor.order is {self.order!r}: expected 1, 2, 3 or 4")

    @classmethod
    def examples(cls) -> "tuple[Taylor, ...]":
        return (cls(chunk=5),)

    def ladder(self, length: int) -> "tuple[Taylor, ...]":
        del length
        return tuple(dataclasses.replace(self, order=order) for order in (1, 2, 4))

    def num_features(self, head_dim: int) -> int:
        return math.comb(head_dim + self.order, self.order)

    def attend(self, inputs: Inputs) -> Float[Array, "B K G T E"]:
        return super().attend(centred(inputs).inputs)

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate]:
        about = centred(inputs)
        output = super().attend(about.inputs)
        # Attention of order 1 over the centred keys as values is their covariance times q.
        H = about.centre.shape[-1]
        keys = dataclasses.replace(about.inputs, value=about.inputs.key[..., :H])
        pulled = Linear.attend(dataclasses.replace(self, order=1), keys)
        spread = Spread(key=keys.value, centre=about.centre, offset=about.inputs.query[..., H], pulled=pulled)
        bound = taylor_bound(inputs, output, spread, order=self.order, features=self.num_features(H), chunk=self.chunk)
        one = jnp.ones((), bound.dtype)
        return output, Certificate(
            error_bound=bound, dropped_mass=jnp.zeros_like(bound), work=one, kind="deterministic"
        )

    def init_state(self, batch, num_kv_heads, head_dim, max_length, dtype, *, num_heads=None) -> Any:
        """A `TaylorState`: as `Linear.init_state`, and two keys a head more."""
        sums = super().init_state(batch, num_kv_heads, head_dim, max_length, dtype, num_heads=num_heads)
        nothing = jnp.zeros((batch, num_kv_heads, head_dim), sums.sums.dtype)
        return TaylorState(sums=sums, first=nothing, total=nothing)

    def extend(self, state: Any, query: Array, key: Array, value: Array, **options: Any) -> tuple[Any, Array]:
        """As `Method.extend`. The state holds what is of the keys alone: temperature may differ from call to call."""
        longer, output = _with_tokens(state, prepare_tokens(self, query, key, value, **options), method=self)
        return longer, ungrouped(output, query).astype(query.dtype)

    def feature_map(self, inputs: Inputs) -> FeatureMap:
        H = inputs.query.shape[-1] - 1

        def query(x, position):
            del position
            return query_features(x[..., :H], x[..., H:], self.order)

        def key(y, position):
            del position
            features = jnp.concatenate(monomials(y[:, :, None, :, :H], self.order), axis=-1)
            return Features(features, jnp.zeros(features.shape[:-1], features.dtype))

        return FeatureMap(query=query, key=key, size=self.num_features(H))


@functools.partial(jax.jit, static_argnames=("method",))
def _with_tokens(state: TaylorState, inputs: Inputs, *, method: Taylor) -> tuple[TaylorState, Array]:
    """Compiled, so that a loop over tokens outside any jit compiles once."""
    dtype, length = inputs.query.dtype, state.sums.length
    key = inputs.key.astype(dtype)
    first = jnp.where(length == 0, key[:, :, 0], state.first)
    key = key - lax.stop_gradient(first)[:, :, None]
    total = prefix_sums(key) + state.total[:, :, None]
    counts = (length + 1 + jnp.arange(key.shape[2])).astype(dtype)
    about = _with_centre(inputs, key, total / counts[None, None, :, None]).inputs
    sums, output = _extended(state.sums, about, method=method)
    return TaylorState(sums=sums, first=first, total=total[:, :, -1]), output


def centred(inputs: Inputs) -> Centred:
    """The call with keys k - f, f the first key where causal and else the mean of the visible keys.

    A causal centre is the mean of the keys up to the query's own: no row depends on a later key, bit for bit. f is
    taken away so that what all keys share costs no digits; it cancels, and has no gradient.
    """
    key = inputs.key.astype(inputs.query.dtype)
    f = key[:, :, :1] if inputs.mask.causal else mean_of_visible(inputs.mask, key)[:, :, :1]
    key = key - lax.stop_gradient(f)
    return _with_centre(inputs, key, mean_of_visible(inputs.mask, key))


def _with_centre(inputs: Inputs, key: Float[Array, "B K S H"], centre: Float[Array, "B K T H"]) -> Centred:
    offset = jnp.einsum("BKGTH,BKTH->BKGT", inputs.query, centre, precision=HIGHEST)
    query = jnp.concatenate([inputs.query, offset[..., None]], axis=-1)
    key = jnp.concatenate([key, jnp.zeros_like(key[..., :1])], axis=-1)
    return Centred(dataclasses.replace(inputs, query=query, key=key), centre)


def query_features(q: Float[Array, "*N H"], a: Float[Array, "*N 1"], order: int) -> Features:
    """Features phi with phi(q, a).monomials(y) = u^-order T_order(q.y - a), u a power of two of about max|q| / 256.

    A common factor of a row's features cancels; u keeps them from overflowing where logits are huge.
    """
    largest = lax.stop_gradient(jnp.maximum(jnp.abs(q).max(-1, keepdims=True), jnp.abs(a)))
    unit = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(largest / 256, 1))))
    q, a, down = q / unit, a / unit, 1 / unit

    def shifted(rest: int) -> Array:  # u^-rest T_rest(-a)
        return sum(((-a) ** i * down ** (rest - i) / math.factorial(i) for i in range(rest + 1)), jnp.zeros_like(a))

    blocks = [block * shifted(order - d) for d, block in enumerate(monomials(q, order))]
    features = jnp.concatenate(blocks, axis=-1)
    return Features(features, jnp.zeros(features.shape[:-1], features.dtype))
