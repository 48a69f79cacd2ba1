"""Which methods recall what they have read, at which width?

    python -m experiments.study mqar_recall

Axes, in multi-query associative recall of 4 pairs in 16 tokens of 16 symbols: exact attention and Performer with 16
features, in each of 2 layers with one head, times widths 16 and 32, times two learning rates, times three seeds: 24
runs of 2,000 steps, in 4 compiled programs. The number of pairs and the temperature stay as they are.

Metric: the share of the questions answered right, at the learning rate whose mean over seeds is highest; the loss.
Each key is asked for once, so that who ignores the keys and answers with the most frequent of the values not yet given
is right 0.61 of the time: 0.41, 0.45, 0.56 and 1 from question to question, with values drawn from 8.

It takes about 7 minutes on 2 CPU cores, by the time of its steps.

Expected: attention solves the task at every width, while methods whose state has a fixed size need a width that grows
with the number of pairs (Arora et al., arXiv 2312.04927, section 4 and figure 2, at 4 to 64 pairs in 64 to 512 tokens
and widths of 64 to 512); recall hangs on the learning rate, which must be swept for each method (Okpekpe and Orvieto,
arXiv 2508.19029).

Found (docs/results/mqar_recall, 3 seeds):

- Exact attention of width 32 solves the task in every seed at a learning rate of 0.01 (1.000). Performer, whose state
  has 16 x 32 numbers a layer, stays at 0.72 there (0.66 to 0.82 over the seeds).
- Both stay at 0.66 at width 16, near to what elimination gives: against the expectation exact attention needs a width,
  too, within 2,000 steps.
- The learning rate decides as much as the method: at 0.003 exact attention does not find the match at width 32 either
  (0.67), and would look no better than Performer (0.71).
"""

import dataclasses

from matplotlib.figure import Figure

import attention
from experiments.axes import axis, product
from experiments.config import Data, Model, Optimizer, Run
from experiments.drawing import panels
from experiments.presets import Sweep
from experiments.studies import SMALL, Row, Study, Work
from experiments.study_figures import Summary, best, chosen, curves, keys_below, powers, values
from experiments.summary import final


def measure(work: Work) -> list[Row]:
    rows = []
    for point in work.swept()["points"]:
        where = point["axes"]
        axes = {
            "method": where["attention"].partition("(")[0],
            "width": where["model.width"],
            "learning rate": point["learning_rate"],
        }
        diverged = point["diverged_at"] is not None
        numbers = {name: None if diverged else final(point, name) for name in ("accuracy", "loss")}
        rows.append({"axes": axes, "seed": point["seed"], "numbers": numbers})
    return rows


def figure(summary: Summary) -> Figure:
    """Share of right answers over the width, at each method's best learning rate, then at each of the learning rates. \
Means over seeds, with bands over all of them."""
    rates = values(summary, "learning rate")
    drawing, grid = panels(1 + len(rates), width=3.8, height=3.4, sharey=True)
    shown = {"best learning rate": best(summary, "learning rate", "accuracy")}
    shown |= {f"learning rate {rate:g}": chosen(summary, **{"learning rate": rate}) for rate in rates}
    for panel, (title, rows) in zip(grid, shown.items(), strict=True):
        curves(panel, rows, "width", "accuracy", "method")
        powers(panel, values(rows, "width"), "width")
        panel.set_title(title)
    grid[0].set(ylabel="share of right answers", ylim=(0, 1.03))
    keys_below(drawing, grid[0])
    return drawing


def _study(base: Run, methods: list[attention.Method], widths: list[int], rates: list[float], seeds: int) -> Study:
    axes = product(
        axis("attention", methods),
        axis("model.width", widths),
        axis("optimizer.learning_rate", rates),
        seed=range(seeds),
    )
    return Study(sweep=Sweep(base=base, axes=axes), measure=measure, figure=figure)


study = _study(
    Run(
        steps=2000,
        evaluate_every=500,
        evaluate_batches=8,
        # Learned positions and one head: with rotary ones, or two heads, exact attention takes more steps to find that
        # it has to look one token back.
        model=Model(layers=2, heads=1, kv_heads=1, mlp_width=64, context=16, positions="learned"),
        data=Data(task="mqar", symbols=16, pairs=4, batch=64),
        optimizer=Optimizer(warmup_steps=50, weight_decay=0.0),
    ),
    methods=[attention.Exact(), attention.Performer(features=16)],
    widths=[16, 32],
    rates=[3e-3, 1e-2],
    seeds=3,
)
smoke = _study(
    dataclasses.replace(SMALL, data=Data(task="mqar", symbols=4, pairs=2, batch=4)),
    methods=[attention.Exact()],
    widths=[16],
    rates=[1e-3, 1e-2],
    seeds=2,
)
