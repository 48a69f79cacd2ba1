"""Does a small model park attention on its first token, and what do a gate and the temperature change?

    python -m experiments.study sinks

Axes: softmax attention with and without a gate on the outputs of its heads, times three temperatures of training, times
three seeds: 18 runs of 400 steps of a byte-level model of 3 layers with 0.2 million parameters on the standard
library's sources, in 2 compiled programs. Sequences are cut from the text anywhere and have no token that marks a
beginning.

Metric: the weight on position 0, mean over queries, heads and layers, and that of the head with the most; the loss.
Weights spread evenly over the visible keys would give H_T / T, 0.074 at T = 64, with H_T = 1 + 1/2 + ... + 1/T.

It takes about 4 minutes on 2 CPU cores.

Expected: sinks appear at position 0 after enough optimisation on enough data, without a token of beginning too, in
models from 60 million parameters on (Gu et al., arXiv 2410.10781, sections 3 and 4); a sigmoid gate after attention
lowers the mean weight on the first token from 46.7% to 4.8% (Qiu et al., arXiv 2505.06708, section 4.3). At the size
here a null result is likely.

Found (docs/results/sinks, 3 seeds): a null result. The mean weight on position 0 falls from 0.075 before training to
0.045 to 0.047 after it, below that of weights all alike, at each of the three temperatures; the head with the most has
0.071 to 0.080, about as much as weights all alike. A gate does not lower the mean: it is 0.050 to 0.052, at temperature
1 above every seed without a gate. It does lower the loss, by 0.01 nats at temperature 1/2, 0.04 at 1 and 0.06 at 2,
with deviations of 0.01 to 0.03 between seeds. Against the literature these models are 300 times smaller and have read
0.2 million bytes, where those with sinks read billions of tokens: what a gate does to a sink cannot be told where there
is none.
"""

import math
import statistics

from matplotlib.figure import Figure

from experiments.axes import axis, product
from experiments.config import Data, Model, Optimizer, Run
from experiments.drawing import level, panels
from experiments.presets import Sweep
from experiments.studies import SMALL, Row, Study, Work
from experiments.study_figures import Summary, chosen, curves, keys_below, powers, values

UNIFORM = "weights all alike"


def measure(work: Work) -> list[Row]:
    results, rows = work.swept(), []
    context = results["config"]["model"]["context"]
    rows.append({"axes": {"attention": UNIFORM}, "seed": 0, "numbers": {"mean head": uniform(context)}})
    for point in results["points"]:
        axes = {
            "attention": "gated" if point["axes"]["model.gated"] else "softmax",
            "temperature": point["temperature"],
        }
        for evaluation in point["evaluations"]:
            masses = evaluation["sink_mass"]
            heads = [mass for layer in masses for mass in layer]
            numbers = {"mean head": statistics.fmean(heads), "largest head": max(heads), "loss": evaluation["loss"]}
            rows.append({"axes": axes | {"step": evaluation["step"]}, "seed": point["seed"], "numbers": numbers})
        for depth, layer in enumerate(masses):
            numbers = {"layer's mean": statistics.fmean(layer), "layer's largest": max(layer)}
            rows.append({"axes": axes | {"layer": depth}, "seed": point["seed"], "numbers": numbers})
    return rows


def uniform(context: int) -> float:
    """The weight on position 0, mean over causal queries, of weights that are all alike."""
    return math.fsum(1 / n for n in range(1, context + 1)) / context


def figure(summary: Summary) -> Figure:
    """Weight on position 0 during training at temperature 1, after it over the temperature of training (mean of the \
heads, and the head with the most), by layer, and the loss. Means over seeds, with bands over all of them."""
    drawing, grid = panels(4, width=3.4, height=3.2)
    steps = [row for row in summary if "step" in row["axes"]]
    last = chosen(steps, step=max(values(steps, "step")))
    even = chosen(summary, attention=UNIFORM)[0]["numbers"]["mean head"]["mean"]
    curves(grid[0], chosen(steps, temperature=1.0), "step", "mean head", "attention")
    grid[0].set(title="mean head, at temperature 1", xlabel="step", ylabel="weight on position 0")
    for panel, number in zip(grid[1:], ("mean head", "largest head", "loss"), strict=True):
        curves(panel, last, "temperature", number, "attention")
        powers(panel, values(last, "temperature"), "temperature of training")
        panel.set_title({"loss": "held-out loss (nats / byte)"}.get(number, f"{number}, after training"))
    for panel in grid[:3]:
        panel.set_ylim(0, 1.15 * max(panel.get_ylim()[1], even))
        level(panel, even, ":", UNIFORM if panel is grid[0] else "")
    keys_below(drawing, grid[1])
    return drawing


def _study(base: Run, temperatures: list[float], seeds: int) -> Study:
    axes = product(axis("model.gated", [False, True]), temperature=temperatures, seed=range(seeds))
    return Study(sweep=Sweep(base=base, axes=axes), measure=measure, figure=figure)


_BASE = Run(
    steps=400,
    evaluate_every=100,
    evaluate_batches=8,
    model=Model(layers=3, width=64, heads=4, kv_heads=4, mlp_width=192, context=64),
    data=Data(batch=8),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=30),
)
study = _study(_BASE, [0.5, 1.0, 2.0], seeds=3)
smoke = _study(SMALL, [0.5, 1.0], seeds=2)
