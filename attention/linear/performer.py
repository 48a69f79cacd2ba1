"""Softmax attention by random features of every kind."""

import dataclasses
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attention.inputs import Inputs
from attention.linear import activations
from attention.linear.base import Linear
from attention.linear.concentration import trigonometric_bound
from attention.linear.couplings import Coupling, gaussian_rows
from attention.linear.engine import FeatureMap
from attention.linear.kernel_maps import Kind, check_constants, kernel_maps
from attention.method import Capabilities, Certificate, Cost, Params, check_positive

PAIRED = ("trigonometric", "hyperbolic")
"""Kinds that make two features of each row of W."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performer(Linear):
    r"""Softmax attention by random features, in time linear in length.

        e^{x.y} = E[phi(x).phi(y)],    x = beta q / sqrt|beta|,    y = k sqrt|beta|,

    so that x.y is the logit and each carries half of the temperature: neither depends on the data, nor on the other
    side. W has rows N(0, I); one W serves all heads. The kinds differ in phi (the document of each function in
    `attention.linear.random_features` has the formula):

    - `positive` (FAVOR+), `hyperbolic` (two features a row, of w and -w), and `trigonometric`, whose features have
      either sign, so that a denominator can vanish or be negative;
    - `optimal` (FAVOR++): positive features of wider rows, by as much as is best for |x + y|^2 = beta H spread;
    - `data_dependent` (FAVOR#): the same for each coordinate by itself, in coordinates in which queries and keys have
      mean 0 and equal, diagonal covariances. What the means leave out, q.c and d.k, is put back exactly;
    - `relu`: another kernel than softmax, without exponentials.

    The last statistics are constants of `params`: of standard normal activations, or of a sample by `fitted`. They
    follow beta inside the call. At beta = 0 all features are equal, and the output is the mean over the visible keys.

    Cost: 2 M (2 H + E) operations a token (3 H / 2 + E where two features share a row; 2 H^2 more if data-dependent),
    and where causal 2 C (M + E) more; a state of M (E + 1) numbers.
    Error bound: probabilistic for independent trigonometric features, `attention.linear.concentration`, over a draw of
    W that does not depend on the operands; for the others no bound is known that is finite at useful temperatures, and
    `docs/bounds.md` says why. The kernel estimate is unbiased for every kind but `relu`, under every coupling, and
    `attention.linear.theory` has its variance: (e^{|x+y|^2} - 1) / M relative to e^{2 x.y} for positive features, so
    that the features needed (`attention.linear.features_needed`) grow as e^{1 / temperature}. Where every product of
    features in a row underflows (logits of hundreds) the estimate is lost: the row is 0, and
    `jax.experimental.checkify` reports it.

    Attributes:
        kind: which phi.
        coupling: how the rows of W depend on each other: `attention.linear.couplings`.
        features: M, even where two features share a row.
        confidence: of certificates, in (0, 1); for independent trigonometric features alone.
        chunk: C.

    References:
        Choromanski et al., "Rethinking attention with Performers", arXiv 2009.14794, sections 2.3 and 2.4;
        Likhosherstov et al., "Chefs' random tables", arXiv 2205.15317, section 3 (`optimal`); Likhosherstov et al.,
        "FAVOR#", arXiv 2302.00787, section 3 (`data_dependent`); Reid et al., "Simplex random features", arXiv
        2301.13856, section 3.
    """

    kind: Kind = "positive"
    coupling: Coupling = "orthogonal"
    features: int = 256
    confidence: float = 0.95

    capabilities = Capabilities(causal=True, lengths=True, segments=True, cross=True, decoding=True, random=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "features")
        for field, choices in (("kind", get_args(Kind)), ("coupling", get_args(Coupling))):
            if getattr(self, field) not in choices:
                raise ValueError(f"Performer.{field} is {getattr(self, field)!r}: expected one of {choices}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"Performer.confidence is {self.confidence!r}: expected a probability between 0 and 1")
        if self.kind in PAIRED and self.features % 2:
            raise ValueError(f"Performer.features is {self.features}: expected an even number for kind={self.kind!r}")
        if self.kind == "trigonometric":
            # Numerators and denominators cancel, by as much as chance has it: no multiple of a bound holds.
            certificate = "probabilistic" if self.coupling == "iid" else "none"
            own = dataclasses.replace(type(self).capabilities, rounding=math.inf, certificate=certificate)
            object.__setattr__(self, "capabilities", own)

    @classmethod
    def examples(cls) -> "tuple[Performer, ...]":
        return (
            cls(features=24, chunk=5),
            cls(kind="trigonometric", coupling="iid", features=256, chunk=5),
            cls(kind="data_dependent", coupling="simplex", features=24, chunk=5),
        )

    def ladder(self, length: int) -> "tuple[Performer, ...]":
        del length
        if self.kind == "relu":
            return ()
        return tuple(dataclasses.replace(self, features=features) for features in (16, 128, 1024))

    def num_features(self, head_dim: int) -> int:
        del head_dim
        return self.features

    @property
    def rows(self) -> int:
        """Of W."""
        return self.features // 2 if self.kind in PAIRED else self.features

    def init(self, rng: Array | None, *, num_heads: int, head_dim: int) -> Params:
        """Draws W in float32 whatever the dtype of the operands, from `rng` alone; statistics are the standard ones."""
        del num_heads
        if rng is None:
            raise ValueError("Performer.init: rng is None: expected a key, since the projection is drawn from it")
        constants = {"projection": gaussian_rows(self.coupling, rng, (self.rows, head_dim))}
        if self.kind == "optimal":
            constants |= activations.standard_spread()
        if self.kind == "data_dependent":
            constants |= activations.standard_geometry(head_dim)
        return Params(constants=constants)

    def redrawn(self, params: Params, rng: Array, *, step: Any, every: int) -> Params:
        """The params with the W of a training step: another one every `every` steps, a function of rng and step alone.

            W = draw(fold_in(rng, step // every))

        `step` may be traced: all steps share one program, which draws where step is a multiple of `every` and keeps
        what it was given elsewhere. Statistics are kept. Call it before each step with what the last one returned; a
        run that resumes from saved params, or at a multiple of `every`, then has the same W. The states of a
        sequence that is being decoded belong to the W that they were made with.

        Args:
            params: what `init`, `fitted` or `redrawn` returned.
            rng: a key, the same for all steps.
            step: the number of the step.
            every: steps between draws.

        Raises:
            ValueError: `every` is no positive integer.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Performer.redrawn: every is {every!r}: expected an integer of at least 1")
        old, step = params.constants["projection"], jnp.asarray(step)

        def drawn():
            return gaussian_rows(self.coupling, jax.random.fold_in(rng, step // every), old.shape).astype(old.dtype)

        projection = lax.cond(step % every == 0, drawn, lambda: old)
        return params._replace(constants={**params.constants, "projection": projection})

    def fitted(self, params: Params, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"]) -> Params:
        """The params with the statistics of sample activations, one set a key head, for the call's own temperature.

        Attention with them is as causal as before: nothing is fitted inside a call.

        Args:
            params: what `init` or `redrawn` returned.
            query, key: activations as `attention.dot_product_attention` takes them.

        Raises:
            ValueError: the kind has no statistics, or the heads do not match.
        """
        samples = {"optimal": activations.sample_spread, "data_dependent": activations.sample_geometry}
        if self.kind not in samples:
            raise ValueError(f"Performer.fitted: kind is {self.kind!r}: expected one of {tuple(samples)}")
        B, T, N, H = query.shape
        K = key.shape[2]
        if N % K:
            raise ValueError(f"query has {N} heads: expected a multiple of the {K} heads of key")
        wide = jnp.float32
        grouped = query.astype(wide).reshape(B, T, K, N // K, H)
        return params._replace(constants={**params.constants, **samples[self.kind](grouped, key.astype(wide))})

    def certify(self, inputs: Inputs) -> tuple[Float[Array, "B K G T E"], Certificate | None]:
        if self.capabilities.certificate == "none":
            return super().certify(inputs)
        output, feature_map, projection = (
            self.attend(inputs),
            self.feature_map(inputs),
            self._constants(inputs)["projection"],
        )
        given: dict[str, Any] = {"confidence": self.confidence, "chunk": self.chunk}
        bound = trigonometric_bound(inputs, output, feature_map, projection, **given)
        one, nothing = jnp.ones((), bound.dtype), jnp.zeros_like(bound)
        return output, Certificate(
            error_bound=bound, dropped_mass=nothing, work=one, kind="probabilistic", confidence=self.confidence
        )

    def feature_map(self, inputs: Inputs) -> FeatureMap:
        _, K, G, _, _ = inputs.query.shape
        constants = self._constants(inputs)
        own = inputs.beta.ndim > 0 and G > 1  # a temperature for each head of a group
        query, key = kernel_maps(self.kind, constants, inputs.beta, K)
        return FeatureMap(query=query, key=key, size=self.features, groups=G if own else 1)

    def _constants(self, inputs: Inputs) -> dict[str, Array]:
        (_, K, G, _, H), params = inputs.query.shape, inputs.params
        if params is None:
            params = self.init(inputs.rng, num_heads=K * G, head_dim=H)
        constants = {name: jnp.asarray(x, inputs.query.dtype) for name, x in params.constants.items()}
        check_constants(self.kind, constants, self.rows, K, H)
        return constants

    def cost(self, T: int, S: int, *, num_heads: int, head_dim: int, is_causal: bool = False) -> Cost:
        """The engine's, and the projection of every query and key."""
        engine = super().cost(T, S, num_heads=num_heads, head_dim=head_dim, is_causal=is_causal)
        products = self.rows * head_dim + (head_dim**2 if self.kind == "data_dependent" else 0)
        return engine._replace(flops=engine.flops + 2.0 * num_heads * (T + S) * products)
