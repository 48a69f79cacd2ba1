"""How sensitive is each scale rule to the learning rate?

    python -m experiments.study lr_x_scale

Axes: six ways to scale the scores (1/sqrt(H), 1/H, a learned scale a head, QK-norm with a learned temperature, SSMax,
and 1/sqrt(H) under a soft cap of 15), times seven peak learning rates from 3e-4 to 3e-1, times three seeds: 126 runs of
150 steps of a byte-level model with 0.1 million parameters on the standard library's sources, in 6 compiled programs.

Metric: the loss held out at the end, and the sensitivity, the mean over learning rates of min(loss, loss before the
first step) - lowest loss, which is 0 where the learning rate does not matter. A run that diverges counts as untrained.

It takes about 8 minutes on 2 CPU cores, by the time of its steps.

Expected: between 3e-4 and 3e-1 QK-norm lowers the sensitivity, and more so the larger the model, since logits grow
with the learning rate where nothing bounds them (Wortsman et al., arXiv 2309.14322, section 3.1, where the sensitivity
is defined in section 2.2); a soft cap bounds them, too (Gemma 2, arXiv 2408.00118, section 2).

Found: nothing yet, the full form has not been run.
"""

from matplotlib.figure import Figure

from experiments.axes import Axes, axis, product
from experiments.config import Data, Model, Optimizer, Run
from experiments.drawing import panels
from experiments.presets import Sweep
from experiments.studies import SMALL, Row, Study, Work
from experiments.study_figures import Summary, curves, intervals, keys_below, powers
from experiments.summary import final, grouped

CAP = 15.0
RULES = Axes(
    (
        *({"model.scale_rule": rule, "soft_cap": None} for rule in ("1/sqrt(H)", "1/H", "learned", "qk-norm", "ssmax")),
        {"model.scale_rule": "1/sqrt(H)", "soft_cap": CAP},
    )
)


def measure(work: Work) -> list[Row]:
    results, rows = work.swept(), []
    series = grouped(results["points"], lambda point: (_rule(point), point["seed"]))
    for (rule, seed), points in series.items():
        losses = []
        for point in points:
            untrained, reached = point["evaluations"][0]["loss"], final(point)
            losses.append(reached if reached < untrained else untrained)  # NaN is not less
            axes = {"rule": rule, "learning rate": point["learning_rate"]}
            numbers = {"loss": losses[-1], "diverged": float(point["diverged_at"] is not None)}
            rows.append({"axes": axes, "seed": seed, "numbers": numbers})
        best = min(losses)
        numbers = {"sensitivity": sum(losses) / len(losses) - best, "lowest loss": best}
        rows.append({"axes": {"rule": rule}, "seed": seed, "numbers": numbers})
    return rows


def _rule(point) -> str:
    axes = point["axes"]
    return axes["model.scale_rule"] + (f", soft cap {axes['soft_cap']:g}" if axes["soft_cap"] else "")


def figure(summary: Summary) -> Figure:
    """Left: loss held out after training over the peak learning rate, at most that of the untrained model; means, \
with bands over all seeds. Right: its mean over the learning rates above its lowest; bars span the seeds."""
    drawing, (left, right) = panels(2, width=5.2, height=4)
    by_rate = [row for row in summary if "learning rate" in row["axes"]]
    curves(left, by_rate, "learning rate", "loss", "rule")
    powers(left, [row["axes"]["learning rate"] for row in by_rate], "peak learning rate")
    left.set_ylabel("held-out loss (nats / byte)")
    intervals(right, [row for row in summary if "learning rate" not in row["axes"]], "rule", "sensitivity")
    right.set_xlabel("sensitivity to the learning rate (nats / byte)")
    keys_below(drawing, left)
    return drawing


def _study(base: Run, rates: list[float], seeds: int, rules: Axes = RULES) -> Study:
    axes = product(rules, axis("optimizer.learning_rate", rates), seed=range(seeds))
    return Study(sweep=Sweep(base=base, axes=axes), measure=measure, figure=figure)


_BASE = Run(
    steps=150,
    evaluate_every=150,
    evaluate_batches=8,
    model=Model(layers=2, width=64, heads=4, kv_heads=4, mlp_width=192, context=64),
    data=Data(batch=8),
    optimizer=Optimizer(warmup_steps=20),
)
study = _study(_BASE, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], seeds=3)
smoke = _study(SMALL, [1e-3, 1e-1], seeds=2, rules=Axes(RULES.points[::5]))
