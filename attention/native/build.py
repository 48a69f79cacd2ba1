"""The kernel's library: compiled by the machine's own compiler when it is first asked for, and kept."""

import ctypes
import functools
import hashlib
import importlib.util
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

KEYS = 128  # of a tile: with a panel of queries their weights fill half of a first-level cache
PARTS = 4  # of a list of pages
ITEMS = 16  # that threads should have to share
DEGREE, SHORT_DEGREE = 6, 4  # of the polynomials for 2^f, and of that for weights of 16 bits; even, so that 2^0 = 1

SOURCES = Path(__file__).parent
TARGETS = tuple(f"attention_lab_{name}" for name in ("forward", "decode", "backward", "read", "halved", "paged"))
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-sanitize=undefined", "-shared", "-fPIC")
FLAGS += (
    "-pthread",
    "-fvisibility=hidden",
    f"-DKEYS={KEYS}",
    f"-DITEMS={ITEMS}",
    f"-DPARTS={PARTS}",
)
WHAT_TO_DO = "put gcc or clang on PATH, name a compiler in CC, or pip install attention-lab[native]"


@functools.cache
def fault() -> str:
    """Why the library is not there, and what to do; empty where it is, compiled and registered."""
    try:
        library = ctypes.CDLL(str(built()))
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except (OSError, AttributeError, subprocess.SubprocessError, RuntimeError) as error:
        return str(error)
    return ""


@functools.cache
def has_halves() -> bool:
    """Whether the library is there, and the processor has products of pairs of 16-bit numbers."""
    return not fault() and bool(ctypes.c_int32.in_dll(ctypes.CDLL(str(built())), "attention_lab_has_halves").value)


def built() -> Path:
    """The file of the library, compiled unless one of the same sources, compiler and processor is there.

    Raises:
        RuntimeError: there is no compiler, or it fails; the message says what to do.
        OSError: the folder cannot be written.
    """
    command = [*compiler(), *FLAGS, *powers(), f"-I{jax.ffi.include_dir()}"]
    library = cache_folder() / f"native-{identity(command)}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
        done = subprocess.run([*command, *sources, "-o", unfinished, "-lm"], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip()[-400:] or f"status {done.returncode}"
            raise RuntimeError(f"{shlex.join(compiler())} could not compile it ({said}): {WHAT_TO_DO}")
        os.replace(unfinished, library)  # whole or not at all, whoever else compiles it now
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return library


def compiler() -> list[str]:
    """The command of a C compiler.

    Raises:
        RuntimeError: there is none.
    """
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is not None:
        return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise RuntimeError(f"there is no C compiler to make it with: {WHAT_TO_DO}")


def cache_folder() -> Path:
    """Where libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention-lab"


def identity(command: list[str]) -> str:
    """A name for what the sources, the command, its compiler and the processor make together."""
    try:
        version = subprocess.run([*compiler(), "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{shlex.join(compiler())} does not run ({error}): {WHAT_TO_DO}") from error
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    parts = [shlex.join(command).encode(), version, processor().encode(), header.read_bytes()]
    parts += [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def processor() -> str:
    """What the processor can do: homes, and the libraries in them, are shared among machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {able}"


def powers() -> tuple[str, ...]:
    """The polynomials for 2^f, as the kernel's sources name them."""
    named = {"POWER": coefficients(DEGREE, 0), "POWER_ABOVE": coefficients(DEGREE, 1)}
    named["SHORT_POWER_ABOVE"] = coefficients(SHORT_DEGREE, 1)
    written = {name: ",".join(f"{float(number).hex()}f" for number in rising) for name, rising in named.items()}
    return tuple(f"-D{name}={numbers}" for name, numbers in written.items())


def coefficients(degree: int, above: int) -> list[float]:
    """Of the polynomial that equals 2^f at Chebyshev nodes of [-1/2, 1/2], or of [0, 1] where f lies `above`; rising.

    One node is 0, so that 2^0 = 1: the one in the middle, or the lowest of an interval that begins below it.
    """
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) * half_width(degree, above)
    nodes -= above * nodes[-1]
    rising = np.linalg.solve(np.vander(nodes, increasing=True), np.exp2(nodes))
    return [float(np.float32(number)) for number in rising]


def half_width(degree: int, above: int) -> float:
    """Half of the interval of `coefficients`."""
    return 1 / (1 + math.cos(math.pi / (2 * degree + 2))) if above else 0.5


def remainder(degree: int, above: int) -> float:
    """The bound on the relative remainder: 2 (w ln(2) / 2)^(d + 1) / (d + 1)! times 2, with w half the width.

    The derivatives of 2^f at one end of the interval are at most 2 times 2^f at the other.
    """
    n = degree + 1
    return 2 * (half_width(degree, above) * math.log(2) / 2) ** n * 2 / math.factorial(n)
