"""The process around an experiment: its memory, the compilation cache, what it runs on, and signals."""

import ctypes
import os
import platform
import signal
import threading
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import jax

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # names of mallopt(3)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def start_process() -> None:
    """What every command does first: memory is kept, and so are compiled programs."""
    keep_memory()
    enable_compilation_cache()


def keep_memory() -> None:
    """Lets glibc's malloc keep what is freed, up to 2 GiB, instead of giving it back to the system.

    A program on a CPU asks for its temporaries anew at every call, and the system hands them out a page at a time: a
    fifth of the time of a training step of 235 MB. Nothing happens where there is no glibc. The threads have to share
    one heap, so this comes before the first of them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    for option, setting in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, setting)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between processes, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "attention-lab" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compiler_options() -> dict[str, str]:
    """What XLA is told about the programs of a run.

    On a CPU, to leave YNNPACK out: products go through Eigen then, and reductions are fused with their neighbours.
    A step of 4 layers of 128 at 16 x 256 tokens takes 0.8 of the time so.
    """
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else {}


def environment() -> dict[str, Any]:
    """Versions, backend and device: what a result depends on besides its configuration."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = metadata.version(package)
    return {"versions": versions, "backend": jax.default_backend(), "device": jax.devices()[0].device_kind}


class Interrupted(Exception):  # noqa: N818 (not an error: the run can go on)
    """A signal asked the run to stop, and it did, with everything saved.

    Attributes:
        exit_code: 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignals:
    """While open, the first SIGTERM or SIGINT is noted in `received`; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.received = signum
        for known in self._previous:
            signal.signal(known, signal.SIG_DFL)
