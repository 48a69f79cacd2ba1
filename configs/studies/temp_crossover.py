"""Which method is valid at which temperature?

    python -m experiments.study temp_crossover

Operands are of four kinds: independent standard normal numbers, 2,048 keys of size 64; and what small language models
attend with, in 512 tokens, that were trained at temperatures of 1/4, 1 and 4, one a seed. At a temperature of 1 a
model attends as it was trained to.

Axes: every registered method that is not exact, with the largest budget whose operations do not exceed those of exact
attention, times eight temperatures from 1/8 to 16, where beta is 1 / (sqrt(H) temperature), of a model times that of
its training; times three seeds.

Metric: |output - exact output| / |exact output|, in the Frobenius norm; of methods with certificates the share of the
rows whose error is certified to be at most a tenth of the values' radius.

It takes about 12 minutes on 2 CPU cores. `python -m experiments.benchmark temperature` measures the same for one seed,
with the certificates of the methods that have one.

Expected: the error of top-k falls with the temperature, since the weight that it drops does, and that of random
features rises, since as many as e^(1/T) of them are needed (Choromanski et al., arXiv 2009.14794, lemma 2). On standard
normal operands of 256 keys, 16 kept keys or 256 features: top-k 0.054 at T = 1/4 and 3.6 at T = 4, random features 1.45
and 0.43.

Found (docs/results/temp_crossover, 3 seeds): both, and where they cross.

- Standard normal operands: top-k (64 of 2,048 keys) falls from 5.5 at T = 16 to 0.0007 at T = 1/8. Random features rise
  from 0.05 at T = 16 to 4.5 at T = 1; they cross between 1 and 2. Below T = 1 the error of random features falls again,
  to 1.4: too few are drawn to meet the rare projections that make the variance.
- Models: what was trained at a lower temperature stays sharp. At its own temperature 64 keys of 512 are off by 0.007,
  0.13 and 0.35 after training at 1/4, 1 and 4, and 16 random features by 0.80, 0.71 and 0.67. They cross between 4 and
  8, 2 and 4, and 2 and 4 times that temperature.
- At no temperature below 4 is a method that sums over all keys within a tenth of the output on normal operands; at 4
  `Taylor` of order 1 is, at 0.04; nor is a selection above 1/4, but for those that read every key. In models none is at
  the temperature of training; `Taylor` is from 16, 8 and 4 times it on, and certifies 0.55, 0.78 and 0.84 of the rows.
- `Certified` at 0.01 is within 0.003 of the output up to T = 4 on normal operands and 0.03 at 8, where all keys are
  taken at once, and within 0.0014 in every model; every row is certified to a tenth, and to the tolerance.
- Nearness counts in a model: `BlockTopK`, off by 0.8 to 1 on normal operands, is within 0.1 at every temperature, and a
  window of 128 keys within 0.3. Hashes, whose buckets need directions that stand out, are off by 0.2 to 0.65.
- The budget is no ruler for two of them: with as many operations as exact attention `Sampled` draws as many keys as
  there are, and so reads all, and two blocks of 256 are all that a model's 512 tokens have (`LocalChunked`).
"""

import dataclasses
import functools

from matplotlib.figure import Figure

import attention
from experiments.axes import product
from experiments.capture import captured
from experiments.config import Data, Model, Run
from experiments.drawing import panels, power, wrapped
from experiments.evaluate import held_out
from experiments.looks import legend_by_family, look_of
from experiments.operand_files import concatenated, operands_of
from experiments.operands import Operands
from experiments.presets import Sweep
from experiments.saved import load
from experiments.studies import SMALL, Row, Study, Work
from experiments.study_figures import Summary, chosen, curves, powers, values
from experiments.temperature import Temperature, errors

MEASURES = {"error": "relative_error", "certified": "rows_certified_to_0.1"}
OWN = [cls for cls in attention.METHODS.values() if cls.__module__.startswith("attention.")]
METHODS = tuple(cls.__name__ for cls in OWN if not cls.capabilities.exact)


def measure(work: Work, benchmark: Temperature, seeds: int, methods: tuple[str, ...]) -> list[Row]:
    rows = []
    for seed in range(seeds):
        for result in dataclasses.replace(benchmark, seed=seed).measured():
            rows += _rows(result, seed)
    for axes, folder in work.trained():
        result = errors(
            attended(folder, axes["temperature"]), benchmark.temperatures, benchmark.budget, (), axes["seed"]
        )
        rows += _rows(result, axes["seed"])
    if missing := set(methods) - {row["axes"]["method"] for row in rows}:
        raise ValueError(f"methods has {sorted(missing)}, which take none of the operands: expected those that do")
    return rows


def attended(folder, temperature: float) -> Operands:
    """What all layers of a finished run attend with on one held-out sequence; layers stand along the batch axis."""
    saved = load(folder)
    name, tokens = (
        f"a model trained at T = {power(temperature)}",
        held_out(saved, saved.run.model.context, 1)[0]["tokens"],
    )
    return concatenated([operands_of(layer, name) for layer in captured(saved, tokens[:1, :-1])])


def _rows(result, seed: int) -> list[Row]:
    rows = []
    for method, found in result["methods"].items():
        axes = {"operands": result["operands"], "method": method.partition("(")[0], "configuration": method}
        measures = {name: found[key] for name, key in MEASURES.items() if key in found}
        for index, temperature in enumerate(result["temperatures"]):
            numbers = {name: series[index] for name, series in measures.items()}
            rows.append({"axes": axes | {"temperature": temperature}, "seed": seed, "numbers": numbers})
    return rows


def figure(summary: Summary) -> Figure:
    """Error relative to the exact output over the temperature, each method at the work of exact attention at most; of \
models over the temperature as a multiple of that of their training. Means over seeds, with bands over all of them."""
    kinds = values(summary, "operands")
    drawing, grid = panels(len(kinds), width=5, height=3.8, columns=2, sharey=True)
    for panel, name in zip(grid, kinds, strict=True):
        rows = chosen(summary, operands=name)
        curves(panel, rows, "temperature", "error", "method", style=look_of)
        powers(panel, values(rows, "temperature"), "temperature")
        panel.set(yscale="log", title=wrapped(name))
    for panel in grid[::2]:
        panel.set_ylabel("error / norm of the exact output")
    legend_by_family(drawing, grid)
    return drawing


def _study(base: Run, benchmark: Temperature, temperatures: tuple[float, ...], seeds: int) -> Study:
    measured = functools.partial(measure, benchmark=benchmark, seeds=seeds, methods=METHODS)
    axes = product(temperature=temperatures, seed=range(seeds))
    return Study(sweep=Sweep(base=base, axes=axes), measure=measured, figure=figure)


_BASE = Run(steps=120, evaluate_every=120, evaluate_batches=1, model=Model(context=512), data=Data(batch=2))
study = _study(_BASE, Temperature(lengths=(2048,), also=(), steps=0), (0.25, 1.0, 4.0), seeds=3)
_FEW = Temperature(lengths=(48,), temperatures=(0.5, 4.0), head_size=4, also=(), steps=0)
smoke = _study(SMALL, _FEW, (1.0,), seeds=1)
