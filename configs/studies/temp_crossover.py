"""Which method is valid at which temperature?

    python -m experiments.study temp_crossover

Nothing is trained but one small language model a seed, whose queries, keys and values are one of the two kinds of
operands; the others are independent standard normal numbers, 2,048 keys of size 64.

Axes: every registered method that is not exact, with the largest budget whose operations do not exceed those of exact
attention, times eight temperatures from 1/8 to 16, where beta is 1 / (sqrt(H) temperature), times three seeds.

Metric: |output - exact output| / |exact output|, in the Frobenius norm; of methods with certificates the share of the
rows whose error is certified to be at most a tenth of the values' radius.

It takes about 5 minutes on 2 CPU cores. `python -m experiments.benchmark temperature` measures the same for one seed,
with the certificates of the methods that have one.

Expected: the error of top-k falls with the temperature, since the weight that it drops does, and that of random
features rises, since as many as e^(1/T) of them are needed (Choromanski et al., arXiv 2009.14794, lemma 2). On standard
normal operands of 256 keys, 16 kept keys or 256 features: top-k 0.054 at T = 1/4 and 3.6 at T = 4, random features 1.45
and 0.43.

Found (docs/results/temp_crossover, 3 seeds): both, and where they cross.

- Standard normal operands: top-k (64 of 2,048 keys) falls from 5.5 at T = 16 to 0.0007 at T = 1/8. Random features rise
  from 0.05 at T = 16 to 4.5 at T = 1; they cross between 1 and 2. Below T = 1 the error of random features falls again,
  to 1.4: too few are drawn to meet the rare projections that make the variance.
- A model's own: top-k falls from 0.94 to 0.0008, 16 random features rise from 0.18 to 1.0; they cross between 2 and 4.
- At no temperature is a linear method within a tenth of the output on normal operands below T = 4, where `Taylor` of
  order 1 is at 0.04, nor top-k above T = 1/4. In between only `Certified` is: up to T = 2 its
  output is that of exact attention, and it certifies all rows at every temperature.
- Nearness counts in a model: `BlockTopK`, off by 0.8 to 1 on normal operands, is within 0.09 at every temperature.
"""

import dataclasses
import functools

from matplotlib.figure import Figure

from experiments.drawing import panels
from experiments.studies import Row, Study, Work
from experiments.study_figures import Summary, chosen, curves, keys_below, powers, values
from experiments.temperature import Temperature

MEASURES = {"error": "relative_error", "certified": "rows_certified_to_0.1"}


def measure(work: Work, benchmark: Temperature, seeds: int) -> list[Row]:
    del work  # nothing is kept
    rows = []
    for seed in range(seeds):
        for result in dataclasses.replace(benchmark, seed=seed).measured():
            for method, found in result["methods"].items():
                axes = {"operands": result["operands"], "method": method.partition("(")[0], "configuration": method}
                measures = {name: found[key] for name, key in MEASURES.items() if key in found}
                for index, temperature in enumerate(result["temperatures"]):
                    numbers = {name: series[index] for name, series in measures.items()}
                    rows.append({"axes": axes | {"temperature": temperature}, "seed": seed, "numbers": numbers})
    return rows


def figure(summary: Summary) -> Figure:
    """Error relative to the exact output over the temperature, each method at the work of exact attention at most. \
Means over seeds, with bands over all of them."""
    drawing, grid = panels(len(values(summary, "operands")), width=5.4, height=4.6, sharey=True)
    methods = values(summary, "method")
    for panel, name in zip(grid, values(summary, "operands"), strict=True):
        rows = chosen(summary, operands=name)
        curves(panel, rows, "temperature", "error", "method", methods)
        powers(panel, values(rows, "temperature"), "temperature")
        panel.set(yscale="log", title=name)
    grid[0].set_ylabel("error / norm of the exact output")
    keys_below(drawing, grid[0], columns=4)
    return drawing


def _study(benchmark: Temperature, seeds: int) -> Study:
    measured = functools.partial(measure, benchmark=benchmark, seeds=seeds)
    return Study(sweep=None, measure=measured, figure=figure)


study = _study(Temperature(lengths=(2048,), context=512), seeds=3)
smoke = _study(Temperature(lengths=(48,), temperatures=(0.5, 4.0), head_size=4, steps=0), seeds=1)
