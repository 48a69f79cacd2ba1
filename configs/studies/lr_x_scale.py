"""How sensitive is each scale rule to the learning rate?

    python -m experiments.study lr_x_scale

Axes: eight ways to bound or scale the scores (1/sqrt(H), 1/H, a learned scale a head, QK-norm with a learned
temperature, SSMax, and 1/sqrt(H) under a soft cap of 15, with sigma-reparametrised projections, and with a gate on the
outputs of heads), times seven peak learning rates from 3e-4 to 3e-1, times three seeds: 168 runs of 150 steps of a
byte-level model with 0.1 million parameters on the standard library's sources, in 8 compiled programs.

Metric: the loss held out and the largest logit at the end, and the sensitivity, the mean over learning rates of
min(loss, loss before the first step) - lowest loss, which is 0 where the learning rate does not matter. A run that
diverges counts as untrained.

It takes about 6 minutes on 2 CPU cores.

Expected: between 3e-4 and 3e-1, after 100,000 steps, QK-norm lowers the sensitivity considerably and trains to a low
loss at high rates, and more so the larger the model, since logits grow with the learning rate where nothing bounds them
(Wortsman et al., arXiv 2309.14322, section 3.1, where the sensitivity is defined in section 2.2); a soft cap bounds
them, too (Gemma 2, arXiv 2408.00118, section 2), and beside QK-norm takes 1.5 times its rate without diverging
(Rybakov et al., arXiv 2410.16682, at 830 million parameters). At twice the usual rate a plain vision transformer's
entropy falls to nearly 0 and it diverges; the least entropy falls exponentially in the spectral norm of the logits,
which sigma-reparametrisation bounds: it trains without warm-up (Zhai et al., arXiv 2303.06296, sections 1 and 3). A
sigmoid gate after attention tolerates larger rates (Qiu et al., arXiv 2505.06708, abstract).

Found (docs/results/lr_x_scale, 3 seeds): none of the 168 runs diverged. The best loss of the six rules for scores is
the same within the seeds' spread, 2.46 to 2.48 at a rate of 0.01 (1/H: 2.51); with sigma-reparametrisation it is 2.43,
and with a gate, which has more parameters, 2.42.

- QK-norm tolerates a higher rate, as expected: its sensitivity is 0.249 nats (0.225 to 0.278 over the seeds), that of
  1/sqrt(H) 0.324 (0.284 to 0.346). At a rate of 0.1, ten times the best, it loses 0.04 nats against its best and
  1/sqrt(H) loses 0.27; at 0.3 they stand at 2.65 and 2.91.
- Sigma-reparametrisation tolerates the highest: its best rate is 0.03, and at 0.1 and 0.3 it loses 0.01 and 0.03
  against that, where every other rule loses 0.04 to 0.34 and 0.19 to 0.51. It also bounds values and outputs, whose
  projections it reparametrises too. Its sensitivity, 0.285 (0.274 to 0.295), is above that of QK-norm because it loses
  0.1 at 0.003 and 0.01.
- A gate has a sensitivity of 0.290 (0.266 to 0.303) and loses 0.20 at 0.1, less than plain scaling, as expected,
  although its logits grow as far.
- The reason is that of the literature: the largest logit of 1/sqrt(H) grows from 30 at a rate of 0.01 to 15,000 at 0.3,
  and that of a learned scale or of SSMax further, while QK-norm keeps it at 11 to 14 and sigma-reparametrisation at 18
  at most.
- A soft cap of 15 helps at 0.3 alone (2.79), and its sensitivity, 0.319, is that of plain scaling: less than expected.
  From 0.03 on its logits stand at the cap, where tanh has hardly a slope: what lies behind them is not held back.
- All rules share the loss of too small a rate, 3.60 to 3.65 at 3e-4 after 150 steps, which is most of every
  sensitivity.
"""

import math

from matplotlib.figure import Figure

from experiments.axes import Axes, axis, product
from experiments.config import Data, Model, Optimizer, Run
from experiments.drawing import panels
from experiments.presets import Sweep
from experiments.studies import SMALL, Row, Study, Work
from experiments.study_figures import Summary, curves, intervals, keys_below, powers
from experiments.summary import final, grouped

CAP = 15.0
PLAIN = {"model.scale_rule": "1/sqrt(H)", "soft_cap": None, "model.spectral": False, "model.gated": False}
RULES = Axes(
    (
        *(PLAIN | {"model.scale_rule": rule} for rule in ("1/sqrt(H)", "1/H", "learned", "qk-norm", "ssmax")),
        PLAIN | {"soft_cap": CAP},
        PLAIN | {"model.spectral": True},
        PLAIN | {"model.gated": True},
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
            logit = final(point, "largest_logit")
            numbers = {
                "loss": losses[-1],
                "diverged": float(point["diverged_at"] is not None),
                "largest logit": None if math.isnan(logit) else logit,
            }
            rows.append({"axes": axes, "seed": seed, "numbers": numbers})
        best = min(losses)
        numbers = {"sensitivity": sum(losses) / len(losses) - best, "lowest loss": best}
        rows.append({"axes": {"rule": rule}, "seed": seed, "numbers": numbers})
    return rows


def _rule(point) -> str:
    axes = point["axes"]
    also = {
        f"soft cap {axes['soft_cap'] or 0:g}": axes["soft_cap"],
        "sigma-reparametrised": axes["model.spectral"],
        "gated": axes["model.gated"],
    }
    return ", ".join([axes["model.scale_rule"], *(name for name, on in also.items() if on)])


def figure(summary: Summary) -> Figure:
    """Loss held out after training over the peak learning rate, at most that of the untrained model, and the largest \
logit of any head; means, with bands over all seeds. Right: the mean loss over the learning rates above its lowest; \
bars span the seeds."""
    drawing, (left, middle, right) = panels(3, width=4.6, height=4)
    by_rate = [row for row in summary if "learning rate" in row["axes"]]
    for panel, number in ((left, "loss"), (middle, "largest logit")):
        curves(panel, by_rate, "learning rate", number, "rule")
        powers(panel, [row["axes"]["learning rate"] for row in by_rate], "peak learning rate")
    left.set_ylabel("held-out loss (nats / byte)")
    middle.set(yscale="log", ylabel="largest logit")
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
smoke = _study(SMALL, [1e-3, 1e-1], seeds=2, rules=Axes(RULES.points[::3]))
