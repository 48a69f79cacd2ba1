"""The tables that the documents take from the registry and from measured results.

python -m experiments.tables            writes them into README.md and docs/methods.md
"""

import dataclasses
import inspect
import itertools
import json
from pathlib import Path

from attention.method import METHODS, Capabilities, Method

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
LENGTH, HEADS, SIZE = 4096, 8, 64


def own_methods() -> list[type[Method]]:
    """The methods of this distribution; those of others have documents of their own."""
    return [cls for cls in METHODS.values() if cls.__module__.startswith("attention.")]


def overview() -> str:
    """One row a method: what it computes, what it can do, what it costs against the exact form."""
    exact = _cost(METHODS["exact"]())
    rows = [
        f"| name | computes | causal | masks | decodes | certificate | operations at {LENGTH:,} |",
        "|---|---|---|---|---|---|---|",
    ]
    for cls in own_methods():
        can = cls.capabilities
        masks = [name for name in ("window", "lengths", "segments", "dense_mask") if getattr(can, name)]
        named = "all" if len(masks) == 4 else ", ".join(masks).replace("_", " ") or "none"
        first = (inspect.getdoc(cls) or "").splitlines()[0].rstrip(".")
        share = _cost(cls()) / exact
        rows.append(
            f"| `{cls.__name__}` | {first} | {_yes(can.causal)} | {named} | {_yes(can.decoding)} "
            f"| {can.certificate} | {share:.0%} |"
        )
    return "\n".join(rows)


def reference() -> str:
    """Every method in full: its expression with all defaults, its document, and its capabilities."""
    parts = ["# Methods", "", "Made from the registry by `make docs`.", "", overview()]
    for cls in own_methods():
        parts += [
            "",
            f"## {cls.__name__}",
            "",
            f"`attention.{cls()!r}`",
            "",
            "```text",
            inspect.getdoc(cls) or "",
            "```",
            "",
        ]
        parts += [", ".join(_capabilities(cls.capabilities))]
    return "\n".join(parts) + "\n"


def races() -> str:
    """How many times longer than `Fused` the others took, by problem and length: medians of the committed runs."""
    cells = json.loads((RESULTS / "exact" / "results.json").read_text())["cells"]
    lengths = list(dict.fromkeys(cell["cell"]["length"] for cell in cells))
    found = {(cell["label"], cell["cell"]["length"]): cell["slower_than_ours"] for cell in cells}
    labels = list(dict.fromkeys(label for label, _ in found))
    rows = [
        "| time / time of `Fused` | " + " | ".join(f"T = {length:,}" for length in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for name, label in itertools.product(("PyTorch", "Chunked", "jax.nn"), labels):
        ratios = (found[label, length].get(name) for length in lengths)
        shown = (f"{ratio['median']:.2f}" if ratio else "does not fit" for ratio in ratios)
        rows.append(f"| {name}, {label} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def renewed(text: str) -> str:
    """A document with the tables between their markers renewed."""
    for name, table in (("methods", overview), ("races", races)):
        begin, end = f"<!-- {name}: made by `make docs` -->", f"<!-- end of {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + "\n" + table() + "\n" + end + rest.split(end)[1]
    return text


def _cost(method: Method) -> float:
    return method.cost(LENGTH, LENGTH, num_heads=HEADS, head_dim=SIZE).flops


def _capabilities(can: Capabilities) -> list[str]:
    flags = [f.name for f in dataclasses.fields(can) if getattr(can, f.name) is True]
    return [f"`{name}`" for name in flags] + [f"`certificate={can.certificate}`"]


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def main() -> None:
    """Writes the tables into README.md and docs/methods.md."""
    readme = ROOT / "README.md"
    readme.write_text(renewed(readme.read_text()))
    (ROOT / "docs" / "methods.md").write_text(reference())


if __name__ == "__main__":
    main()
