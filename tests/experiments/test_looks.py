"""What figures with many lines show is told apart, and what is not shown is not named."""

import itertools

import matplotlib.colors as colours

from experiments import race
from experiments.looks import FAMILIES, look_of
from experiments.temperature_figures import figure


def test_no_two_methods_look_alike_and_families_share_a_colour():
    looks = {name: look_of(name) for name in itertools.chain(*FAMILIES.values())}
    assert len({tuple(look.values()) for look in looks.values()}) == len(looks)
    for members in FAMILIES.values():
        assert len({looks[name]["color"] for name in members}) == 1
    assert len({looks[members[0]]["color"] for members in FAMILIES.values()}) == len(FAMILIES)
    assert look_of("TopK(k=3)") == look_of("TopK, largest") == looks["TopK"]
    assert look_of("Strange(k=3)")["color"] not in {look["color"] for look in looks.values()}


def result(**errors):
    methods = {name: {"relative_error": error, "share_of_exact_operations": 0.5} for name, error in errors.items()}
    return {"operands": "some", "temperatures": [1.0, 2.0], "budget": 1.0, "methods": methods}


def names(drawing):
    return {text.get_text() for text in drawing.legends[0].get_texts()}


def test_a_method_that_is_exact_everywhere_has_no_place_in_the_legend():
    results = [result(TopK=[0.5, 1.0], LocalChunked=[1e-8, 1e-9])] * 4
    assert "TopK" in names(figure(results))
    assert "LocalChunked" not in names(figure(results))


def cell(length, label="forward", **ratios):
    spread = {name: {"median": x, "lower_quartile": 0.9 * x, "upper_quartile": 1.1 * x} for name, x in ratios.items()}
    return {"cell": {"length": length}, "label": label, "slower_than_ours": spread}


def test_one_length_is_drawn_as_bars_and_several_as_lines_with_ticks():
    bars = race.figure([cell(64, A=0.5, B=8.0), cell(32, "other", A=0.25)], "baseline")
    assert [len(panel.patches) for panel in bars.axes] == [2, 1]
    lines = race.figure([cell(T, **{"256 x 256": 0.95, "256 x 512": 1.1, "512 x 256": 1.3}) for T in (32, 64)], "ours")
    assert len(lines.axes[0].get_yticks()) >= 3
    shown = [colours.to_hex(bars.lines[0].get_color()) for bars in lines.axes[0].containers]
    assert shown[0] == shown[1] != shown[2]
    assert names(lines) == {"256 x 256", "256 x 512", "512 x 256"}
