"""How temporaries grow with the length, and what the longest problem costs when it runs."""

import dataclasses
import functools
import itertools
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
from experiments.timing import temporaries

LOOKS = dict(zip(("Chunked", "jax.nn"), COLOURS, strict=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of temporaries of Chunked and jax.nn, as XLA plans them, and one run at the greatest length."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    """Tokens, T = S."""
    head_size: int = 64
    """Size of a head, H; there is one head."""
    run: bool = True
    """Whether forward and backward are run at the greatest length."""
    out: Path = Path("runs/benchmark/memory")
    """Folder for results.json, memory.svg and memory.png."""

    def measured(self) -> list[dict[str, Any]]:
        axes = list(itertools.product((False, True), (False, True), self.lengths))
        console = Console(stderr=True)
        steps = track(axes, "planning", console=console, disable=not console.is_terminal)
        cells = [Cell(T, gradient, causal, 1, self.head_size) for gradient, causal, T in steps]
        results = [{"cell": cell._asdict(), "label": cell.label, "temporaries": planned(cell)} for cell in cells]
        if self.run:
            results.append(ran(Cell(max(self.lengths), True, False, 1, self.head_size)))
        return results


def planned(cell: Cell) -> dict[str, int | None]:
    """Bytes of temporaries of each contestant."""
    operand = jax.ShapeDtypeStruct((1, cell.length, cell.heads, cell.head_size), jnp.dtype(cell.dtype))
    tiled = functools.partial(attention.dot_product_attention, method=attention.Chunked(), is_causal=cell.causal)
    whole = functools.partial(jax.nn.dot_product_attention, is_causal=cell.causal)
    functions = {"Chunked": loss_of(cell, tiled), "jax.nn": loss_of(cell, whole)}
    return {name: temporaries(function, operand, operand, operand) for name, function in functions.items()}


def ran(cell: Cell) -> dict[str, Any]:
    """Seconds of one run with its compilation, and the most memory that the process has held, in bytes."""
    *operands, _ = (jnp.asarray(x) for x in cell.operands())
    attend = functools.partial(attention.dot_product_attention, method=attention.Chunked())
    start = time.perf_counter()
    gradients = jax.block_until_ready(jax.jit(loss_of(cell, attend))(*operands))
    seconds = time.perf_counter() - start
    finite = all(bool(jnp.isfinite(x).all()) for x in gradients)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"cell": cell._asdict(), "label": "run", "seconds": seconds, "finite": finite, "peak_bytes": peak}


def figure(results: list[dict[str, Any]]) -> Figure:
    """Temporaries over the length, one panel a direction and mask."""
    plans = [result for result in results if result["label"] != "run"]
    labels = list(dict.fromkeys(result["label"] for result in plans))
    drawing = Figure(figsize=(3.2 * len(labels) + 0.6, 3.4), layout="constrained")
    panels = drawing.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for panel, label in zip(panels, labels, strict=True):
        cells = [result for result in plans if result["label"] == label]
        lengths = [result["cell"]["length"] for result in cells]
        for name, colour in LOOKS.items():
            sizes = [(result["temporaries"][name] or 0) / 2**20 for result in cells]
            panel.plot(lengths, sizes, color=colour, marker="o", label=name)
        linear = [cells[-1]["temporaries"]["Chunked"] / 2**20 * T / lengths[-1] for T in lengths]
        panel.plot(lengths, linear, color="#555555", linewidth=1, linestyle="--", label="proportional to T")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
        panel.set_title(label, fontsize=10)
        panel.set_xlabel("length (tokens)")
    panels[0].set_ylabel("temporaries of one head (MiB)")
    panels[0].legend(frameon=False, fontsize=8)
    return drawing


def table(results: list[dict[str, Any]]) -> Table:
    """The same numbers for a terminal."""
    shown = Table("cell", "T", *(f"{name}, MiB" for name in LOOKS), title="temporaries of one head")
    for result in results:
        if result["label"] == "run":
            length, seconds, peak = result["cell"]["length"], result["seconds"], result["peak_bytes"] / 2**20
            shown.caption = f"T = {length}, forward and backward: {seconds:.0f} s, at most {peak:.0f} MiB in all"
            continue
        sizes = (f"{(result['temporaries'][name] or 0) / 2**20:.1f}" for name in LOOKS)
        shown.add_row(result["label"], str(result["cell"]["length"]), *sizes)
    return shown
