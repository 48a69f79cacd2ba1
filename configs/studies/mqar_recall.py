"""Which methods recall what they have read, at which width?

    python -m experiments.study mqar_recall

Axes, in multi-query associative recall: exact attention and Performer with 32 features, in every layer, times widths
16, 32 and 64 with two heads, times 4 and 8 pairs in 32 tokens, times two learning rates, times three seeds; and at
width 32 with 4 pairs the temperatures 1/2 and 2 beside 1. 96 runs of 4,000 steps, in 12 compiled programs.

Metric: the share of the questions answered right, at the learning rate whose mean over seeds is highest; the loss.
Guessing among the values of a sequence is right 1/4 or 1/8 of the time.

It takes about 70 minutes on 2 CPU cores, by the time of its steps.

Expected: attention solves the task at every width, while methods whose state has a fixed size need a width that grows
with the number of pairs (Arora et al., arXiv 2312.04927, section 4 and figure 2, at 4 to 64 pairs in 64 to 512 tokens
and widths of 64 to 512); recall hangs on the learning rate, which must be swept for each method (Okpekpe and Orvieto,
arXiv 2508.19029). Performer's error grows as the temperature falls, so that a low one, which makes recall sharper,
should help exact attention alone.

Found: nothing yet, the full form has not been run. Single trials with exact attention answered 40% right after 1,000
steps with 8 pairs at width 32, so that fewer steps than these would compare methods before any of them recalls.
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


def _study(base: Run, sizes: Axes, tempered: Axes, rates: list[float], seeds: int) -> Study:
    common = product(axis("optimizer.learning_rate", rates), seed=range(seeds))
    parts = product(sizes, product(temperature=[1.0]), common).points + product(tempered, common).points
    return Study(sweep=Sweep(base=base, axes=Axes(parts)), measure=measure, figure=figure)


def _sizes(methods: tuple[attention.Method, ...], widths: list[int], pairs: list[int]) -> Axes:
    return product(axis("attention", methods), axis("model.width", widths), axis("data.pairs", pairs))


METHODS: tuple[attention.Method, ...] = (attention.Exact(), attention.Performer(features=32))
study = _study(
    Run(
        steps=4000,
        evaluate_every=500,
        evaluate_batches=8,
        model=Model(layers=2, width=32, heads=2, kv_heads=2, mlp_width=64, context=32),
        data=Data(task="mqar", symbols=32, batch=64),
        optimizer=Optimizer(warmup_steps=20),
    ),
    sizes=_sizes(METHODS, [16, 32, 64], [4, 8]),
    tempered=product(_sizes(METHODS, [32], [4]), temperature=[0.5, 2.0]),
    rates=[1e-3, 3e-3],
    seeds=3,
)
smoke = _study(
    dataclasses.replace(SMALL, data=Data(task="mqar", symbols=4, pairs=2, batch=4)),
    sizes=_sizes(METHODS[:1], [16], [2]),
    tempered=product(_sizes(METHODS[:1], [16], [2]), temperature=[2.0]),
    rates=[1e-3, 1e-2],
    seeds=2,
)
