"""The contract that every attention method keeps.

A method is a frozen, keyword-only dataclass whose fields are its configuration. It holds no arrays;
what it learns or draws comes from `Method.init` and is passed back as `params`. Subclassing `Method`
registers the class, so the line that imports a method's file is its registration.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from attention.registry import Registry


class UnsupportedError(NotImplementedError):
    """A method was asked for something that its capabilities rule out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a method can do, as data: the laws, the checks and the documentation read it, never a name.

    Attributes:
        causal: honours `is_causal` strictly, in either alignment.
        window: honours `local_window_size`.
        lengths: honours `query_seq_lengths` and `key_value_seq_lengths`.
        segments: honours segment ids.
        dense_mask: honours an arbitrary boolean `mask`.
        bias: honours an additive `bias`.
        soft_cap: honours `logits_soft_cap`.
        cross: takes T != S.
        decoding: has `init_state` and `extend`.
        residual: can return the log of the softmax normaliser.
        certificate: the kind of bound that comes with the output.
        exact: equals softmax attention up to rounding, in every configuration.
        random: draws constants, so `params` or `rng` is needed.
        head_independent: a head's output depends on the operands of its key head and its query heads alone.
        group_independent: and not on the other query heads of its key head: these are as if each had a copy of it.
        sees_all: every visible key contributes, so that an infinite temperature gives the mean over them.
        rounding: the floating-point error of the method against itself in exact arithmetic is at most this
            multiple of `attention.rounding.rounding_bound`, at norms of order one.
        coarse: may compute in fewer bits than its operands have, within the error that its certificate tells of.
    """

    causal: bool = False
    window: bool = False
    lengths: bool = False
    segments: bool = False
    dense_mask: bool = False
    bias: bool = False
    soft_cap: bool = False
    cross: bool = False
    decoding: bool = False
    residual: bool = False
    certificate: Literal["none", "probabilistic", "deterministic"] = "none"
    exact: bool = False
    random: bool = False
    head_independent: bool = True
    group_independent: bool = True
    sees_all: bool = True
    rounding: float = 1.0
    coarse: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a method guarantees about its own output.

    Attributes:
        error_bound: `B T N`, an upper bound on ||output - exact output||_2, in the units of `value`.
            Infinite where nothing is known.
        dropped_mass: `B T N`, an upper bound on the softmax mass of the keys that were left out.
            One where nothing is known.
        work: the share of key blocks that were read, a scalar in [0, 1].
        kind: `deterministic`; `probabilistic`, true with probability `confidence`; or `none`.
        confidence: the probability with which a probabilistic bound holds, 1 for the others.
    """

    error_bound: Float[Array, "..."]
    dropped_mass: Float[Array, "..."]
    work: Float[Array, ""]
    kind: Literal["deterministic", "probabilistic", "none"] = dataclasses.field(
        default="none", metadata={"static": True}
    )
    confidence: float = dataclasses.field(default=1.0, metadata={"static": True})


class Params(NamedTuple):
    """What `Method.init` returns and `params=` takes: what is trained apart from what was drawn."""

    trained: Mapping[str, Any] = {}
    constants: Mapping[str, Any] = {}


class Cost(NamedTuple):
    """Floating-point operations and bytes of device memory traffic of one forward pass."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """One way to compute or approximate softmax attention.

    A subclass writes `attend` for plain softmax(q.k): `api` has already checked the arguments, folded
    beta = scale / temperature into the query, grouped the heads, and emptied the slots that nothing sees.

    The `inputs` argument of the hooks is an `attention.inputs.Inputs`; arrays are laid out heads first:
    queries `B K G T H` in float32 (float64 for float64 inputs), keys `B K S H`, values `B K S E`.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init_subclass__(cls, *, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if register:
            METHODS.add(cls)

    @abc.abstractmethod
    def attend(self, inputs: Any) -> Float[Array, "B K G T E"]:
        """The output, in the dtype of `inputs.query`; zero in rows that see no key."""

    def attend_with_residual(self, inputs: Any) -> tuple[Float[Array, "B K G T E"], Float[Array, "B K G T"]]:
        """The output and log(sum(exp(logits))) of each row, -inf in rows that see no key."""
        raise UnsupportedError(f"{type(self).__name__} does not compute the softmax normaliser: {capable('residual')}")

    def certify(self, inputs: Any) -> tuple[Float[Array, "B K G T E"], Certificate | None]:
        """The output with its certificate (arrays of shape `B K G T`), or None where no bound is known."""
        return self.attend(inputs), None

    def resolved(self, inputs: Any, *asks: str) -> "Method":
        """The method that computes this call: another one where this one chooses by what the call asks.

        Args:
            inputs: the call.
            asks: "residual" or "certificate", where they are wanted beside the output.
        """
        del inputs, asks
        return self

    def init(self, rng: Array | None, *, num_heads: int, head_dim: int) -> Params:
        """Trained parameters and drawn constants for `params=`; empty for a method that has neither."""
        del rng, num_heads, head_dim
        return Params()

    def redrawn(self, params: Params, rng: Array, *, step: Any, every: int) -> Params:
        """The params with the constants of a training step: others every `every` steps, by rng and step alone."""
        raise UnsupportedError(f"{type(self).__name__} has no constants that are redrawn: {overriding('redrawn')}")

    def init_state(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: Any,
        *,
        num_heads: int | None = None,
    ) -> Any:
        """The decoding state before the first token.

        `num_heads` is for states that keep something for each query head: as many as key heads unless given.
        """
        raise UnsupportedError(f"{type(self).__name__} does not decode: {capable('decoding')}")

    def extend(
        self,
        state: Any,
        query: Array,
        key: Array,
        value: Array,
        *,
        scale: Any = None,
        temperature: Any = 1.0,
        logits_soft_cap: Any = None,
        local_window_size: Any = None,
        params: Any = None,
        rng: Any = None,
    ) -> tuple[Any, Array]:
        """Appends T >= 1 tokens (`B T N H`, `B T K H`) and returns the new state and their causal output.

        Any split of a sequence into calls gives what the whole sequence gives. The options are those of
        `attention.dot_product_attention`.
        """
        raise UnsupportedError(f"{type(self).__name__} does not decode: {capable('decoding')}")

    def exact_limit(self, length: int) -> "Method | None":
        """The method with its budget raised until it equals softmax attention at `length`, or None."""
        return self if self.capabilities.exact else None

    @classmethod
    def examples(cls) -> "tuple[Method, ...]":
        """Configurations on which the laws are checked, at lengths of about 16."""
        return (cls(),)

    def ladder(self, length: int) -> "tuple[Method, ...]":
        """The method with growing budgets, along which its mean error at `length` falls; empty if it has none."""
        del length
        return ()

    @abc.abstractmethod
    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """Operations and bytes of a forward pass over one batch element in float32."""


METHODS: Registry[type[Method]] = Registry("attention.methods")


@functools.partial(jax.jit, static_argnames=("method", "hook"))
def compiled(inputs: Any, *, method: Method, hook: str) -> Any:
    """`method.hook(inputs)` under jit, so that a call outside any jit compiles once and not once a call."""
    return getattr(method, hook)(inputs)


def capable(capability: str) -> str:
    """Names the methods that have a capability, for the end of an error message."""
    names = [cls.__name__ for cls in METHODS.values() if getattr(cls.capabilities, capability)]
    return f"methods that can: {', '.join(names) or 'none'}"


def overriding(hook: str) -> str:
    """Names the methods that have a hook of their own, for the end of an error message."""
    names = [cls.__name__ for cls in METHODS.values() if getattr(cls, hook) is not getattr(Method, hook)]
    return f"methods that can: {', '.join(names) or 'none'}"


def check_positive(method: Method, *fields: str) -> None:
    """Raises ValueError unless each named field of `method` is a positive integer (None is let through)."""
    for field in fields:
        number = getattr(method, field)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number <= 0):
            raise ValueError(f"{type(method).__name__}.{field} is {number!r}: expected an integer of at least 1")
