"""Fused: the choice as data, refusals with their reasons, and each kernel that runs here against the oracle."""

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Exact, Fused, UnsupportedError
from attention.fused.calls import Call
from attention.fused.kernels import KERNELS, chosen, named
from attention.fused.vendors import splash
from attention.inputs import prepare, ungrouped
from attention.testing import LAWS, oracle
from attention.testing.cases import Case, draw, rounding, run, run_with_gradients
from attention.testing.oracle import oracle_gradients
from experiments.config import Model, Run
from experiments.provenance import describe_methods

MACHINES = {"cpu": ("cpu", 0.0), "gpu 8.0": ("gpu", 8.0), "gpu 9.0": ("gpu", 9.0), "tpu": ("tpu", 0.0)}
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
ASKS = {
    "causal or lengths": {"causal", "lengths"},
    "segments": {"causal", "segments"},
    "mask": {"mask"},
    "bias": {"mask", "bias"},
}
WINDOW = {"causal", "window"}


def call(machine="cpu", dtype="float32", asks=(), *, size=64, length=4096, tokamax=False, native="") -> Call:
    backend, generation = MACHINES[machine]
    return Call(
        backend=backend,
        generation=generation,
        dtype=dtype,
        head_size=size,
        queries=length,
        keys=length,
        asks=frozenset(asks),
        tokamax=tokamax,
        native=native,
    )


def choice(asked: Call) -> str:
    kernel = chosen(asked)
    return "Exact" if kernel is None else kernel.name


def table() -> str:
    """What "auto" takes at H = 64 and T = S = 4,096; after a comma with tokamax, in brackets without C."""
    rows = [["backend", "operands", *ASKS]]
    for machine, dtype in itertools.product(MACHINES, DTYPES):
        cells = []
        for asks in ASKS.values():
            found = [choice(call(machine, dtype, asks, tokamax=installed)) for installed in (False, True)]
            without = choice(call(machine, dtype, asks, native="no compiler"))
            cells.append(", ".join(dict.fromkeys(found)) + (f" ({without})" if without != found[0] else ""))
        rows.append([machine, dtype, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def test_the_documented_table_is_the_choice():
    print("\n" + table())
    document = inspect.getdoc(Fused) or ""
    for line in table().splitlines():
        assert line in document, f"the docstring of Fused lacks: {line}"


EVERY = [
    call(machine, dtype, asks, size=size, length=length, tokamax=tokamax)
    for machine, dtype, asks, size, length, tokamax in itertools.product(
        MACHINES, (*DTYPES, "float64"), (*ASKS.values(), WINDOW), (5, 64, 200), (1, 4096), (False, True)
    )
]


def test_a_choice_is_one_that_can():
    for machine, dtype in itertools.product(MACHINES, DTYPES):  # what the table has no column for
        assert (
            choice(call(machine, dtype, WINDOW))
            == choice(call(machine, dtype))
            == choice(call(machine, dtype, ["causal"]))
        )
    for asked in EVERY:
        kernel = chosen(asked)
        assert (kernel is None) == (asked.dtype == "float64" or without_float16(asked)), asked
        if kernel is not None:
            assert kernel.refusal(asked) is None
            assert asked.backend in kernel.backends
            assert asked.tokamax or not kernel.package


def without_float16(asked: Call) -> bool:
    return asked.dtype == "float16" and (asked.backend == "tpu" or (asked.backend == "cpu" and "bias" in asked.asks))


@pytest.mark.parametrize("asks", ["soft cap", "residual"])
def test_no_kernel_of_a_vendor_takes(asks):
    machines = itertools.product(MACHINES, DTYPES)
    assert all(choice(call(*machine, [asks], native="no compiler")) == "Exact" for machine in machines)


def test_a_certified_call_goes_to_what_has_a_bound():
    assert choice(call("cpu", "bfloat16", ["certificate"])) == "native"
    assert choice(call("cpu", "bfloat16", ["certificate"], native="no compiler")) == "xla"
    assert choice(call("gpu 9.0", "bfloat16", ["certificate"])) == "Exact"


REFUSED = {
    "wrong backend": ("cudnn", call("cpu", "bfloat16"), "runs on gpu, not cpu"),
    "dtype": ("cudnn", call("gpu 9.0"), "takes bfloat16 or float16 operands, not float32"),
    "float64": ("xla", call("cpu", "float64"), "not float64"),
    "head multiple": ("cudnn", call("gpu 9.0", "bfloat16", size=60), "multiples of 8"),
    "head limit": ("cudnn", call("gpu 8.0", "bfloat16", size=136), "up to 128, not 136"),
    "head limit on Hopper": ("cudnn", call("gpu 9.0", "bfloat16", size=264), "up to 256, not 264"),
    "odd lengths": ("cudnn", call("gpu 9.0", "bfloat16", ["mask"], length=129), "mask for even T and S alone"),
    "table in float16": ("cudnn", call("gpu 9.0", "float16", ["bias"]), "does not take bias with float16"),
    "generation": ("tokamax:mosaic", call("gpu 8.0", "bfloat16", tokamax=True), "compute capability from 9.0"),
    "blocks": ("tokamax:mosaic", call("gpu 9.0", "bfloat16", tokamax=True, length=1000), "multiples of 128"),
    "no compiler": ("native", call(native="there is no C compiler"), "it is not there: there is no C compiler"),
    "package": ("tokamax:triton", call("gpu 9.0"), r"pip install attention-lab\[fused\]"),
    "mask on a TPU": ("tpu:splash", call("tpu", "float32", ["mask"]), "does not take mask"),
    "lengths of tokamax on a TPU": ("tokamax:mosaic", call("tpu", asks=["lengths"], tokamax=True), "take lengths"),
    "soft cap": ("xla", call("cpu", asks=["soft cap"]), "soft cap"),
}


@pytest.mark.parametrize(("name", "asked", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_kernel_says_why_not(name, asked, reason):
    refusal = named(name, asked.backend).refusal(asked)
    assert refusal is not None
    assert reason.replace("\\", "") in refusal


SMALL = draw(40).astype(jnp.float32)


def test_a_named_kernel_is_never_replaced():
    for name in {kernel.name for kernel in KERNELS} - {"native", "xla", "tokamax:xla_chunked"}:
        with pytest.raises(UnsupportedError, match=f"{name}.*it runs on.*implementations that can: native, xla"):
            attention.dot_product_attention(*SMALL, method=Fused(implementation=name))
    with pytest.raises(UnsupportedError, match=r"log normaliser.*that can: native"):
        attention.dot_product_attention(*SMALL, method=Fused(implementation="xla"), return_residual=True)


def test_an_unknown_name_is_refused_with_the_nearest():
    misspelt = object.__new__(Fused)  # past the type checks of the tests, which come first
    object.__setattr__(misspelt, "implementation", "cuddn")
    with pytest.raises(ValueError, match="did you mean 'cudnn'"):
        misspelt.__post_init__()


def test_the_choice_is_visible():
    inputs = prepare(Fused(), *SMALL, is_causal=True)
    assert repr(Fused().resolved(inputs)) == "Fused(implementation='native')"
    assert Fused().resolved(inputs, "residual") == Fused(implementation="native")
    assert Fused().resolved(prepare(Fused(), *SMALL, logits_soft_cap=3.0)) == Fused(implementation="native")
    assert Fused().resolved(prepare(Fused(), *SMALL, np.zeros((13, 13)), logits_soft_cap=3.0)) == Exact()


def test_a_run_records_what_each_layer_resolves_to():
    model = Model(layers=3, layer_methods=("Fused()", "Performer(features=8)", "Fused(implementation='xla')"))
    fused, performer, named_fused = describe_methods(Run(model=model))
    assert fused == "Fused(implementation='native')"
    assert named_fused == "Fused(implementation='xla')"
    assert attention.parse_method(performer) == attention.Performer(features=8)


RNG = np.random.default_rng(41)
BIAS = np.where(RNG.random((1, 4, 13, 13)) < 0.6, RNG.standard_normal((1, 4, 13, 13)), -np.inf)
BIAS[:, 1, 3] = -np.inf  # a row that sees nothing
OPTIONS = {
    "window": {"is_causal": True, "local_window_size": (4, 2)},
    "one query": {"is_causal": True, "causal_alignment": "bottom_right", "key_value_seq_lengths": np.array([0, 9])},
    "lengths": {"query_seq_lengths": np.array([13, 6]), "key_value_seq_lengths": np.array([0, 12])},
    "segments": {"query_segment_ids": np.sort(RNG.integers(3, size=(2, 13))), "is_causal": True},
    "mask": {"mask": RNG.random((2, 4, 13, 13)) < 0.4},
    "bias": {"bias": BIAS},
    "scale a head": {"scale": np.array([0.1, 0.2, 0.5, 1.0], np.float32)},
}
RUNNABLE = ["native", "xla", "tokamax:xla_chunked"]


@pytest.fixture
def kernel(request):
    """A kernel by its name; tokamax's own code promotes ranks, and is traced again for its derivatives."""
    if not request.param.startswith("tokamax"):
        yield Fused(implementation=request.param)
        return
    pytest.importorskip("tokamax", reason="needs tokamax: pip install attention-lab[fused]")
    with jax.numpy_rank_promotion("allow"):
        yield Fused(implementation=request.param)


def shifted(method, case: Case, **options) -> float:
    """How far rounding moves the weights of a row, as a sum of absolute differences, at most."""
    return float(np.max(rounding(method, case, **options) / np.linalg.norm(case.value, axis=-1).max()))


PAIRS = [(k, o) for k, o in itertools.product(RUNNABLE, OPTIONS) if (k, o) != ("native", "bias")]


@pytest.mark.parametrize(
    ("kernel", "options"), [(k, OPTIONS[o]) for k, o in PAIRS], ids=map("-".join, PAIRS), indirect=["kernel"]
)
def test_outputs_and_gradients_are_the_oracles(kernel, options):
    one = "causal_alignment" in options
    case = draw(42, T=1 if one else 13, S=13, E=5).astype(jnp.float32)
    cotangent = RNG.standard_normal((2, case.query.shape[1], 4, 5)).astype(np.float32)
    expected, _ = oracle(*case, **options)
    output, actual = run_with_gradients(kernel, case, cotangent, **options)
    error = np.linalg.norm(np.asarray(output) - expected, axis=-1)
    assert np.all(error <= rounding(kernel, case, **options))
    # With b = `shifted`, sum_j |dp_ij| <= b, and dS_ij = p_ij (dP_ij - sum_j p_ij dP_ij) with |dP| <= |d| |v| is off
    # by at most 3 b |d| |v| in a row, 4 b with the rounding of its own products. A gradient sums it over keys for a
    # query, over 13 queries of 2 heads for a key, times |k| or |q|, and beta < 1; that of a value sums b |d| likewise.
    d, v, q, k = (np.linalg.norm(x, axis=-1).max() for x in (cotangent, case.value, case.query, case.key))
    tolerance = 4 * shifted(kernel, case, **options) * d * v * max(k, 26 * q, 26 / v)
    for ours, theirs in zip(actual, oracle_gradients(*case, cotangent, **options), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "law",
    [
        "the_future_does_not_exist",
        "hidden_keys_do_not_exist",
        "padding_does_not_exist",
        "rows_that_see_nothing_are_zero",
        "other_segments_room_does_not_exist",
        "huge_logits_stay_finite",
    ],
)
@pytest.mark.parametrize("kernel", ["tokamax:xla_chunked"], indirect=True)
def test_tokamax_keeps_the_laws_of_visibility(law, kernel):
    LAWS[law](kernel)


@pytest.mark.parametrize("kernel", ["tokamax:xla_chunked"], indirect=True)
def test_tokamax_leaves_the_command_line_alone(kernel, monkeypatch):
    from absl import flags

    flags.FLAGS.unparse_flags()
    monkeypatch.setattr("sys.argv", ["program", "--attention.implementation", "auto"])
    assert jnp.isfinite(attention.dot_product_attention(*SMALL, method=kernel)).all()


def test_splash_is_softmax_attention():
    """In interpret mode: segments that no other side has, lengths down to 0, one key head for two query heads."""
    case = draw(43, T=128, N=2, K=1).astype(jnp.float32)
    options = {
        "query_segment_ids": np.sort(RNG.integers(-2, 3, size=(2, 128))),
        "key_value_segment_ids": RNG.integers(-4, 6, size=(2, 128)),
        "key_value_seq_lengths": np.array([0, 100]),
        "is_causal": True,
    }
    inputs = prepare(Exact(), *case, **options)

    @jax.jit
    def attend(value):
        return splash(dataclasses.replace(inputs, value=value), tabled=False, interpret=True)

    output, pull = jax.vjp(attend, inputs.value)
    expected, weights = oracle(*case, **options)
    error = np.linalg.norm(np.asarray(ungrouped(output, case.query)) - expected, axis=-1)
    assert np.all(error <= rounding(Exact(), case, **options))
    gradient = np.asarray(pull(jnp.ones_like(output))[0][:, 0, :, 0])
    assert not np.any(gradient[0])
    # A sum over the 256 rows of a key's weights, in each of which all weights together move by `shifted` at most.
    np.testing.assert_allclose(gradient, weights.sum((1, 2)), atol=256 * shifted(Exact(), case, **options), rtol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decoding_equals_the_whole(dtype):
    case, extend = draw(44).astype(dtype), jax.jit(Fused().extend)
    expected, _ = oracle(*case, is_causal=True)
    state, outputs, start = Fused().init_state(2, 2, 8, 16, dtype), [], 0
    for size in (11, 1, 1):
        state, output = extend(state, *(x[:, start : start + size] for x in case))
        outputs.append(output)
        start += size
    error = np.linalg.norm(np.asarray(jnp.concatenate(outputs, 1)) - expected, axis=-1)
    assert np.all(error <= rounding(Fused(), case, is_causal=True))


def test_one_query_is_as_causal_as_it_stands():
    case = draw(47, T=1, S=13).astype(jnp.float32)
    inputs = prepare(Fused(), *case, key_value_seq_lengths=np.array([13, 5]))
    mask = dataclasses.replace(inputs.mask, causal=True, offset=jnp.array([3, 8]))
    output = jax.jit(Fused().attend)(dataclasses.replace(inputs, mask=mask))
    lengths = {"key_value_seq_lengths": np.array([4, 5])}
    error = np.linalg.norm(np.asarray(ungrouped(output, case.query)) - oracle(*case, **lengths)[0], axis=-1)
    assert np.all(error <= rounding(Fused(), case, **lengths))


def test_products_of_16_bits_are_summed_in_float32():
    """What `weights_bound` builds on: a sum in bfloat16 would stand still at 256."""
    weights, value = jnp.ones((1, 2, 13, 8192), jnp.bfloat16), jnp.ones((1, 8192, 2, 8), jnp.bfloat16)
    assert np.all(jax.jit(lambda p, v: jnp.einsum("BNTS,BSNH->BTNH", p, v))(weights, value) == 8192)


XLA = Fused(implementation="xla")


@pytest.mark.parametrize("temperature", [np.float32(0.125), np.array([0.125, 1, 2, np.inf], np.float32)])
def test_the_certificate_holds_in_16_bits(temperature):
    """One temperature, which costs the query nothing, and one a head, for which it is rounded."""
    for seed in range(8):
        case = draw(seed, B=8).astype(jnp.bfloat16)
        output, certificate = run(XLA, case, "certified", temperature=temperature)
        expected, _ = oracle(*case, temperature=temperature)
        error = np.linalg.norm(np.asarray(output, np.float64) - expected, axis=-1)
        assert np.all(error <= np.asarray(certificate.error_bound))
        assert np.max(error / certificate.error_bound) > 0.01  # a bound a hundred times too wide says nothing


def test_the_certificate_knows_that_the_query_is_rounded():
    """With one scale a head: 4 numbers rounded down by almost half a unit in the last place and 4 rounded up by it,
    against keys that make the exact logit almost 0 and the rounded one -1.
    """
    unit = 2.0**-7  # that of bfloat16 at 1
    query = np.repeat([1, 1 + unit], 4)[None, None, None]
    key = np.stack([np.repeat([32, -32 * (1 - unit)], 4), np.zeros(8)])[None, :, None]
    value = np.stack([np.ones(8), -np.ones(8)])[None, :, None]
    case, scale = Case(query, key, value).astype(jnp.bfloat16), np.array([1 + 0.4999 * unit], np.float32)
    output, certificate = run(XLA, case, "certified", scale=scale)
    error = np.linalg.norm(np.asarray(output, np.float64) - oracle(*case, scale=scale)[0])
    assert 0.4 * np.sqrt(8) < error <= float(certificate.error_bound.max())


def test_scale_zero_has_a_derivative():
    case = draw(45, B=1).astype(jnp.bfloat16)

    def loss(scale, method):
        return attention.dot_product_attention(*case, method=method, scale=scale).astype(jnp.float32).sum()

    ours, theirs = (jax.grad(loss)(jnp.float32(0), method) for method in (XLA, Exact()))
    # Each of 13 x 4 x 8 terms is a mean over 13 keys of products |q.k| |v| < 40, in weights rounded to 2**-9.
    np.testing.assert_allclose(ours, theirs, atol=13 * 4 * 8 * 40 * 2.0**-9 / 13)


@pytest.mark.accelerator
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_choice_of_this_machine_is_softmax_attention(size, causal):
    """In bfloat16, where it is a kernel of a vendor: within 8 roundoffs of the operands, forward."""
    case = draw(46, B=1, T=256, H=size).astype(jnp.bfloat16)
    inputs = prepare(Fused(), *case, is_causal=causal)
    print(f"\n{jax.devices()[0].device_kind}: {Fused().resolved(inputs)!r}")
    expected, _ = oracle(*case, is_causal=causal)
    error = np.linalg.norm(np.asarray(run(Fused(), case, is_causal=causal), np.float64) - expected, axis=-1)
    # The query is rounded (a logit moves by u |q| |k| beta), the weights (u), and the output (u).
    u, q, k, v = 2.0**-8, *(np.linalg.norm(x.astype(np.float64), axis=-1).max() for x in map(np.asarray, case))
    assert np.all(error <= 2 * u * (q * k / np.sqrt(size) + 2) * v)
