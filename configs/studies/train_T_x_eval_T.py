# ruff: noqa: N999 (the T of a temperature)
"""What does it cost to evaluate at another temperature than that of the training, with exact attention and without?

    python -m experiments.study train_T_x_eval_T

Axes: five temperatures of training (1/4 to 4) with exact attention, three seeds each: 15 runs of 200 steps of a
byte-level model with 0.1 million parameters on the standard library's sources. Each is evaluated at the same five
temperatures with exact attention, and then with eight others in its place: `TopK` of 8 keys; `BlockTopK` of 2 pages of
4 and what a tile of 4 queries sees of itself; `SlidingWindow` of 6 keys and the first 2; `Certified` within a tenth of
the largest distance of two values; `Taylor` of order 2, `LinearElu`, and `Performer` with 32 and with 256 features.

Metric: the loss held out.

It takes about 8 minutes on 2 CPU cores.

Expected: the diagonal of exact attention is flat, since beta can be undone by the size of queries and keys, and the
loss rises away from it. Raising the temperature of a trained model smooths its weights, which helps random features and
harms top-k; lowering it does the opposite (random features need e^(1/T) of them, Choromanski et al., arXiv 2009.14794,
lemma 2; what top-k drops is bounded by the gap between logits, which grows as 1/T).

Found (docs/results/train_T_x_eval_T, 3 seeds, with deviations of up to 0.17 nats between them):

- The diagonal of exact attention is flat to 0.1 nats (2.47 at T = 1 to 2.57 at T = 4), and the lowest loss of each row
  lies on it. Off it the costs are lopsided: from T = 1, a quarter of the temperature costs 0.02 nats and four times the
  temperature 0.34; a model trained at 1/4 loses 0.48 at T = 4, one trained at 4 loses 0.04 at 1/4.
- Selections cost at most 0.01 (`TopK`), 0.02 (`BlockTopK`) and 0.04 nats (`SlidingWindow`, which looks at no logit) on
  the diagonal and below it, as expected for the first two. Above it, at T of 2 and 4, this differs from the
  expectation: every one of them has a lower loss than exact attention, top-k by 0.23 nats from T = 1 to 4 and by 0.29
  from 1/4 to 4, since without the tail the weights disperse less. More error against exact attention is less loss.
- `Certified` within a tenth of the values' width has the loss of exact attention to 0.001 nats in all 25 cells.
- Sums over all keys are no replacement at any of these temperatures: `Taylor` of order 2 costs 0.22 nats at T = 1 and
  at least 0.19 on the diagonal; `LinearElu`, whose kernel is another, 0.6 to 0.8 there.
- Random features cost 0.51 nats at T = 1 with 32 of them and 0.30 with 256. A lower temperature than that of training
  raises their loss in every row, as expected. A higher one lowers it for models trained at 1/4 or 1/2, up to T = 1 (256
  features: 3.10 to 2.89, trained at 1/4); beyond, the weights disperse and the loss rises again.
"""

import functools

from matplotlib.figure import Figure

import attention
from experiments.axes import product
from experiments.config import Data, Model, Optimizer, Run
from experiments.drawing import power
from experiments.evaluate import at_temperatures, held_out
from experiments.presets import Sweep
from experiments.saved import load
from experiments.studies import SMALL, Row, Study, Work
from experiments.study_figures import Summary, heat_maps

METHODS = (
    "Exact",
    "TopK(k=8)",
    "BlockTopK(blocks=2, block_size=4, query_block=4)",
    "SlidingWindow(window=6, sinks=2)",
    "Certified(tolerance=0.1, page=8)",
    "Taylor(order=2)",
    "LinearElu",
    "Performer(features=32)",
    "Performer(features=256)",
)


def measure(work: Work, temperatures: tuple[float, ...], methods: tuple[str, ...]) -> list[Row]:
    rows = []
    for axes, folder in work.trained():
        factors = tuple(temperature / axes["temperature"] for temperature in temperatures)
        for method in methods:
            saved = load(folder, attention.parse_method(method))
            batches = held_out(saved, saved.run.model.context, saved.run.evaluate_batches)
            found = at_temperatures(saved, batches, factors)
            for temperature, numbers in zip(temperatures, found, strict=True):
                where = {"method": method, "trained at": axes["temperature"], "evaluated at": temperature}
                rows.append({"axes": where, "seed": axes["seed"], "numbers": {"loss": float(numbers["loss"].mean())}})
    return rows


def figure(summary: Summary) -> Figure:
    """Held-out loss after training with exact attention at one temperature and evaluation at another, with the method \
that the panel names. Means, and standard deviations over seeds."""
    label = "held-out loss (nats / byte)"
    return heat_maps(summary, "method", "trained at", "evaluated at", "loss", label, power)


def _study(base: Run, temperatures: tuple[float, ...], seeds: int, methods: tuple[str, ...]) -> Study:
    axes = product(temperature=temperatures, seed=range(seeds))
    measured = functools.partial(measure, temperatures=temperatures, methods=methods)
    return Study(sweep=Sweep(base=base, axes=axes), measure=measured, figure=figure)


_BASE = Run(
    steps=200,
    evaluate_every=200,
    evaluate_batches=16,
    model=Model(layers=2, width=64, heads=4, kv_heads=4, mlp_width=192, context=64),
    data=Data(batch=8),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20),
)
# Powers of two, so that equal betas are equal bits.
study = _study(_BASE, (0.25, 0.5, 1.0, 2.0, 4.0), seeds=3, methods=METHODS)
smoke = _study(SMALL, (0.5, 2.0), seeds=1, methods=("Exact", "TopK(k=2)", "LinearElu"))
