"""What a command does to its process before anything else."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = """
import resource, sys
import numpy as np
from experiments.runtime import keep_memory

if sys.argv[1] == "kept":
    keep_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="there is no mallopt in this C library")
def test_freed_memory_is_kept():
    """Three arrays of 64 MiB: 3 * 2^14 pages of 4 KiB asked for anew, or none but a few of the interpreter's own."""

    def faults(which: str) -> int:
        command = [sys.executable, "-c", FAULTS, which]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    kept, given_back = faults("kept"), faults("given back")
    assert kept < 100 < given_back
