"""What tests take down of errors and bounds becomes cells and a figure."""

import json
import math

import numpy as np
from ratios import over

from experiments import soundness

OF = {"method": "Exact", "dtype": "float32", "causal": False, "kind": "rounding", "problems": None}


def test_rows_of_the_same_are_one_cell_in_one_order():
    rows = [
        OF | {"quantity": "output", "ratios": [0.25, 1.5]},
        OF | {"quantity": "dq", "ratios": [0.5]},
        OF | {"quantity": "output", "ratios": [0.75]},
    ]
    dq, output = soundness.cells(rows)
    assert (dq["quantity"], dq["cases"], dq["violations"], dq["worst"]) == ("dq", 1, 0, 0.5)
    assert (output["cases"], output["violations"], output["worst"], output["median"]) == (3, 1, 1.5, 0.75)
    assert soundness.cells(rows[::-1]) == [dq, output]


def test_what_is_written(tmp_path):
    certified = OF | {"method": "TopK", "kind": "deterministic", "problems": "33 tokens", "quantity": "output"}
    rows = [certified | {"ratios": [0.5, 0.0]}, OF | {"quantity": "dv", "dtype": "float16", "ratios": [0.9]}]
    soundness.write(tmp_path, rows)
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == soundness.cells(rows)
    drawn = (tmp_path / "soundness.svg").read_text()
    assert all(text in drawn for text in ("TopK: 33 tokens", "Exact: dv", "float16", "worst error / bound"))
    assert (tmp_path / "soundness.png").exists()


def test_a_ratio_is_above_1_just_where_the_bound_is_broken():
    up, down = np.nextafter(0.3, 1), np.nextafter(0.3, 0)
    error = np.array([up, 0.3, down, 0.0, 1e-300, np.inf, np.nan, np.nan, np.inf])
    bound = np.array([0.3, 0.3, 0.3, 0.0, 0.0, np.inf, 1.0, np.inf, 1.0])
    found = over(error, bound)
    np.testing.assert_array_equal(found > 1, [1, 0, 0, 0, 1, 0, 1, 1, 1])
    assert math.isinf(found[-1])
    assert found[3] == 0
