"""Which methods recall at which width: multi-query associative recall.

    python -m experiments.study mqar_recall

Axes: exact attention and Performer with 32 features, in every layer, times widths 16, 32 and 64 with two heads, times 4
and 8 pairs in 32 tokens, times two learning rates, times three seeds; and at width 32 with 4 pairs the temperatures 1/2
and 2 beside 1. 84 runs of 1,000 steps, in 12 compiled programs.

Metric: the share of the questions answered right, at the learning rate whose mean over seeds is highest; the loss.
Guessing among the values of a sequence is right 1/4 or 1/8 of the time.

It takes about 25 minutes on 2 CPU cores.

Expected: attention solves the task at every width, while methods whose state has a fixed size need a width that grows
with the number of pairs (Arora et al., arXiv 2312.04927, section 4 and figure 2, at 4 to 64 pairs in 64 to 512 tokens
and widths of 64 to 512); recall hangs on the learning rate, which must be swept for each method (Okpekpe and Orvieto,
arXiv 2508.19029). Performer's error grows as the temperature falls, so that a low one, which makes recall sharper,
should help exact attention alone.
"""

import dataclasses

from matplotlib.figure import Figure

import attention
from experiments.axes import Axes, axis, product
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
            "pairs": where["data.pairs"],
            "width": where["model.width"],
            "temperature": point["temperature"],
            "learning rate": point["learning_rate"],
        }
        diverged = point["diverged_at"] is not None
        numbers = {name: None if diverged else final(point, name) for name in ("accuracy", "loss")}
        rows.append({"axes": axes, "seed": point["seed"], "numbers": numbers})
    return rows


def figure(summary: Summary) -> Figure:
    """Share of right answers at each method's best learning rate, over the width at temperature 1, a panel for each \
number of pairs, and over the temperature. Means over seeds, with bands over all of them."""
    rows = best(summary, "learning rate", "accuracy")
    pairs = values(rows, "pairs")
    drawing, grid = panels(len(pairs) + 1, width=3.8, height=3.4, sharey=True)
    for panel, count in zip(grid, pairs, strict=False):
        shown = chosen(rows, pairs=count, temperature=1.0)
        curves(panel, shown, "width", "accuracy", "method")
        powers(panel, values(shown, "width"), "width")
        panel.set_title(f"{count} pairs")
    swept = [row for row in rows if row["axes"]["temperature"] != 1.0]
    (width,), (count,) = values(swept, "width"), values(swept, "pairs")
    shown = chosen(rows, width=width, pairs=count)
    curves(grid[-1], shown, "temperature", "accuracy", "method")
    powers(grid[-1], values(shown, "temperature"), "temperature of training")
    grid[-1].set_title(f"{count} pairs, width {width}")
    grid[0].set(ylabel="share of right answers", ylim=(0, 1.03))
    keys_below(drawing, grid[0])
    return drawing


def _study(base: Run, methods, widths, pairs, rates, temperatures, seeds: int) -> Study:
    common = product(axis("optimizer.learning_rate", rates), seed=range(seeds))
    sizes = product(axis("model.width", widths), axis("data.pairs", pairs))
    one = product(axis("model.width", widths[-2:-1]), axis("data.pairs", pairs[:1]))
    parts = (
        product(product(attention=methods), sizes, product(temperature=[1.0]), common),
        product(product(attention=methods), one, product(temperature=temperatures), common),
    )
    axes = Axes(tuple(point for part in parts for point in part.points))
    return Study(sweep=Sweep(base=base, axes=axes), measure=measure, figure=figure)


_BASE = Run(
    steps=1000,
    evaluate_every=250,
    evaluate_batches=8,
    model=Model(layers=2, width=32, heads=2, kv_heads=2, mlp_width=64, context=32),
    data=Data(task="mqar", symbols=32, batch=64),
    optimizer=Optimizer(warmup_steps=20),
)
METHODS = [attention.Exact(), attention.Performer(features=32)]
study = _study(_BASE, METHODS, [16, 32, 64], [4, 8], [3e-3, 1e-2], [0.5, 2.0], seeds=3)
_TINY = dataclasses.replace(SMALL, data=Data(task="mqar", symbols=8, batch=4))
smoke = _study(_TINY, METHODS[:1], [8, 16], [2], [1e-2], [2.0], seeds=1)
