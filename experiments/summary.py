"""What the figures and tables of a sweep read: its results as curves, cells and gaps."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from experiments.metrics import SHOWN

Results = Mapping[str, Any]
Point = Mapping[str, Any]


class Spread(NamedTuple):
    """The mean of a number over seeds, with the smallest and the largest."""

    mean: float
    low: float
    high: float


def labels(results: Results) -> dict[str, str]:
    """The name of each program: its method, and what else sets it apart."""
    return {key: program["label"] for key, program in results["programs"].items()}


def points_of(results: Results, program: str) -> list[Point]:
    """The finished points of a program, by falling beta."""
    chosen = [point for point in results["points"] if point["program"] == program]
    return sorted(chosen, key=lambda point: (-point["beta"], point["scale"], point["learning_rate"], point["seed"]))


def final(point: Point, metric: str = "loss") -> float:
    """A metric at the last evaluation, of all heads together; NaN where the point diverged or does not have it."""
    value = point["evaluations"][-1].get(metric) if point["evaluations"] and point["diverged_at"] is None else None
    if isinstance(value, list):
        heads = [head for layer in value for head in layer if head is not None]
        return SHOWN[metric][1](heads) if heads else math.nan
    return math.nan if value is None else value


def measured(results: Results) -> list[str]:
    """The numbers of `attention.Diagnostics` that the points have."""
    return [name for name in SHOWN if any(not math.isnan(final(point, name)) for point in results["points"])]


def unit(results: Results) -> str:
    """What a loss is counted for: a byte of text, or a token of a task."""
    text = any("bits_per_byte" in evaluation for point in results["points"] for evaluation in point["evaluations"])
    return "byte" if text else "token"


def spread(numbers: Iterable[float]) -> Spread:
    """Mean, smallest and largest; NaN if any is, since a mean over the seeds that survived would flatter."""
    numbers = list(numbers)
    if any(math.isnan(number) for number in numbers):
        return Spread(math.nan, math.nan, math.nan)
    return Spread(math.fsum(numbers) / len(numbers), min(numbers), max(numbers))


def grouped(points: Iterable[Point], key: Callable[[Point], Any]) -> dict[Any, list[Point]]:
    """The points by a key, in the order of its first appearance."""
    groups: dict[Any, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def best_rate(points: Iterable[Point]) -> list[Point]:
    """The points at the learning rate whose mean final loss is lowest, of points that differ in rate and seed."""
    by_rate = grouped(points, lambda point: point["learning_rate"])
    losses = {rate: spread(map(final, chosen)).mean for rate, chosen in by_rate.items()}
    return by_rate[min(losses, key=lambda rate: (math.isnan(losses[rate]), losses[rate]))]


def cells(results: Results, program: str, metric: str = "loss") -> dict[tuple[float, float], Spread]:
    """A final number at each (scale, temperature), over seeds, at the learning rate that is best for the loss."""
    by_cell = grouped(points_of(results, program), lambda point: (point["scale"], point["temperature"]))
    return {cell: spread(final(p, metric) for p in best_rate(points)) for cell, points in by_cell.items()}


def by_beta(results: Results, program: str, metric: str = "loss") -> dict[float, Spread]:
    """A final number at each beta, over all points that share it, at the learning rate that is best for the loss."""
    groups = grouped(points_of(results, program), lambda point: point["beta"])
    return {beta: spread(final(p, metric) for p in best_rate(points)) for beta, points in groups.items()}


def tolerated(losses: Mapping[float, Spread], reference: Mapping[float, Spread], allowance: float) -> list[float]:
    """The betas at which the mean loss is at most `allowance` above the reference's at the same beta."""
    return [beta for beta in losses if beta in reference and losses[beta].mean - reference[beta].mean <= allowance]


def summary_rows(results: Results, allowance: float = 0.05) -> list[dict[str, Any]]:
    """For each program: its lowest and highest loss, where they lie, and where it keeps up with exact attention.

    Args:
        results: the contents of results.json.
        allowance: how far above exact attention's loss, in nats a token, still counts as keeping up.
    """
    exact = next((key for key, program in results["programs"].items() if program["reference"]), None)
    reference = by_beta(results, exact) if exact else {}
    rows = []
    for key, program in results["programs"].items():
        losses, shares = by_beta(results, key), by_beta(results, key, "accuracy")
        finite = {beta: loss.mean for beta, loss in losses.items() if not math.isnan(loss.mean)}
        best = min(finite, key=lambda beta: finite[beta]) if finite else math.nan
        worst = max(finite, key=lambda beta: finite[beta]) if finite else math.nan
        gaps = [losses[beta].mean - reference[beta].mean for beta in losses if beta in reference]
        rows.append(
            {
                "label": program["label"],
                "best": finite.get(best, math.nan),
                "accuracy": max((loss.mean for loss in shares.values() if not math.isnan(loss.mean)), default=math.nan),
                "best_beta": best,
                "worst": finite.get(worst, math.nan),
                "worst_beta": worst,
                "diverged": sum(point["diverged_at"] is not None for point in points_of(results, key)),
                "tolerated": sorted(tolerated(losses, reference, allowance)),
                "betas": sorted(losses),
                "gap": spread(gaps) if gaps else None,
            }
        )
    return rows


def point_row(results: Results, point: Point) -> dict[str, Any]:
    """A point with what the tables show of it."""
    return dict(point) | {
        "label": results["programs"][point["program"]]["label"],
        "loss": final(point),
        "bits": final(point, "bits_per_byte"),
        "accuracy": final(point, "accuracy"),
        **{name: final(point, name) for name in SHOWN},
        "milliseconds": 1e3 * point["timings"]["seconds_per_step"],
    }
