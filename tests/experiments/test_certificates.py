"""No deterministic certificate is broken by any of 10,000 drawn problems, those of trained models among them.

`make campaign` runs it, or `pytest -m campaign tests/experiments/test_certificates.py`.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from attention import Certified, certified_attention
from attention.method import METHODS
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

B, T, K, N, H = 16, 33, 2, 4, 8
EXAMPLES = [method for cls in METHODS.values() for method in cls.examples()]
SOUND = [method for method in EXAMPLES if method.capabilities.certificate == "deterministic"]
SOUND += [dataclasses.replace(Certified.examples()[0], bound=bound) for bound in ("box", "sketch")]
PROGRAMS = [(dtype, causal) for dtype in ("float32", "bfloat16") for causal in (False, True)]
BATCHES = -(-10_240 // (B * len(SOUND) * len(PROGRAMS)))  # of each method and program


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
    case = families(seed, B=B, T=T, K=K, N=N, H=H)
    for b, of in enumerate(np.random.default_rng(seed).choice(len(trained), 2, replace=False)):
        for x, own in zip(case, trained[of], strict=True):
            x[B - 1 - b] = own
    return case


@pytest.mark.parametrize(("dtype", "causal"), PROGRAMS)
@pytest.mark.parametrize("method", SOUND, ids=repr)
def test_no_certificate_is_broken(method, dtype, causal, trained, record_property):
    """Temperatures from 1/8 to 8; a case's ratio is that of its worst row."""
    ratios, causal = [], causal and method.capabilities.causal
    first = BATCHES * (len(PROGRAMS) * SOUND.index(method) + PROGRAMS.index((dtype, causal)))
    for seed in range(first, first + BATCHES):
        temperature = np.float32(2.0 ** np.random.default_rng(seed).uniform(-3, 3))
        case = problems(seed, trained).astype(dtype)
        output, certificate = attended(case, temperature, params_for(method, case), method, causal)
        expected, _ = oracle(*case, temperature=temperature, is_causal=causal)
        error = np.linalg.norm(np.asarray(output).astype(np.float64) - expected, axis=-1)
        bound = np.asarray(certificate.error_bound, np.float64)
        assert certificate.kind == "deterministic"
        assert np.isfinite(error).all()
        assert np.all(error <= bound), f"seed {seed}: {np.max(error - bound):.3g} above the bound"
        ratios += (error / np.where(bound > 0, bound, 1)).max((1, 2)).tolist()
    record_property("error / bound", {type(method).__name__: ratios})


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
