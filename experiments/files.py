"""Files that are either whole or absent, and logs that can be cut back to a step."""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and renames it into place, so that a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text beside `path` and renames it into place."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes beside `path` and renames them into place."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def remove_folder(path: Path) -> None:
    """Removes a folder, renamed first: a removal that is interrupted must not leave half of it under its name."""
    aside = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def append_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends one line of JSON a record: all of them, or none if the disk is full."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            data = memoryview(text.encode())
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            if file.seekable():
                file.truncate(end)
            raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that was cut off is left out. Empty if there is no file."""
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def cut_json_lines(path: Path, last_step: int) -> None:
    """Drops the records of later steps, and what a killed process left of a line."""
    if path.exists():
        kept = [record for record in read_json_lines(path) if record["step"] <= last_step]
        write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that no space is left; some libraries say so only in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
