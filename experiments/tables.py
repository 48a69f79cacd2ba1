"""The tables that the documents take from the registry.

python -m experiments.tables            writes them into README.md and docs/methods.md
"""

import dataclasses
import inspect
from pathlib import Path

from attention.method import METHODS, Capabilities, Method

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- methods: made by `make docs` -->", "<!-- end of methods -->"
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


def with_overview(text: str) -> str:
    """A document with the table between its markers renewed."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + overview() + "\n" + END + rest.split(END)[1]


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
    readme.write_text(with_overview(readme.read_text()))
    (ROOT / "docs" / "methods.md").write_text(reference())


if __name__ == "__main__":
    main()
