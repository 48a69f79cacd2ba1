"""How temporaries grow with the length, and what the longest problem costs when it runs."""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attention
from experiments.contestants import Cell, loss_of
from experiments.drawing import COLOURS
from experiments.runtime import keep_memory
from experiments.timing import temporaries

METHODS: dict[str, attention.Method] = {"Chunked": attention.Chunked(), "Fused": attention.Fused()}
LOOKS = {
    "Chunked": (COLOURS[2], "^", "-"),
    "Fused": (COLOURS[0], "o", "--"),
    "jax.nn": (COLOURS[1], "s", "-"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of temporaries of Chunked, Fused and jax.nn as XLA plans them, and a run of ours at the greatest length."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    """Tokens, T = S."""
    head_size: int = 64
    """Size of a head, H; there is one head."""
    run: bool = True
    """Whether forward and backward are run at the greatest length, each method in a process of its own."""
    out: Path = Path("runs/benchmark/memory")
    """Folder for results.json, memory.svg and memory.png."""

    def measured(self) -> list[dict[str, Any]]:
        axes = list(itertools.product((False, True), (False, True), self.lengths))
        console = Console(stderr=True)
        steps = track(axes, "planning", console=console, disable=not console.is_terminal)
        cells = [Cell(T, gradient, causal, 1, self.head_size) for gradient, causal, T in steps]
        results = [{"cell": cell._asdict(), "label": cell.label, "temporaries": planned(cell)} for cell in cells]
        if self.run:
            cell = Cell(max(self.lengths), True, False, 1, self.head_size)
            results += [alone(cell, name) for name in METHODS]
        return results


def planned(cell: Cell) -> dict[str, int | None]:
    """Bytes of temporaries of each contestant."""
    operand = jax.ShapeDtypeStruct((1, cell.length, cell.heads, cell.head_size), jnp.dtype(cell.dtype))
    calls: dict[str, Any] = {
        name: functools.partial(attention.dot_product_attention, method=x) for name, x in METHODS.items()
    }
    calls["jax.nn"] = jax.nn.dot_product_attention
    functions = {name: loss_of(cell, functools.partial(x, is_causal=cell.causal)) for name, x in calls.items()}
    return {name: temporaries(function, operand, operand, operand) for name, function in functions.items()}


def alone(cell: Cell, name: str) -> dict[str, Any]:
    """`ran` in a process of its own, since the most memory that a process has held never falls."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), keep_memory) as process:
        return process.submit(ran, cell, name).result()


def ran(cell: Cell, name: str) -> dict[str, Any]:
    """Seconds of one run with its compilation, and the most memory that the process has held, in bytes."""
    *operands, _ = (jnp.asarray(x) for x in cell.operands())
    attend = functools.partial(attention.dot_product_attention, method=METHODS[name])
    start = time.perf_counter()
    gradients = jax.block_until_ready(jax.jit(loss_of(cell, attend))(*operands))
    seconds = time.perf_counter() - start
    finite = all(bool(jnp.isfinite(x).all()) for x in gradients)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"method": name, "seconds": seconds, "finite": finite, "peak_bytes": peak}
    return {"cell": cell._asdict(), "label": "run"} | found


def figure(results: list[dict[str, Any]]) -> Figure:
    """Temporaries over the length, one panel a direction and mask."""
    plans = [result for result in results if result["label"] != "run"]
    labels = list(dict.fromkeys(result["label"] for result in plans))
    drawing = Figure(figsize=(3.2 * len(labels) + 0.6, 3.4), layout="constrained")
    panels = drawing.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for panel, label in zip(panels, labels, strict=True):
        cells = [result for result in plans if result["label"] == label]
        lengths = [result["cell"]["length"] for result in cells]
        for name, (colour, marker, line) in LOOKS.items():
            sizes = [(result["temporaries"].get(name) or math.nan) / 2**20 for result in cells]
            if any(size > 0 for size in sizes):
                panel.plot(lengths, sizes, color=colour, marker=marker, linestyle=line, label=name)
        linear = [cells[-1]["temporaries"]["Chunked"] / 2**20 * T / lengths[-1] for T in lengths]
        panel.plot(lengths, linear, color="#555555", linewidth=1, linestyle=":", label="proportional to T")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
        panel.set_title(label, fontsize=10)
        panel.set_xlabel("length (tokens)")
    panels[0].set_ylabel("temporaries of one head (MiB)")
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawing


def table(results: list[dict[str, Any]]) -> Table:
    """The same numbers for a terminal."""
    shown = Table("cell", "T", *(f"{name}, MiB" for name in LOOKS), title="temporaries of one head")
    told = []
    for result in results:
        if result["label"] == "run":
            length, seconds, peak = result["cell"]["length"], result["seconds"], result["peak_bytes"] / 2**20
            told.append(f"{result.get('method', 'Chunked')}: {seconds:.0f} s, at most {peak:.0f} MiB in all")
            shown.caption = f"T = {length}, forward and backward; {'; '.join(told)}"
            continue
        sizes = (f"{(result['temporaries'].get(name) or 0) / 2**20:.1f}" for name in LOOKS)
        shown.add_row(result["label"], str(result["cell"]["length"]), *sizes)
    return shown
