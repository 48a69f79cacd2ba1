"""Files that are either whole or absent."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under another name, and renames it into place once it is safe on disk.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file, if any, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON atomically; a float is written so that it reads back as the same bits.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON has no word for.
        OSError: as `write_atomically`.
    """
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
