"""No deterministic certificate is broken by any of 10,000 drawn problems, those of trained models among them.

`make campaign` runs it, and `make soundness`, which writes what it finds into `docs/results/soundness`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from captured import with_trained
from flax import nnx
from ratios import over

from attention import Certified, Method, certified_attention
from attention.method import METHODS
from attention.sparse import by_pages, far, kernel, order
from attention.testing.accuracy import most_failures
from attention.testing.cases import Case, families, params_for
from attention.testing.oracle import oracle
from experiments import benchmark, coverage
from experiments.data import validation_batches
from experiments.operand_files import Layer, save
from experiments.saved import load
from experiments.steps import model_graph
from experiments.train import train

pytestmark = pytest.mark.campaign

T, K, N, H = 33, 2, 4, 8
EXAMPLES = [method for cls in METHODS.values() for method in cls.examples()]
SOUND = [method for method in EXAMPLES if method.capabilities.certificate == "deterministic"]
SOUND += [dataclasses.replace(Certified.examples()[0], bound=bound) for bound in ("box", "sketch")]
SOUND += [dataclasses.replace(Certified.examples()[0], page=16)]
PROGRAMS = [(dtype, causal) for dtype in ("float32", "bfloat16") for causal in (False, True)]
BATCHES = -(-10_240 // (16 * len(SOUND) * len(PROGRAMS)))  # of each method and program


class Ways(NamedTuple):
    """Problems that are long enough for more of the ways of Certified, and what takes them.

    Attributes:
        made: B problems of T tokens from a seed.
        B, T: of a batch.
        batches: of each program.
        methods: with pages of 8 and of 16 keys.
    """

    made: Callable[[int, int, int], Case]
    B: int
    T: int
    batches: int
    methods: tuple[Certified, ...]


def runs(seed: int, B: int, T: int, *, shuffled: bool, run: int = 16) -> Case:
    """Runs of tokens 0.1 around centres of size 3; every 29th query is near none. In any order if `shuffled`."""
    rng = np.random.default_rng(seed)
    around = np.repeat(3 * rng.standard_normal((B, -(-T // run), K, H)), run, axis=1)[:, :T]
    query, key = (np.repeat(around, n, axis=2) + 0.1 * rng.standard_normal((B, T, n * K, H)) for n in (N // K, 1))
    query[:, ::29] = rng.standard_normal(query[:, ::29].shape)
    if shuffled:
        query, key = query[:, rng.permutation(T)], key[:, rng.permutation(T)]
    return Case(query, key, rng.standard_normal(key.shape))


def either(seed: int, B: int, T: int, *, shuffled: bool) -> Case:
    """Hard families, and as many problems of runs."""
    both = families(seed, B=B // 2, T=T, K=K, N=N, H=H), runs(seed, B - B // 2, T, shuffled=shuffled)
    return Case(*map(np.concatenate, zip(*both, strict=True)))


def hard(seed: int, B: int, T: int) -> Case:
    return with_trained(families(seed, B=B, T=T, K=K, N=N, H=H), seed)


def by(query_chunk: int, tolerance: float) -> tuple[Certified, ...]:
    return tuple(Certified(tolerance=tolerance, page=page, query_chunk=query_chunk) for page in (8, 16))


WAYS = {
    "moments": Ways(hard, 16, 256, 14, by(48, 0.05)),
    "late": Ways(functools.partial(either, shuffled=False), 8, 640, 8, by(64, 0.02)),
    "sorted": Ways(functools.partial(either, shuffled=True), 4, order.LEAST, 4, by(128, 0.02)),
}


@pytest.fixture(scope="module")
def trained(make_small, text, tmp_path_factory) -> list[Case]:
    """What both layers of models attend with, trained at three temperatures: problems of one sequence each."""
    found, make = [], make_small(text, tmp_path_factory.mktemp("trained") / "runs")
    for temperature in (0.25, 1.0, 4.0):
        model = {"layers": 2, "width": N * H, "heads": N, "kv_heads": K, "context": T}
        run = make(name=f"T{temperature:g}", temperature=temperature, steps=300, model=model)
        train(run)
        saved = load(run.folder / run.name)
        graph = nnx.merge(model_graph(saved.run), saved.parameters, saved.constants)
        for batch in validation_batches(saved.run):
            _, layers = nnx.jit(lambda model, tokens: model.observed(tokens))(graph, batch["tokens"][:, :T])
            for operands in layers:
                found += [Case(*(np.asarray(x[b]) for x in operands)) for b in range(len(operands[0]))]
    return found


@functools.partial(jax.jit, static_argnames=("method", "causal"))
def attended(case, temperature, params, method, causal):
    return certified_attention(*case, method=method, params=params, temperature=temperature, is_causal=causal)


def problems(seed: int, trained: list[Case]) -> Case:
    """Fourteen problems of the hard families, and two of trained models."""
    case = families(seed, B=16, T=T, K=K, N=N, H=H)
    for b, of in enumerate(np.random.default_rng(seed).choice(len(trained), 2, replace=False)):
        for x, own in zip(case, trained[of], strict=True):
            x[-1 - b] = own
    return case


def ratios(method: Method, case: Case, seed: int, causal: bool) -> list[float]:
    """The error over its bound in each problem's worst row, at a temperature from 1/8 to 8."""
    temperature = np.float32(2.0 ** np.random.default_rng(seed).uniform(-3, 3))
    output, certificate = attended(case, temperature, params_for(method, case), method, causal)
    expected, _ = oracle(*case, temperature=temperature, is_causal=causal)
    error = np.linalg.norm(np.asarray(output).astype(np.float64) - expected, axis=-1)
    assert certificate.kind == "deterministic"
    assert np.isfinite(error).all()
    return over(error, np.asarray(certificate.error_bound, np.float64)).max((1, 2)).tolist()


def label(method: Method) -> str:
    """The class, and of Certified what tells one from another."""
    name = type(method).__name__
    return f"{name}, {method.bound}, page {method.page}" if isinstance(method, Certified) else name


def held(method: Method, made: Callable[[int], Case], seeds, dtype, causal, record_ratios, problems: str) -> None:
    """No certificate is broken by the problems of these seeds; what they come to is taken down."""
    found = {seed: ratios(method, made(seed).astype(dtype), seed, causal) for seed in seeds}
    of = {"method": label(method), "dtype": dtype, "causal": causal, "kind": "deterministic", "problems": problems}
    record_ratios({"output": [x for some in found.values() for x in some]}, **of)
    for seed, some in found.items():
        assert max(some) <= 1, f"seed {seed}: the error is {max(some):.3g} of its bound"


@pytest.mark.parametrize(("dtype", "causal"), PROGRAMS)
@pytest.mark.parametrize("method", SOUND, ids=repr)
def test_no_certificate_is_broken(method, dtype, causal, trained, record_ratios):
    causal = causal and method.capabilities.causal
    first = BATCHES * (len(PROGRAMS) * SOUND.index(method) + PROGRAMS.index((dtype, causal)))
    made = functools.partial(problems, trained=trained)
    held(method, made, range(first, first + BATCHES), dtype, causal, record_ratios, f"{T} tokens")


@pytest.mark.parametrize(("dtype", "causal"), PROGRAMS)
@pytest.mark.parametrize("page", range(2))
@pytest.mark.parametrize("way", WAYS)
def test_no_certificate_is_broken_in_any_way_of_certified(way, page, dtype, causal, record_ratios, monkeypatch):
    made, B, T, batches, methods = WAYS[way]
    without_kernel(monkeypatch, way)
    first = 100_000 + batches * (len(PROGRAMS) * page + PROGRAMS.index((dtype, causal)))
    seeds = range(first, first + batches)
    held(methods[page], lambda seed: made(seed, B, T), seeds, dtype, causal, record_ratios, f"{T} tokens")


def without_kernel(monkeypatch, way: str) -> None:
    """Rows are late where JAX reads them: the kernel in C has no need of it."""
    if way == "late":
        monkeypatch.setattr(kernel, "able", lambda *_: False)


def planted(monkeypatch, way: str) -> None:
    """A mistake that no other way makes: outputs off by a part in five, their certificates as they were."""
    module, name = {"moments": (far, "attended"), "late": (by_pages, "_late"), "sorted": (order, "_moved")}[way]
    true = getattr(module, name)

    def wrong(*given, **options):
        if way == "sorted":
            return true(*given, **options) * (1.2 if given[0].ndim == 3 else 1)  # queries and outputs, no bounds
        found, *rest = true(*given, **options)
        return ([1.2 * found[0], *found[1:]] if way == "late" else 1.2 * found, *rest)

    monkeypatch.setattr(module, name, wrong)


@pytest.mark.parametrize("way", WAYS)
def test_problems_are_long_enough_for_each_way(way, monkeypatch):
    """A mistake in it is caught by two batches, at temperatures of 1.7 and 3.6, which hold without it."""
    made, B, T, _, (_, method) = WAYS[way]

    def worst(method: Method) -> float:
        return max(max(ratios(method, made(seed, B, T).astype("float32"), seed, way == "late")) for seed in (5, 7))

    without_kernel(monkeypatch, way)
    assert worst(method) <= 1
    planted(monkeypatch, way)
    assert worst(dataclasses.replace(method, tolerance=1.001 * method.tolerance)) > 1  # a program of its own


def test_coverage_is_measured(tmp_path, capsys):
    """On drawn families, and on a file of two heads that share the keys of one; what models have is in `trained`."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((1, 64, 2, 4)), *rng.standard_normal((2, 1, 64, 1, 4))
    save(tmp_path / "run.safetensors", [Layer(query=query, key=key, value=value, beta=np.full(2, 0.5))], "a run")
    options = "--tokens 96 --head-size 4 --samples 16 --temperatures 8 --draws 64 --operands"
    command = ["coverage", *options.split(), str(tmp_path / "run.safetensors"), "--out", str(tmp_path / "coverage")]
    benchmark.main(command)
    cells = json.loads((tmp_path / "coverage" / "results.json").read_text())["cells"]
    assert [cell["family"] for cell in cells] == [*coverage.FAMILIES, "a run, layer 0"] * 2
    for cell in cells:
        low, high = cell["interval"]
        assert low <= cell["failures"] / cell["draws"] <= high
        assert cell["failures"] <= most_failures(cell["draws"], 0.95)
        assert 0 < cell["error"]["median"] < cell["bound"]["median"]
    assert (tmp_path / "coverage" / "coverage.png").exists()
    assert "a run, layer 0" in capsys.readouterr().out
