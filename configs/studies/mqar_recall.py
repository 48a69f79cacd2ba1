"""Which methods recall what they have read: at which width, of how many pairs, at which temperature?

    python -m experiments.study mqar_recall --population vmap --lanes 12

Axes, in multi-query associative recall in 16 tokens of 16 symbols, by 2 layers of one head each: exact attention and
Performer with 16 features, times widths 16 and 32, times 2 and 4 pairs, times four temperatures of training and
evaluation, times three seeds, at a learning rate of 0.01; at 0.03 too with exact attention, and with Performer at width
32 with 4 pairs: 156 runs of 1,500 steps, in 8 compiled programs. "Best" is the highest mean over the seeds, of 8
settings for exact attention, of 4 for Performer, and of 8 for it at width 32 with 4 pairs: the cell that is compared.

Metric: the share of the questions answered right, and the loss. Each key is asked for once, so that who ignores the
keys and answers with the most frequent of the values not yet given is right 0.78 of the time with 2 pairs and 0.61 of
it with 4 (`guessed`); `recall` is what is left of the way from there to 1.

It takes about 55 minutes, by the time of its steps, on 2 CPU cores that others use too.

Expected: attention solves the task at every width, while methods whose state has a fixed size need a width that grows
with the number of pairs (Arora et al., arXiv 2312.04927, section 4 and figure 2, at 4 to 64 pairs in 64 to 512 tokens
and widths of 64 to 512); recall hangs on the learning rate, which must be swept for each method (Okpekpe and Orvieto,
arXiv 2508.19029). Of the temperature nothing is known here: a trained query can make up for it, if training lets it.

Found (docs/results/mqar_recall, means over 3 seeds):

- Exact attention solves the task where the fixed state does not, as expected: 4 pairs at width 32 in every seed
  (1.000, at a rate of 0.03 and temperatures of 1 and 2), where Performer, whose state has 16 x 32 numbers a layer,
  comes to 0.72 at best (0.65 to 0.86 over the seeds); 2 pairs at width 16 in every seed (0.999, at 0.01 and 2), where
  Performer has 0.88.
- With 4 pairs exact attention needs a width: 0.72 at 16 (0.64 to 0.85), against the expectation, within 1,500 steps.
- Fewer pairs are no easier to learn, against the expectation: with 2 pairs at width 32 exact attention ends at 0.90 at
  best, and Performer at 0.82. What is left to gain over elimination is half as much. What limits all but the best runs
  is finding the match, not the room for it: most end on a plateau, at 0.66 with 4 pairs and 0.82 with 2.
- The temperature decides, and with the learning rate: with 4 pairs at width 32 exact attention has 0.88, 0.96, 0.66
  and 0.66 at temperatures of 1/2, 1, 2 and 4 at a rate of 0.01, and 0.37, 1.000, 1.000 and 0.88 at 0.03. The sharpest
  does not train at the higher rate; the flatter ones do not leave the plateau at the lower one.
- Performer does best at the temperatures of 2 and 4 in three of four cells, where its features are good estimates, and
  at a rate of 0.03 no better than on the plateau.
"""

import dataclasses
import itertools

from matplotlib.figure import Figure

import attention
from experiments.axes import Axes, axis, either, product
from experiments.config import Data, Model, Optimizer, Run
from experiments.drawing import panels
from experiments.presets import Sweep
from experiments.studies import SMALL, Row, Study, Work
from experiments.study_figures import Summary, best, chosen, curves, keys_below, powers, values
from experiments.summary import final


def measure(work: Work) -> list[Row]:
    results, rows = work.swept(), []
    for point in results["points"]:
        where = point["axes"]
        axes = {
            "method": where["attention"].partition("(")[0],
            "width": where["model.width"],
            "pairs": where["data.pairs"],
            "learning rate": point["learning_rate"],
            "temperature": point["temperature"],
        }
        diverged = point["diverged_at"] is not None
        numbers = {name: None if diverged else final(point, name) for name in ("accuracy", "loss")}
        chance = guessed(where["data.pairs"], results["config"]["data"]["symbols"] // 2)
        right = numbers["accuracy"]
        numbers["recall"] = None if right is None or chance == 1 else (right - chance) / (1 - chance)
        rows.append({"axes": axes, "seed": point["seed"], "numbers": numbers})
    return rows


def guessed(pairs: int, symbols: int) -> float:
    """The share of right answers of who knows which values are left, but not whose they are.

    Of r values left, drawn from `symbols`, the most frequent is that of the key asked for with a probability of its
    number over r; r falls from `pairs` to 1.
    """
    shares = []
    for left in range(1, pairs + 1):
        draws = itertools.product(range(symbols), repeat=left)
        shares.append(sum(max(map(draw.count, draw)) for draw in draws) / symbols**left / left)
    return sum(shares) / pairs


def figure(summary: Summary) -> Figure:
    """Recall beyond guessing over the width, at the best learning rate and temperature; at the largest width over the \
learning rate and over the temperature, at the best of the other. Means over seeds, with bands over all of them."""
    drawing, grid = panels(3, width=3.8, height=3.6, sharey=True)
    lines = [row | {"axes": _line(row["axes"])} for row in summary]
    widest = chosen(lines, width=max(values(lines, "width")))
    shown = {
        "width": best(best(lines, "learning rate", "recall"), "temperature", "recall"),
        "learning rate": best(widest, "temperature", "recall"),
        "temperature": best(widest, "learning rate", "recall"),
    }
    for panel, (name, rows) in zip(grid, shown.items(), strict=True):
        curves(panel, rows, name, "recall", "line")
        powers(panel, values(rows, name), name)
    for panel in grid[1:]:
        panel.set_title(f"width {max(values(lines, 'width'))}")
    grid[0].set(ylabel="recall beyond guessing", title="best learning rate and temperature")
    keys_below(drawing, grid[0], columns=4)
    return drawing


def _line(axes: dict[str, object]) -> dict[str, object]:
    """The axes of a row with method and pairs as one, which is a line of the figure."""
    others = {name: value for name, value in axes.items() if name not in ("method", "pairs")}
    return {"line": f"{axes['method']}, {axes['pairs']} pairs", **others}


def _axes(
    method: attention.Method, widths: list[int], pairs: list[int], rates: list[float], temperatures: list[float]
) -> Axes:
    return product(
        axis("attention", [method]),
        axis("model.width", widths),
        axis("data.pairs", pairs),
        axis("optimizer.learning_rate", rates),
        temperature=temperatures,
        seed=range(3),
    )


TEMPERATURES = [0.5, 1.0, 2.0, 4.0]
study = Study(
    sweep=Sweep(
        base=Run(
            steps=1500,
            evaluate_every=500,
            evaluate_batches=8,
            # Learned positions and one head: with rotary ones, or two heads, exact attention takes more steps to find
            # that it has to look one token back.
            model=Model(layers=2, heads=1, kv_heads=1, mlp_width=64, context=16, positions="learned"),
            data=Data(task="mqar", symbols=16, batch=64, pairs=4),
            optimizer=Optimizer(warmup_steps=50, weight_decay=0.0),
        ),
        axes=either(
            _axes(attention.Exact(), [32, 16], [4, 2], [1e-2, 3e-2], TEMPERATURES),
            _axes(attention.Performer(features=16), [32, 16], [4, 2], [1e-2], TEMPERATURES),
            _axes(attention.Performer(features=16), [32], [4], [3e-2], TEMPERATURES),
        ),
    ),
    measure=measure,
    figure=figure,
)
smoke = Study(
    sweep=Sweep(
        base=dataclasses.replace(SMALL, data=Data(task="mqar", symbols=4, pairs=2, batch=4)),
        axes=either(
            _axes(attention.Exact(), [16], [2], [1e-3, 1e-2], [1.0]),
            _axes(attention.Performer(features=4), [16], [2], [1e-2], [1.0]),
        ),
    ),
    measure=measure,
    figure=figure,
)
