"""Imports run one way, and the library needs nothing but jax and jaxtyping."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILIES = {"chunked", "linear", "sparse", "sharded", "fused"}
FOUNDATION = {"registry": set(), "masks": set(), "checks": set(), "positions": set(), "ranking": set()}
FOUNDATION |= {"exponential": set(), "monomials": set(), "bernstein": set(), "tiles": set()}
FOUNDATION |= {"method": {"registry"}, "expressions": {"method", "registry"}, "logits": {"checks"}}
FOUNDATION |= {"inputs": {"method", "masks", "logits", "checks"}}
FOUNDATION |= {"cache": {"method", "masks", "checks", "inputs"}}
FOUNDATION |= {"rounding": {"masks", "inputs"}}
FOUNDATION |= {"native": {"native", "method", "masks", "inputs"}}
FOUNDATION |= {"exact": {"method", "masks", "logits", "inputs", "cache", "rounding"}}
FOUNDATION |= {"diagnostics": {"method", "masks", "checks", "inputs", "exact", "ranking"}}
FOUNDATION |= {"scale_rules": {"registry", "masks", "inputs", "exact"}}
FOUNDATION |= {"api": {"method", "expressions", "masks", "logits", "inputs", "exact"}}
BELOW_FAMILIES = {"registry", "method", "masks", "checks", "logits", "inputs", "cache", "rounding", "exact"}
BELOW_FAMILIES |= {"exponential", "monomials", "bernstein", "tiles", "native"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at any depth and under any condition."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its arrow"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: Path) -> set[str]:
    """The parts of the library that a file imports: `attention.linear.engine` is the part `linear`."""
    submodules = {p.stem for p in (ROOT / "attention").iterdir()}
    names = [name.split(".") for name in imported(path) if name.startswith("attention.")]
    return {name[1] for name in names if name[1] in submodules}


LIBRARY = sorted((ROOT / "attention").rglob("*.py"))
PROGRAMS = sorted(p for folder in ("experiments", "configs") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_library_imports_run_one_way(path):
    part = path.relative_to(ROOT / "attention").with_suffix("").parts[0]
    used = parts_imported(path)
    if part in FOUNDATION:
        assert used <= FOUNDATION[part]
    elif part in FAMILIES:
        assert used <= BELOW_FAMILIES | {part}
    else:
        assert part in {"__init__", "testing", "flax"}, f"{part}: say here what this new part may import"
        assert not used & {"testing", "flax"} - {part}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_library_needs_jax_and_jaxtyping_only(path):
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"attention"}
    allowed = {"jax", "jaxtyping", "numpy"}  # numpy is jax's own dependency
    if "flax" in path.relative_to(ROOT / "attention").parts:
        allowed |= {"flax"}
    if "fused" in path.parts:
        allowed |= {"tokamax", "absl"}  # absl is tokamax's own dependency
    assert outside <= allowed


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_imported_from_above(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"tests", "notebooks"}
    if path in LIBRARY:
        assert not tops & {"experiments", "configs"}


def test_library_imports_without_flax():
    """Every optional dependency is hidden; the import must work, and attend."""
    program = """
import sys
for name in ("flax", "optax", "chex", "orbax", "grain", "tokamax", "matplotlib", "beartype"):
    sys.modules[name] = None
import attention, jax
q = jax.numpy.ones((1, 4, 2, 8))
print(attention.dot_product_attention(q, q, q).sum())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 64
