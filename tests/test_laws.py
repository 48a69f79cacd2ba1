"""Every registered method keeps every law that its capabilities bind it to.

In every suite all laws are run for one method a family, and those of CORE for all methods; all for all in the campaign.
"""

import dataclasses

import pytest

from attention import Capabilities, Chunked, Exact, Performer, TopK
from attention.method import METHODS
from attention.testing import LAWS, laws_for

EXAMPLES = [method for cls in METHODS.values() for method in cls.examples()]
ALWAYS = (Exact, Chunked, Performer, TopK)  # which have all capabilities between them
CORE = {
    "batch_elements_are_independent",
    "certificates_hold",
    "cost_grows_with_length",
    "extend_over_any_split_equals_the_whole",
    "heads_are_independent",
    "hidden_keys_do_not_exist",
    "new_values_do_not_recompile",
    "object_is_configuration",
    "packed_segments_equal_segments_alone",
    "refuses_what_it_cannot_do",
    "rows_that_see_nothing_are_zero",
    "same_call_same_bits",
    "shape_dtype_finite",
    "the_future_does_not_exist",
}


def cases():
    """One parameter for each method and law."""
    always = [cls.examples()[0] for cls in ALWAYS]
    for method in EXAMPLES:
        for name in laws_for(method):
            marks = [pytest.mark.xdist_group(repr(method))]
            own = method.capabilities.coarse and name == "low_precision_is_rounding"  # which reads that capability
            marks += [pytest.mark.campaign] if name not in CORE and method not in always and not own else []
            yield pytest.param(method, name, id=f"{method!r}-{name}", marks=marks)


def test_laws_that_wait_for_the_campaign_are_run_for_some_method():
    assert set(LAWS) >= CORE
    names = [field.name for field in dataclasses.fields(Capabilities) if field.name != "coarse"]
    have = {name for cls in ALWAYS for name in names if getattr(cls.capabilities, name) not in (False, "none")}
    asked = {name for method in EXAMPLES for name in names if getattr(method.capabilities, name) not in (False, "none")}
    assert have >= asked


@pytest.mark.parametrize(("method", "name"), list(cases()))
def test_law(method, name):
    LAWS[name](method)
