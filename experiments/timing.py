"""Timing contestants in turn, so that whatever slows the machine down slows all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

LEAST = 3  # rounds, however long they take
SETTLES = 1.0  # seconds; a shorter call runs once more before it is timed, with the memory and caches of its own


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, limit: float) -> dict[str, list[float]]:
    """Seconds of each call in each round; every call runs twice before the clock starts, and a short one before each.

    A call returns when its result is there. After `limit` seconds no round begins but the first LEAST. The order is
    reversed in every other round, so that none always finds the caches as the same other one left them.
    """
    for call in calls.values():
        call()  # and compiles
    settling = {name: _seconds(call) < SETTLES for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= LEAST and time.perf_counter() - began > limit:
            break
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            if settling[name]:
                calls[name]()
            seconds[name].append(_seconds(calls[name]))
    return seconds


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(numbers) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (float(x) for x in np.quantile(np.asarray(numbers, np.float64), (0.25, 0.5, 0.75)))
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def ratios(seconds: Mapping[str, list[float]], of: str) -> dict[str, dict[str, float]]:
    """How many times longer than `of` each contestant took, round by round: above 1 where `of` is faster."""
    mine = np.asarray(seconds[of])
    return {name: spread(np.asarray(theirs) / mine) for name, theirs in seconds.items() if name != of}


def temporaries(function: Callable[..., Any], *operands: jax.Array | jax.ShapeDtypeStruct) -> int | None:
    """Bytes beside arguments and results that the compiled function needs; None where the backend does not say."""
    analysis = jax.jit(function).lower(*operands).compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
