"""Every registered method keeps every law that its capabilities bind it to.

The laws that cost most are run in every suite once for each implementation of `attend`, and for every method in the
campaign: methods that share an engine differ in their feature maps alone.
"""

import pytest

from attention.method import METHODS
from attention.testing import LAWS, laws_for

EXAMPLES = [method for cls in METHODS.values() for method in cls.examples()]
THOROUGH = {
    "certificates_hold",
    "error_falls_with_the_budget",
    "gradients_equal_finite_differences",
    "low_precision_is_rounding",
    "padding_does_not_exist",
}


def cases():
    """One parameter for each method and law."""
    seen = set()
    for method in EXAMPLES:
        known = type(method).attend in seen
        seen.add(type(method).attend)
        for name in laws_for(method):
            marks = [pytest.mark.xdist_group(repr(method))]
            marks += [pytest.mark.campaign] if known and name in THOROUGH else []
            yield pytest.param(method, name, id=f"{method!r}-{name}", marks=marks)


def test_thorough_laws_exist():
    assert set(LAWS) >= THOROUGH


@pytest.mark.parametrize(("method", "name"), cases())
def test_law(method, name):
    LAWS[name](method)
