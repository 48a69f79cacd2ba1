"""Error over bound on drawn cases, forward and gradients: no violation, and how near the worst case comes."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from as_users import AS_USERS
from jax import lax
from ratios import over

from attention import Chunked, Exact, Fused, Method, certified_attention, dot_product_attention
from attention.exact import exact_certificate, weighted_values
from attention.native.build import KEYS
from attention.rounding import CALM, norms, roundoff
from attention.testing import oracle, oracle_gradients
from attention.testing.cases import Case
from attention.testing.rounding import gradient_rounding

QUANTITIES = ("output", "dq", "dk", "dv")
DTYPES = ("float32", "bfloat16", "float16", "float64")
HEADS = ((1, 1), (2, 1), (4, 2), (3, 3), (6, 2))  # N and K
SIZES = ((8, 8), (16, 5), (1, 3), (64, 64), (5, 16), (8, 1))  # H and E
R, C = 8, 6  # tiles of queries and keys
TILED = (Chunked(query_chunk=R, key_chunk=C), Exact(), Chunked(query_chunk=R, key_chunk=C))
UNTILED = (Chunked(), Exact(), Chunked())
# Lengths of 1, primes, and a tile with its neighbours; and some for which Chunked chooses several tiles itself.
LONG = ((257, 600), (600, 257), (1031, 1031), (512, 513))
SHAPES = (*LONG, *itertools.product((1, R - 1, R, R + 1, 13, 31, 64), (1, C - 1, C, C + 1, 2 * C, 17, 37, 64)))
# What is compiled in, and which arrays are drawn with each case.
FORMS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({}, ()),
    ({"is_causal": True}, ("scale",)),
    ({"is_causal": True, "causal_alignment": "bottom_right"}, ("lengths",)),
    ({"local_window_size": (3, 1)}, ("lengths",)),
    ({"is_causal": True, "local_window_size": (5, 0), "causal_alignment": "bottom_right"}, ()),
    ({"is_causal": True}, ("segments", "lengths")),
    ({}, ("dense", "bias", "cap", "lengths")),
    ({}, ("segments", "dense", "scale")),
    ({"is_causal": True}, ("cap", "lengths")),  # for the kernel in C, which takes no bias
)
FOR_ALL = len(FORMS) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(Exact, register=False):
    """Weights e^(l - m) with m = |q| max|k| in place of the row's maximum, where m is small."""

    fixed_shift: float = 16.0

    def attend(self, inputs):
        logits = self._logits(inputs)
        m = norms(inputs.query) * norms(inputs.key).max(-1)[:, :, None, None]
        top = logits.max(-1)
        shift = jnp.where(m <= self.fixed_shift, m, jnp.where(jnp.isneginf(top), 0, top))
        weights = jnp.exp(logits - lax.stop_gradient(shift)[..., None])
        total = weights.sum(-1, keepdims=True)
        return weighted_values(weights, inputs.value) / jnp.where(total > 0, total, 1)

    def certify(self, inputs):
        return self.attend(inputs), exact_certificate(inputs, rescalings=0, fixed_shift=self.fixed_shift)


class Program(NamedTuple):
    """What one compilation serves: every case of it is a value."""

    T: int
    S: int
    heads: tuple[int, int]
    sizes: tuple[int, int]
    dtype: str
    method: Method
    form: int

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of query, key, value and cotangent."""
        (N, K), (H, E) = self.heads, self.sizes
        return (1, self.T, N, H), (1, self.S, K, H), (1, self.S, K, E), (1, self.T, N, E)


def program(index: int) -> Program:
    """The strides are such that every form meets every dtype, and every shape three of them, tiled and not."""
    shape = index % len(SHAPES)
    heads, sizes = (HEADS[index % 5], SIZES[index % 6]) if shape >= len(LONG) else ((2, 1), (8, 8))
    method = (UNTILED if shape < len(LONG) else TILED)[index // len(SHAPES) % 3]
    return Program(*SHAPES[shape], heads, sizes, DTYPES[(index + index // 8) % 4], method, index % FOR_ALL)


def native(index: int) -> Program:
    """The same for the kernel in C, which takes no bias and no float64: every form meets every dtype."""
    forms = [form for form, (_, arrays) in enumerate(FORMS) if "bias" not in arrays]
    form, dtype = forms[(index + 2 * (index // len(SHAPES))) % len(forms)], DTYPES[(index + index // 24) % 3]
    return program(index)._replace(dtype=dtype, method=Fused(implementation="native"), form=form)


def drawn(which: Program, seed: int) -> tuple[Case, np.ndarray, dict[str, Any]]:
    """Operands, cotangent and arrays of one case; logits of up to 1e4, temperatures from 0.01 to 100."""
    rng = np.random.default_rng(seed)
    query, key, value, cotangent = (rng.standard_normal(shape) for shape in which.shapes())
    match rng.integers(4):
        case 0:  # one key far outside
            key[:, rng.integers(which.S)] *= 20
        case 1:  # few different keys
            key = key[:, rng.integers(min(which.S, 3), size=which.S)]
        case 2:  # values and cotangents of any size, away from 0
            value = (value + 10 * rng.standard_normal(value.shape[3])) * 10 ** rng.uniform(-3, 2)
            cotangent *= 10 ** rng.uniform(-2, 1)
    N, H = which.shapes()[0][2:]
    temperature, size = 10 ** rng.uniform(-2, 2), 10 ** rng.uniform(-2, 4)
    scale = 10 ** rng.uniform(-1, 0, N) if "scale" in FORMS[which.form][1] else np.full(1, 1 / np.sqrt(H))
    largest = np.linalg.norm(query, axis=-1).max() * np.linalg.norm(key, axis=-1).max() * scale.max() / temperature
    query *= min(size / largest, 1e4)  # float16 ends at 65504
    arrays = {"temperature": np.float32(temperature)} | _arrays(which, rng, scale)
    return Case(query, key, value), cotangent, arrays


def _arrays(which: Program, rng, scale) -> dict[str, Any]:
    wanted, arrays = FORMS[which.form][1], {}
    N, (T, S) = which.heads[0], (which.T, which.S)
    if "scale" in wanted:
        arrays["scale"] = scale.astype(np.float32)
    if "lengths" in wanted:
        arrays["query_seq_lengths"] = rng.integers(0, T + 1, 1)
        arrays["key_value_seq_lengths"] = rng.integers(0, S + 1, 1)
    if "segments" in wanted:
        arrays["query_segment_ids"] = np.sort(rng.integers(3, size=(1, T)))
        arrays["key_value_segment_ids"] = np.sort(rng.integers(3, size=(1, S)))
    if "dense" in wanted:
        arrays["mask"] = rng.random((1, N, T, S)) < rng.choice([0.1, 0.5, 0.9])
    if "bias" in wanted:
        bias = rng.standard_normal((1, N, T, S)) * 10 ** rng.uniform(-1, 1)
        arrays["bias"] = np.where(rng.random(bias.shape) < 0.9, bias, -np.inf).astype(np.float32)
    if "cap" in wanted:
        arrays["logits_soft_cap"] = np.float32(10 ** rng.uniform(-1, 2))
    return arrays


@functools.partial(jax.jit, static_argnames="which", compiler_options=AS_USERS)
def measured(cases, which: Program):
    """Outputs, their certified bounds and the gradients, one case after the other in one compiled loop."""

    def one(case):
        operands, cotangent, arrays = case
        given = {"method": which.method} | arrays | FORMS[which.form][0]
        output, pull = jax.vjp(lambda x: dot_product_attention(*x, **given), operands)
        _, certificate = certified_attention(*operands, **given)
        return output, certificate.error_bound, pull(cotangent)[0]

    return lax.map(one, cases)


def ratios(which: Program, seeds: range) -> dict[str, list[float]]:
    """The largest error over bound of each case, by quantity."""
    found: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    with jax.enable_x64(which.dtype == "float64"):
        cases = [drawn(which, seed) for seed in seeds]
        with np.errstate(over="ignore"):
            cast = [jax.tree.map(lambda x: x.astype(which.dtype), case[:2]) for case in cases]
        cases = [(*narrow, case[2]) for narrow, case in zip(cast, cases, strict=True)]
        # By NumPy: JAX would compile a program for each shape.
        results = jax.tree.map(np.asarray, measured(jax.tree.map(lambda *x: np.stack(x), *cases), which))
        for i, case in enumerate(cases):
            errors, bounds = _errors(which, case, *jax.tree.map(lambda x, i=i: x[i], results))
            for name, error, bound in zip(QUANTITIES, errors, bounds, strict=True):
                found[name].append(float(over(error, bound).max(initial=0)))
    return found


def _errors(which: Program, case, output, bound, gradients):
    """Errors and bounds of the output, by row, and of the gradients, by entry."""
    operands, cotangent, arrays = case
    options = arrays | FORMS[which.form][0]
    expected = (oracle(*operands, **options)[0], *oracle_gradients(*operands, cotangent, **options))
    errors = [np.abs(a.astype(np.float64) - b) for a, b in zip((output, *gradients), expected, strict=True)]
    tiles = -(-which.S // (which.method.key_chunk or 1)) if isinstance(which.method, Chunked) else 0
    tiles += -(-which.S // KEYS) + 1 if isinstance(which.method, Fused) else 0
    shift = CALM if isinstance(which.method, Chunked) else getattr(which.method, "fixed_shift", 0.0)
    # The oracle rounds as well: in float64, as much as what it judges.
    oracles = 1 + roundoff(np.float64) / roundoff(jnp.promote_types(which.dtype, jnp.float32))
    bounds = gradient_rounding(*operands, cotangent, rescalings=tiles, fixed_shift=shift, **options)
    return [np.linalg.norm(errors[0], axis=-1), *errors[1:]], [bound.astype(np.float64) * oracles, *bounds]


def held(which: Program, seeds: range, record_ratios=lambda *_, **of: None) -> dict[str, list[float]]:
    """The same, taken down; fails where an error is above its bound."""
    found, causal = ratios(which, seeds), "is_causal" in FORMS[which.form][0]
    of = {"method": type(which.method).__name__, "dtype": which.dtype, "causal": causal}
    record_ratios(found, **of, kind="rounding", problems=None)
    for name, worst in found.items():
        seed = seeds[int(np.argmax(worst))]
        assert max(worst) <= 1, f"{which}, seed {seed}: the error of {name} is {max(worst):.3g} of its bound"
    return found


@pytest.mark.parametrize("index", range(7, 177, 17))  # no long shape is among them
def test_no_error_is_above_its_bound(index, record_ratios):
    """1,000 cases in 10 programs."""
    seeds = range(10_000 * index, 10_000 * index + 100)
    for name, worst in held(program(index), seeds, record_ratios).items():
        assert max(worst) > 1e-3, f"{name}: a bound a thousand times too wide says little"


# Few and many queries, in one panel and in more; keys of a tile with its neighbours; all that it takes.
NATIVE = (
    (1, KEYS - 1, 2, "float32"),
    (8, KEYS + 1, 5, "float32"),
    (65, 257, 4, "float32"),
    (33, 131, 3, "float32"),
    (8, KEYS + 1, 8, "float32"),
    (65, 257, 8, "float32"),
    (9, KEYS - 1, 7, "bfloat16"),
    (3, KEYS + 1, 1, "bfloat16"),
    (33, 131, 5, "bfloat16"),
    (2, 37, 3, "float16"),
    (65, 257, 4, "float16"),
)


@pytest.mark.parametrize(("T", "S", "form", "dtype"), NATIVE)
def test_no_error_of_the_kernel_in_c_is_above_its_bound(T, S, form, dtype, record_ratios):
    """100 cases each."""
    which = Program(T, S, HEADS[form % 5], SIZES[form % 6], dtype, Fused(implementation="native"), form)
    for name, worst in held(which, range(100), record_ratios).items():
        assert max(worst) > 1e-3, f"{name}: a bound a thousand times too wide says little"


def test_no_error_is_above_its_bound_with_a_fixed_shift():
    held(program(25)._replace(method=Shifted()), range(100))


def test_underflow_below_a_fixed_shift_is_in_its_bound():
    """Weights of e^-32 and values of 1e-25, whose products are no normal numbers: all is lost where they count as 0."""
    query, key, value = (jnp.full((1, 1, 1, 1), x, jnp.float32) for x in (-4, 4, 1e-25))
    output, certificate = certified_attention(query, key, value, scale=1.0, method=Shifted())
    error = abs(float(output.item()) - 1e-25)
    assert error <= float(certificate.error_bound.item())
    if jax.default_backend() == "cpu":  # others may keep subnormal numbers
        assert error > float(certified_attention(query, key, value, scale=1.0)[1].error_bound.item())


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(12))
def test_no_error_is_above_its_bound_in_the_campaign(part, record_ratios):
    """10,104 cases in 180 programs, three of each of 60 shapes."""
    for index in range(part, 3 * len(SHAPES), 12):
        held(program(index), seeds_of(index), record_ratios)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(12))
def test_no_error_of_the_kernel_in_c_is_above_its_bound_in_the_campaign(part, record_ratios):
    """As many cases and programs, of the same shapes, and of all forms and dtypes that it takes."""
    for index in range(part, 3 * len(SHAPES), 12):
        held(native(index), seeds_of(index), record_ratios)


def seeds_of(index: int) -> range:
    return range(10_000 * index, 10_000 * index + (59 if index % len(SHAPES) >= len(LONG) else 16))
