import math
import re

import pytest

from experiments import report
from experiments.config import Run, to_dict
from experiments.figures import FIGURES
from experiments.metrics import SHOWN
from experiments.probe_figures import probe_errors, probed
from experiments.store import Store
from experiments.summary import by_beta, cells, measured, point_row, summary_rows

LAYERS, HEADS, STEPS = 2, 2, (0, 10, 20)


def made_up_results(offsets=None, seeds=(0, 1)):
    """A sweep over scale x temperature x seed whose loss is |log2 beta| / 10 + the program's offset."""
    offsets = offsets or {"Exact()": 2.0, "Half()": 2.02}
    results = {
        "format": report.FORMAT,
        "name": "made-up",
        "preset": "made_up",
        "description": "A made-up sweep.",
        "command": "python -m experiments.sweep made_up",
        "planned": len(offsets) * 6 * len(seeds),
        "population": "loop",
        "config": to_dict(Run()),
        "axes": {"scale": [0.25, 0.5], "temperature": [0.5, 1.0, 2.0], "seed": list(seeds)},
        "environment": {"versions": {"jax": "0"}, "device": {"platform": "cpu", "kind": "cpu", "count": 1}},
        "corpus": {"name": "stdlib", "sha256": "0" * 64, "unigram_entropy": 3.1},
        "programs": {},
        "points": [],
    }
    for number, (label, offset) in enumerate(offsets.items()):
        results["programs"][f"p{number}"] = {
            "label": label,
            "reference": label == "Exact()",
            "config": to_dict(Run()),
            "corpus": results["corpus"],
            "parameters": 1000,
            "timings": {"setup_seconds": 9.5, "compile_seconds": 1.5 + number, "cached": False},
            "memory": {"temporary_bytes": 2**20 * (number + 1), "argument_bytes": 2**20, "output_bytes": 0},
            "cost": {"flops": 1e9, "bytes_accessed": 1e8},
        }
        for scale in (0.25, 0.5):
            for temperature in (0.5, 1.0, 2.0):
                results["points"] += [made_up_point(f"p{number}", offset, scale, temperature, seed) for seed in seeds]
    return results


def made_up_point(program, offset, scale, temperature, seed):
    beta = scale / temperature
    losses = [5 / (1 + step) + offset + abs(math.log2(beta)) / 10 + seed / 100 for step in STEPS]
    heads = {name: [[at + 3 - beta] * HEADS] * LAYERS for at, name in enumerate(SHOWN)}
    evaluations = [
        {"step": step, "loss": loss, "bits_per_byte": loss / math.log(2), **heads}
        for step, loss in zip(STEPS, losses, strict=True)
    ]
    return {
        "id": f"{program}-{scale}-{temperature}-{seed}",
        "program": program,
        "axes": {"scale": scale, "temperature": temperature, "seed": seed},
        "scale": scale,
        "temperature": temperature,
        "beta": beta,
        "learning_rate": 1e-3,
        "seed": seed,
        "losses": losses,
        "evaluations": evaluations,
        "diverged_at": None,
        "timings": {"seconds": 1.0, "seconds_per_step": 0.01},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, report.write_report(folder, made_up_results()).read_text()


def test_the_page_holds_every_figure_and_the_files_lie_beside_it(page):
    folder, text = page
    assert text.count("<svg ") == len(FIGURES) >= 5
    for name in FIGURES:
        assert f'id="figure-{name}"' in text
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "figures" / f"{name}.svg").read_bytes().rstrip().endswith(b"</svg>")


def test_the_page_needs_nothing_from_elsewhere(page):
    _, text = page
    loaded = re.findall(r"""(?:src|href)=["']([^"'#][^"']*)""", text) + re.findall(r"url\(([^#)][^)]*)\)", text)
    assert all(address.startswith("data:") for address in loaded)
    assert "@import" not in text
    assert "<script" not in text


def test_the_page_says_how_it_was_made_and_follows_the_readers_colours(page):
    _, text = page
    for wanted in ("python -m experiments.sweep made_up", "0" * 64, "prefers-color-scheme: dark", "currentColor"):
        assert wanted in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    for target in re.findall(r"""(?:href="|url\()#([^")]+)""", text):
        assert target in identifiers


def test_the_report_is_made_again_from_results_alone_byte_for_byte(page, tmp_path, capsys):
    Store(tmp_path, {}).write_results(made_up_results())
    assert report.load_results(tmp_path) == made_up_results()
    assert report.main([str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    folder, text = page
    assert (tmp_path / "report.html").read_text().replace(str(tmp_path), str(folder)) == text
    before, again = ({x.name: x.read_bytes() for x in (at / "figures").iterdir()} for at in (folder, tmp_path))
    assert again == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.json"),
        ('{"format": 1, "poi', "is no JSON"),
        ('{"format": 99}', "has format 99: expected 1"),
        ("[]", "has format 'list'"),
    ],
)
def test_what_is_no_results_file_is_refused(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert report.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_text_from_outside_is_escaped(tmp_path):
    results = made_up_results({"Exact()": 2.0, "<b>&": 2.0}) | {"description": "<script>alert(1)</script>"}
    text = report.write_report(tmp_path, results).read_text()
    assert "<script" not in text
    assert "<b>" not in text


def test_cells_and_betas_hold_the_means_over_seeds():
    results = made_up_results()
    expected = 5 / 21 + 2.0 + 0.2 + 0.005  # the last step, offset, |log2 of 1/4| / 10, mean of 0 and 1/100
    for found in (cells(results, "p0")[0.25, 1.0], cells(results, "p0")[0.5, 2.0], by_beta(results, "p0")[0.25]):
        assert found.mean == pytest.approx(expected, rel=1e-12)
        assert (found.low, found.high) == pytest.approx((expected - 0.005, expected + 0.005), rel=1e-12)
    assert set(by_beta(results, "p0")) == {0.125, 0.25, 0.5, 1.0}


def test_every_number_of_attention_can_be_shown_and_old_results_do_without(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", {})  # the columns are asked about
    results = made_up_results({"Exact()": 2.0}, seeds=(0,))
    layers = [[1.0, 2.0], [3.0, None]]
    results["points"][0]["evaluations"][-1] |= {"largest_logit": layers, "sink_mass": layers}
    row = point_row(results, results["points"][0])
    assert (row["largest_logit"], row["sink_mass"]) == (3.0, 2.0)
    assert cells(results, "p0", "sink_mass")[0.25, 0.5].mean == 2.0
    assert measured(results) == list(SHOWN)
    for point in results["points"]:
        point["evaluations"] = [
            {k: v for k, v in x.items() if k not in SHOWN or k == "entropy"} for x in point["evaluations"]
        ]
    assert measured(results) == ["entropy"]
    assert "<th>largest logit" not in report.write_report(tmp_path, results).read_text()


def with_probes(results, program="p0"):
    """Errors in each head of a program's points, 2^layer (1 + head) beta (1 + seed), and bounds of 10 times that."""
    for point in results["points"]:
        if point["program"] == program:
            error = point["beta"] * (1 + point["seed"])
            heads = [[2**layer * (1 + head) * error for head in range(HEADS)] for layer in range(LAYERS)]
            bounds = [[10 * x for x in layer] for layer in heads]
            point["evaluations"][-1] |= {"error of TopK(k=2)": heads, "bound of TopK(k=2)": bounds}
    return results


def test_probes_are_shown_by_head_over_beta(tmp_path, monkeypatch):
    results = with_probes(made_up_results())
    monkeypatch.setattr(report, "FIGURES", {})  # the others, which are not asked about here
    text = report.write_report(tmp_path, results).read_text()
    assert text.count("<svg ") == 1
    assert 'id="figure-probes"' in text
    panels = probe_errors(results).axes
    assert len(panels) == LAYERS * HEADS
    for index, axes in enumerate(panels):
        layer, head = divmod(index, HEADS)
        error, bound = axes.lines
        betas = [0.125, 0.25, 0.5, 1.0]
        assert list(error.get_xdata()) == betas
        # Sums of two powers of two and their multiples: no rounding.
        assert list(error.get_ydata()) == [2**layer * (1 + head) * beta * 1.5 for beta in betas]
        assert list(bound.get_ydata()) == [10 * y for y in error.get_ydata()]
    assert probed(made_up_results()) == ("", [])
    assert probed(with_probes(made_up_results({"Half()": 2.0, "Exact()": 2.0}), "p1")) == ("p1", ["TopK(k=2)"])


def test_probes_of_one_beta_are_shown_over_the_steps():
    results = made_up_results({"Exact()": 2.0}, seeds=(0,))
    results["points"] = results["points"][:1]
    for evaluation in results["points"][0]["evaluations"]:
        evaluation["error of TopK(k=2)"] = [[1.0 + evaluation["step"], None]]
    first, second = probe_errors(results).axes
    assert list(first.lines[0].get_xdata()) == list(STEPS)
    assert list(first.lines[0].get_ydata()) == [1.0 + step for step in STEPS]
    assert all(math.isnan(y) for y in second.lines[0].get_ydata())


def test_the_best_learning_rate_stands_for_its_point():
    results = made_up_results({"Exact()": 2.0}, seeds=(0,))
    worse = [
        point | {"learning_rate": 1.0, "evaluations": [e | {"loss": e["loss"] + 1} for e in point["evaluations"]]}
        for point in results["points"]
    ]
    assert cells(results | {"points": results["points"] + worse}, "p0") == cells(results, "p0")


def test_the_summary_tells_which_betas_a_method_tolerates():
    results = made_up_results({"Exact()": 2.0, "Near()": 2.04, "Far()": 2.06}, seeds=(0,))
    exact, near, far = summary_rows(results, allowance=0.05)
    assert exact["tolerated"] == near["tolerated"] == [0.125, 0.25, 0.5, 1.0]
    assert far["tolerated"] == []
    assert (exact["best_beta"], exact["worst_beta"]) == (1.0, 0.125)
    assert near["gap"].mean == pytest.approx(0.04, rel=1e-9)


def cut_short(results, kept):
    """The results of a sweep that has finished so many points."""
    points = results["points"][:kept]
    return results | {"points": points, "programs": {p["program"]: results["programs"][p["program"]] for p in points}}


def test_diverged_points_are_shown_and_never_averaged_away(tmp_path):
    results = cut_short(made_up_results(), 7)
    results["points"][0] |= {"diverged_at": 4, "evaluations": results["points"][0]["evaluations"][:1]}
    assert math.isnan(cells(results, "p0")[0.25, 0.5].mean)
    assert summary_rows(results)[0]["diverged"] == 1
    assert "7 of 24 points finished" in report.write_report(tmp_path, results).read_text()


def test_a_sweep_without_a_finished_point_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="no finished point"):
        report.write_report(tmp_path, made_up_results() | {"points": [], "programs": {}})
    assert not list(tmp_path.iterdir())


def test_one_finished_point_has_a_report(tmp_path):
    assert "1 of 24 points finished" in report.write_report(tmp_path, cut_short(made_up_results(), 1)).read_text()


def test_one_axis_alone_and_an_even_distribution_can_be_drawn(tmp_path):
    results = made_up_results({"Exact()": 2.0}, seeds=(0,))
    point = results["points"][0]
    flat = point | {"scale": 0.0, "beta": 0.0}
    report.write_report(tmp_path, results | {"points": [point, flat]})
