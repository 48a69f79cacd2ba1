"""What the documents say is what the code says: tables, snippets, doctests, links."""

import doctest
import importlib
import json
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest
import tyro

import attention
from attention.testing import check
from experiments import tables
from experiments.benchmark import Benchmark
from experiments.records import told
from experiments.studies import load_study, study_names
from experiments.study import asked

ROOT = Path(__file__).parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(attention.__path__, "attention."))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_readme_tables_are_the_registry_and_the_results():
    text = (ROOT / "README.md").read_text()
    assert tables.renewed(text) == text, "run `make docs`"


def test_methods_document_is_the_registry():
    assert (ROOT / "docs" / "methods.md").read_text() == tables.reference(), "run `make docs`"


def readme_snippets() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [textwrap.dedent(snippet) for snippet in found]


def test_readme_snippet_runs():
    snippet = readme_snippets()[0]
    assert len(snippet.strip().splitlines()) == 6
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_method_keeps_the_laws(monkeypatch):
    monkeypatch.setattr(attention.METHODS, "_classes", dict(attention.METHODS._classes))
    names = {"__name__": "readme"}
    exec(compile(readme_snippets()[1], "README.md", "exec"), names)
    check(names["MeanOfValues"]())


def test_readme_names_the_commands_of_the_makefile():
    targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for document in DOCUMENTS:
        for target in re.findall(r"`make (\w+)`", document.read_text()):
            assert target in targets, f"{document.name} names make {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)", document.read_text()):
        assert link.startswith("https://") or (document.parent / link).exists(), link


def known(options: dict, to: dict) -> dict:
    """The options that others have too, but for where results are written."""
    return {
        name: known(options[name], to[name]) if isinstance(to[name], dict) else options[name]
        for name in to
        if name != "out"
    }


def test_results_stand_beside_the_command_that_made_them():
    """The options in a results.json are those of the command in its row; those added since are not in it."""
    checked = 0
    for row in (ROOT / "docs" / "results" / "README.md").read_text().splitlines():
        commands, folders = re.findall(r"`bench ([^`]+)`", row), re.findall(r"\]\((\w+)/\w+\.\w+\)", row)
        for command, folder in zip(commands, folders, strict=bool(commands)):
            made = json.loads((ROOT / "docs" / "results" / folder / "results.json").read_text())
            arguments = command.replace("...", " ".join(made["config"].get("operands", []))).split()
            asked = json.loads(json.dumps(told(tyro.cli(Benchmark, args=arguments))))
            assert known(asked, made["config"]) == known(made["config"], made["config"]), command
            checked += 1
    assert checked


STUDIES = re.findall(r"\]\((\w+)/\w+\.\w+\) \| `study ([^`]+)`", (ROOT / "docs" / "results" / "README.md").read_text())
STALE: set[str] = set()  # to be measured anew


def methods_parsed(value):
    """Expressions of methods as what they make, so that a field that was added since makes no difference."""
    if isinstance(value, dict):
        return {name: methods_parsed(x) for name, x in value.items()}
    if isinstance(value, list):
        return [methods_parsed(x) for x in value]
    if isinstance(value, str) and value.partition("(")[0] in {cls.__name__ for cls in attention.METHODS.values()}:
        return attention.parse_method(value)
    return value


def differences(made: dict, today: dict) -> list[str]:
    """What a study's results were measured with, and is not what the study asks for today."""
    # Results of before measures were recorded are held to what they have.
    parts = {name: today.get(name, {}) for name in ("axes", "measures") if name == "axes" or name in made}
    parts["config"] = known(today.get("config", {}), made.get("config", {}))
    return [name for name, part in parts.items() if methods_parsed(made.get(name, {})) != methods_parsed(part)]


def study_rows():
    for folder, command in STUDIES:
        stale = pytest.mark.xfail(reason="to be measured anew", strict=True)
        yield pytest.param(folder, command, id=folder, marks=[stale] if folder in STALE else [])


@pytest.mark.parametrize(("folder", "command"), list(study_rows()))
def test_results_of_a_study_are_those_of_its_preset_today(folder, command):
    made = json.loads((ROOT / "docs" / "results" / folder / "results.json").read_text())
    assert made["command"] == f"python -m experiments.study {command}"
    assert not made["smoke"]
    study, _ = load_study(command.split()[0])
    stale = differences(made, json.loads(json.dumps(asked(study))))
    assert not stale, f"{folder} has other {stale} than its preset: run `{made['command']} --out docs/results/{folder}`"


def test_every_study_has_results_and_a_changed_one_is_noticed():
    assert {command.split()[0] for _, command in STUDIES} == set(study_names())
    today = json.loads(json.dumps(asked(load_study("train_T_x_eval_T")[0])))
    assert differences(today, today) == []
    older = today | {"config": {name: x for name, x in today["config"].items() if name != "adaptive"}}
    assert differences(older, today) == []  # an option that was added since
    assert differences(today | {"measures": today["measures"] | {"methods": ["Exact"]}}, today) == ["measures"]
    assert differences(today | {"axes": today["axes"] | {"seed": [0]}}, today) == ["axes"]
    assert differences(today | {"config": today["config"] | {"steps": 1}}, today) == ["config"]
    assert methods_parsed(["Exact", "TopK(k=8)"]) == [attention.Exact(), attention.TopK(k=8)]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed


@pytest.mark.parametrize("cls", attention.METHODS.values(), ids=lambda cls: cls.__name__)
def test_every_method_says_what_a_reader_needs(cls):
    text = cls.__doc__ or ""
    assert "Cost:" in text
    assert re.search(r"[Ee]rror bound|[Nn]o bound known", text)
    assert "References:" in text
