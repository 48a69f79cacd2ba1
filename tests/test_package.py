"""What is shipped: a wheel with the library alone, a lock with hashes and no address."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_ships_the_library_alone(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"attention"}
    assert "attention/testing/oracle.py" in wheel.namelist()
    sources = [path.name for path in (ROOT / "attention/native").glob("*.[ch]")]
    assert {f"attention/native/{name}" for name in sources} <= set(wheel.namelist())


def test_the_wheel_needs_jax_and_jaxtyping_only(wheel):
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(re.findall(r"Requires-Dist: (\w+)", "\n".join(needs))) == ["jax", "jaxtyping"]
    assert "Name: attention-lab" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_the_lock_is_hashed_and_names_no_address():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    entries = re.split(r"\n(?=\S)", lock.strip())
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_lock_holds_every_requirement_and_no_peer():
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["experiments"]]
    wanted += [need for need in PROJECT["dependency-groups"]["dev"] if isinstance(need, str)]
    names = {re.split(r"[<>=\[]", need)[0].lower().replace("_", "-") for need in wanted}
    assert names <= locked
    assert not locked & {"torch", "tokamax", "submitit"}


def test_the_default_group_brings_the_experiments():
    groups = PROJECT["dependency-groups"]
    assert {"include-group": "experiments"} in groups["dev"]
    assert groups["experiments"] == PROJECT["project"]["optional-dependencies"]["experiments"]
