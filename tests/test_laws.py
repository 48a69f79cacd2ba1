"""Every registered method keeps every law that its capabilities bind it to.

The laws that cost most are run in every suite for one method a family, and for every method in the campaign.
"""

import dataclasses

import pytest

from attention import Capabilities, Chunked, Exact, Performer, TopK
from attention.method import METHODS
from attention.testing import LAWS, laws_for

EXAMPLES = [method for cls in METHODS.values() for method in cls.examples()]
ALWAYS = (Exact, Chunked, Performer, TopK)  # which have all capabilities between them
THOROUGH = {
    "a_second_eager_call_does_not_recompile",
    "batch_axis_is_optional",
    "error_falls_with_the_budget",
    "exact_limit_equals_the_oracle",
    "exact_limit_has_the_oracles_gradients",
    "exact_limit_holds_at_any_length",
    "gradients_equal_finite_differences",
    "impossible_temperatures_are_refused",
    "jit_equals_eager",
    "low_temperature_gives_the_argmax",
    "low_precision_is_rounding",
    "other_segments_room_does_not_exist",
    "padding_does_not_exist",
    "padding_equals_truncation",
    "the_future_does_not_exist_when_aligned_to_the_end",
    "vmap_equals_loop",
}


def cases():
    """One parameter for each method and law."""
    always = [cls.examples()[0] for cls in ALWAYS]
    for method in EXAMPLES:
        for name in laws_for(method):
            marks = [pytest.mark.xdist_group(repr(method))]
            marks += [pytest.mark.campaign] if name in THOROUGH and method not in always else []
            yield pytest.param(method, name, id=f"{method!r}-{name}", marks=marks)


def test_laws_that_wait_for_the_campaign_are_run_for_some_method():
    assert set(LAWS) >= THOROUGH
    names = [field.name for field in dataclasses.fields(Capabilities)]
    have = {name for cls in ALWAYS for name in names if getattr(cls.capabilities, name) not in (False, "none")}
    asked = {name for method in EXAMPLES for name in names if getattr(method.capabilities, name) not in (False, "none")}
    assert have >= asked


@pytest.mark.parametrize(("method", "name"), list(cases()))
def test_law(method, name):
    LAWS[name](method)
