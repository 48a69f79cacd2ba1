"""Tests run with shapes and types checked, rank promotion forbidden, and compilations kept between runs.

XLA optimizes little here, and by its shorter way through LLVM, which saves half of what compilation takes;
`make campaign` runs the suite on programs as users have them.
"""

import gc
import itertools
import os
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("attention", "beartype.beartype")
FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # later ones stop at this flag: they have no other emitters
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)  # the empty string leaves XLA as it is

import jax  # noqa: E402 (the hook comes before anything that imports the library)
from hypothesis import settings  # noqa: E402

# In the environment too, so that command lines, in this process or another, keep their programs in the same place.
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "attention-lab-tests"))
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")

RATIOS = "error / bound"

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """Campaigns run when asked for by marker; what needs an accelerator is skipped without one.

    A file's tests run in one process (the laws, a method's), because they share compiled programs and fixtures.
    """
    asked = config.getoption("-m") or ""
    for item in items:
        if item.get_closest_marker("campaign") and "campaign" not in asked:
            item.add_marker(pytest.mark.skip(reason="a long campaign: make campaign"))
        if item.get_closest_marker("accelerator") and jax.default_backend() == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU or a TPU, found the CPU"))
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not look at it again at every turn."""
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--soundness", help="a folder: what `record_ratios` took down is written there")


MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def few_maps(request):
    """Linux gives a process 65,530 maps of memory, of which a program takes up to 200: beyond them XLA dies."""
    yield
    if request.node.get_closest_marker("campaign") and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


@pytest.fixture
def record_ratios(record_property):
    """Takes down the error over its bound of each case, by quantity, and what they are of."""

    def record(ratios: dict[str, list[float]], **of):
        record_property(RATIOS, [{**of, "quantity": name, "ratios": some} for name, some in ratios.items()])

    return record


def pytest_terminal_summary(terminalreporter, config):
    """The worst and the median of all ratios that tests took down, by method, dtype and quantity."""
    reports = [x for x in itertools.chain(*terminalreporter.stats.values()) if getattr(x, "when", "") == "call"]
    rows = [row for report in reports for name, some in report.user_properties if name == RATIOS for row in some]
    if not rows:
        return
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(f"{row['method']}, {row['dtype']}, {row['quantity']}", []).extend(row["ratios"])
    terminalreporter.section(RATIOS)
    for what, ratios in sorted(found.items()):
        worst, median = max(ratios), statistics.median(ratios)
        terminalreporter.line(f"{what:48} {len(ratios):6} cases, worst {worst:.3f}, median {median:.4f}")
    if config.getoption("--soundness"):
        from experiments import soundness

        soundness.write(Path(config.getoption("--soundness")), rows)
